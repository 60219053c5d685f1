"""What the paper's experiments call: every flag is one that the commands take."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

import train_srl_vae
from experiments import clips, defences, runner, tokens
from experiments.plan import BETWEEN_SEEDS, FULL, PARTS, QUICK, SCENES, VARIANTS, Scale, evaluations
from experiments.runner import Module, Runner
from srl_utils.evaluation.cli import geometry
from srl_utils.evaluation.cli import main as evaluation
from srl_utils.evaluation.cli.data_sets import data_sets


@pytest.mark.parametrize("scale", [FULL, QUICK], ids=["full", "quick"])
def test_every_evaluation_parses(scale: Scale, tmp_path: Path) -> None:
    """Oracle: the command's own parser, which also refuses flags without effect; each part of the report has rows."""
    planned = evaluations(scale, tmp_path)
    parts = set(PARTS) if scale.seeds > 1 else set(PARTS) - {BETWEEN_SEEDS}
    assert len({each.name for each in planned}) == len(planned) and {each.part for each in planned} == parts
    for each in planned:
        shared = ["--baseline", "vae", "--data_dir", "scenes", "--output_dir", each.name, "--resolution", "64"]
        args = evaluation.parse_args([each.command, *shared, *map(str, each.flags)])
        assert args.vae == [] and set(each.variants) <= set(VARIANTS)
        if each.command == "geometry":
            geometry.check_flags(args)
        if args.dataset_name:  # robustness carries over from what the VAEs were trained on
            assert next(iter(data_sets(args))) == SCENES


def test_a_quick_run_has_a_folder_of_its_own() -> None:
    """Oracle: specification; a folder that is given is kept, wherever its flag stands."""
    parse = runner.experiment_parser("paper", "Run.", quick=True).parse_args
    calls = ([], ["--quick"], ["--quick", "--output_dir", "own"], ["--output_dir", "own", "--quick"])
    folders = [(args.output_dir.name, args.quick) for args in map(parse, calls)]
    assert folders == [("paper", False), ("paper-quick", True), ("own", True), ("own", True)]


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_parses(name: str) -> None:
    """Oracle: the training script's own parser."""
    flags = ["--pretrained_model_name_or_path", "vae", "--train_data_dir", "scenes", *shlex.split(VARIANTS[name].flags)]
    assert train_srl_vae.parse_args(flags, environment={}).train_data_dir == "scenes"


@pytest.mark.parametrize("name", ["tokens", "clips"])
def test_the_other_experiments_parse(name: str) -> None:
    """Oracle: the parsers of the commands, which also refuse flags without effect."""
    module = {"tokens": tokens, "clips": clips}[name]
    for flags in module.VARIANTS.values():
        words = ["--pretrained_model_name_or_path", "vae", "--train_data_dir", "data", "--lpips_weight", "0"]
        assert train_srl_vae.parse_args([*words, *shlex.split(flags)], environment={}).max_train_steps > 0
    for flags in [tokens.EVALUATION, tokens.CHECKS] if name == "tokens" else [clips.ON_WHOLE_CLIPS, clips.ON_IMAGES]:
        data = [] if "--dataset_name" in flags else ["--data_dir", "data"]
        data += ["--target", "clip"] if "uvcg" in flags else []
        words = ["reconstruction", "--baseline", "vae", "--resolution", "64", *data, *map(str, flags)]
        assert evaluation.parse_args(words).threat_models == ["adaptive"]


@pytest.mark.parametrize("scale", [defences.FULL, defences.QUICK], ids=["full", "quick"])
def test_the_comparison_of_defences_parses(scale: defences.Scale) -> None:
    """Oracle: the parsers of the commands; each rival has its seeds, and each curve its other weights."""
    trainings = defences.planned_trainings(scale, Path("scenes"))
    curves = sum(rival.curve for rival in defences.RIVALS.values())
    assert len(trainings) == scale.seeds * len(defences.RIVALS) + len(scale.alphas) * curves
    for flags in trainings.values():
        words = ["--pretrained_model_name_or_path", "vae", "--train_data_dir", "data", "--lpips_weight", "0"]
        assert train_srl_vae.parse_args([*words, *map(str, flags)], environment={}).max_train_steps > 0
    commands = {
        "reconstruction": defences.reconstruction_flags(scale),
        "generation": defences.generation_flags(scale),
        "editing": [*defences.editing_flags(scale, ["transfer", "adaptive"]), "--purifiers", *defences.PURIFIERS],
    }
    for command, flags in commands.items():
        words = [command, "--baseline", "vae", "--data_dir", "data", "--resolution", "64", *map(str, flags)]
        assert evaluation.parse_args(words).num_images in (scale.generated, scale.judged)


def test_a_missing_network_is_told_at_once(tmp_path: Path) -> None:
    """Oracle: specification, one line with the command that builds it, before anything is run."""
    with pytest.raises(SystemExit, match=r"vq holds no VAE; build it first: python -m miniature.build vq"):
        Runner(tmp_path / "out", tmp_path / "vq", title="tokens", num_calls=1)
    assert not (tmp_path / "out").exists()


def drawing(folder: Path, *flags: object) -> Module:
    return Module(
        folder.name, "miniature.draw", ["--output_dir", folder, "--num_images", 1, *flags], folder / "00000.png"
    )


def test_modules_run_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the files that they write; what exists is not made again, and after a failure nothing more is started."""
    run = Runner(tmp_path, runner.WEIGHTS / "vae", title="test", num_calls=4)
    wanted = [drawing(tmp_path / name) for name in ("a", "b")]
    run.modules(wanted)
    times = {module.done: module.done.stat().st_mtime_ns for module in wanted}
    run.modules(wanted)
    assert {path: path.stat().st_mtime_ns for path in times} == times and run.seconds().keys() == {"a", "b"}
    monkeypatch.setattr(runner, "num_processes", lambda most: 1)
    with pytest.raises(SystemExit, match="bad failed with exit code 2"):
        run.modules([drawing(tmp_path / "bad", "--no_such_flag"), drawing(tmp_path / "c"), drawing(tmp_path / "d")])
    assert not (tmp_path / "d").exists()
