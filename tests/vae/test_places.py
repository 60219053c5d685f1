"""What `--baseline`, `--vae` and `--pipeline` name: folders with any signs in their names, and commits on the Hub."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.runs import build_tiny_vae
from huggingface_hub import constants

from srl_utils.command_line import exit_code
from srl_utils.errors import UserError
from srl_utils.evaluation.cli import main as command
from srl_utils.evaluation.cli.running import fingerprint
from srl_utils.evaluation.tasks.base import Metrics
from srl_utils.files import home_expanded
from srl_utils.pipelines.loading import load_pipeline
from srl_utils.vae.loading import AutoencoderSource, load_autoencoder
from srl_utils.vae.places import described, parse_named_place, parse_place, resolved_commit

FOLDERS = (
    "outputs/lr=1e-4",
    "outputs/a:b",
    "outputs/my vae",
    "outputs/a,b",
    "outputs/v@2",
    "outputs/x,variant=fp16",
    "a=b=c",
    "outputs/é|漢",
)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def source(place: str, **further: str) -> AutoencoderSource:
    return AutoencoderSource(pretrained_model_name_or_path=place, **further)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with folders of every name, which is also the home folder."""
    for folder in FOLDERS:
        (tmp_path / folder / "vae").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_that_exists_is_taken_as_it_is(folder: str, here: Path) -> None:
    """Oracle: specification, for a folder alone, named, absolute, with a slash at its end, and below the home folder."""
    own = folder.rpartition("/")[2]
    assert parse_named_place(folder) == (own, source(folder))
    assert parse_named_place(f"{folder}/") == (own, source(f"{folder}/"))
    assert parse_named_place(f"new={folder}") == ("new", source(folder))
    assert parse_named_place(f"a b={here}/{folder}") == ("a b", source(f"{here}/{folder}"))
    assert parse_named_place(f"new=~/{folder}") == ("new", source(f"{here}/{folder}"))
    assert parse_named_place(f"~/{folder}") == (own, source(f"{here}/{folder}"))
    assert parse_place(f"{folder}:vae") == source(folder, subfolder="vae")
    assert parse_place(f"{folder}:vae,variant=fp16") == source(folder, subfolder="vae", variant="fp16")
    assert parse_named_place(f"{folder},variant=bf16") == (f"{own},bf16", source(folder, variant="bf16"))
    with pytest.raises(UserError, match="is a folder on this machine and has no revisions; leave out @main"):
        parse_named_place(f"new={folder}@main")
    with pytest.raises(UserError, match="has no subfolder unet; leave out :unet"):
        parse_named_place(f"new={folder}:unet")
    with pytest.raises(UserError, match="no revisions"):
        parse_place(f"{folder}@refs/pr/3:vae")


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("user/model", "model", source("user/model")),
        ("gpt2", "gpt2", source("gpt2")),
        ("new=user/model", "new", source("user/model")),
        ("user/model:vae", "model:vae", source("user/model", subfolder="vae")),
        ("new=user/model@main:vae", "new", source("user/model", revision="main", subfolder="vae")),
        ("user/model@refs/pr/3", "model@refs/pr/3", source("user/model", revision="refs/pr/3")),
        ("new=user/model@feature/x:a/b", "new", source("user/model", revision="feature/x", subfolder="a/b")),
        (f"new=user/model@{COMMIT}", "new", source("user/model", revision=COMMIT)),
        ("new=user/model,variant=fp16", "new", source("user/model", variant="fp16")),
        ("user/model@v1:vae,variant=fp16", "model@v1:vae,fp16", source("user/model", revision="v1", subfolder="vae", variant="fp16")),
        ("new= user/model ", "new", source("user/model")),
        ("demo@v1=user/model@v1", "demo@v1", source("user/model", revision="v1")),
    ],
)  # fmt: skip
def test_what_names_a_place_on_the_hub(text: str, name: str, expected: AutoencoderSource, here: Path) -> None:
    """Oracle: specification. Two commits of one model have two names."""
    assert parse_named_place(text) == (name, expected)


@pytest.mark.parametrize(
    "text", ["=x", "x=", "new=", " =x", "user/model@", "user/model:", "@main", ":vae", "user/model:vae@main", "a@b,c"]
)
def test_what_names_nothing_is_refused(text: str, here: Path) -> None:
    """Oracle: specification; one line that says what was expected."""
    with pytest.raises(UserError, match="expected"):
        parse_named_place(text)


def test_names_of_dots_and_links(here: Path) -> None:
    """Oracle: the folder's own name for the working directory, the link's name for a link, an error for the root."""
    (here / "latest").symlink_to(here / "outputs")
    assert parse_named_place(".")[0] == here.name and parse_named_place("outputs/..")[0] == here.name
    assert parse_named_place("./latest/")[0] == "latest" and parse_named_place("outputs/my vae/.")[0] == "my vae"
    with pytest.raises(UserError, match="no name; write NAME=/"):
        parse_named_place("/")


def test_a_tilde_is_the_home_folder_unless_there_is_such_a_path(here: Path) -> None:
    """Oracle: os.path.expanduser, and a folder that is called ~."""
    assert home_expanded("~/x") == f"{here}/x" and home_expanded("x~y") == "x~y"
    (here / "~/x").mkdir(parents=True)
    assert home_expanded("~/x") == "~/x"


# --- the Hub's cache ------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the Hub as its client fills it: user/model, whose branch refs/pr/3 holds another VAE than main."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr("diffusers.configuration_utils.HF_HUB_CACHE", str(folder), raising=False)
    for number, (branch, commit) in enumerate({"main": "a" * 40, "refs/pr/3": COMMIT}.items()):
        reference = folder / "models--user--model/refs" / branch
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(commit)
        snapshot = folder / "models--user--model/snapshots" / commit
        vae = build_tiny_vae(seed=number)
        vae.save_pretrained(snapshot)
        vae.save_pretrained(snapshot / "vae")
        build_tiny_vae(seed=number + 5).save_pretrained(snapshot / "vae", variant="fp16")
    return folder


@pytest.mark.parametrize(
    ("place", "seed", "commit"),
    [
        ("user/model", 0, "a" * 40), ("user/model@main:vae", 0, "a" * 40), ("user/model@refs/pr/3", 1, COMMIT),
        ("user/model@refs/pr/3:vae", 1, COMMIT), (f"user/model@{COMMIT}:vae,variant=fp16", 6, COMMIT),
        ("user/model:vae,variant=fp16", 5, "a" * 40),
    ],
)  # fmt: skip
def test_a_published_commit_is_loaded(place: str, seed: int, commit: str, cache: Path) -> None:
    """Oracle: the weights that were put into that commit, and its hash."""
    found = parse_place(place)
    loaded = load_autoencoder(found)
    expected = build_tiny_vae(seed=seed).state_dict()
    assert all(weight.equal(expected[name]) for name, weight in loaded.state_dict().items())
    assert resolved_commit(found, "config.json") == commit
    assert described(found, "config.json").endswith(f"commit {commit}")


def test_the_report_says_which_commit_was_judged(cache: Path, photographs: Path, tmp_path: Path, capsys) -> None:
    """Oracle: the real command; two commits of one model side by side, and a revision that is not there in one line."""
    arguments = [
        "reconstruction", "--baseline", "user/model:vae", "--vae", "user/model@refs/pr/3", "pinned=user/model@refs/pr/3:vae",
        "--data_dir", str(photographs), "--resolution", "16", "--num_images", "2", "--attacks", "clean", "--metrics", "psnr",
        "--no_checks", "--output_dir", str(tmp_path / "out"),
    ]  # fmt: skip
    arguments_without_effect = [word for word in arguments if word != "--epsilons"]
    assert command.main(arguments_without_effect) == 0
    report = (tmp_path / "out/report.md").read_text()
    assert f"VAE original | user/model, subfolder vae, commit {'a' * 40} |" in report
    assert f"VAE model@refs/pr/3 | user/model, revision refs/pr/3, commit {COMMIT} |" in report
    assert f"VAE pinned | user/model, revision refs/pr/3, subfolder vae, commit {COMMIT} |" in report
    values = {row["vae"]: row["value"] for row in json.loads((tmp_path / "out/results.json").read_text())}
    assert values["pinned"] == values["model@refs/pr/3"] != values["original"]
    assert exit_code(lambda: command.main([*arguments, "--vae", "user/model@nowhere"])) == 2
    *_, told = capsys.readouterr().err.splitlines()
    assert told.startswith("error: --vae: the VAE model@nowhere at user/model, revision nowhere: no VAE configuration")


def test_stored_values_depend_on_the_commits_of_pipelines(cache: Path) -> None:
    """Oracle: invariance: a branch that moves on gives another fingerprint; the same commit gives the same one."""
    args = command.parse_args([
        "reconstruction", "--baseline", "user/model", "--data_dir", "photos", "--pipeline", "user/model", "--purifiers",
        "img2img-0.1", "--purifier_pipelines", "user/model@refs/pr/3", "user/model",
    ])  # fmt: skip
    for commit in ("a" * 40, COMMIT):
        (cache / "models--user--model/snapshots" / commit / "model_index.json").write_text("{}")
    accelerator = SimpleNamespace(mixed_precision="no")
    setup = SimpleNamespace(codecs=[], images=torch.zeros(1, 3, 2, 2), accelerator=accelerator)

    def found() -> dict[str, object]:
        return fingerprint(args, setup, Metrics(names=["psnr"]))

    before = found()
    assert found() == before
    assert before["purifier_pipelines"] == [f"user/model@refs/pr/3, commit {COMMIT}", f"user/model, commit {'a' * 40}"]
    for branch, changed in (("refs/pr/3", {"purifier_pipelines"}), ("main", {"purifier_pipelines", "pipeline"})):
        (cache / "models--user--model/refs" / branch).write_text("a" * 40 if branch != "main" else COMMIT)
        now = found()
        assert {name for name, value in now.items() if value != before[name]} == changed
        before = now


def test_a_pipeline_in_a_subfolder(tmp_path: Path) -> None:
    """Oracle: the same pipeline by its own path; a variant that is not there is one line."""
    from helpers.small_pipelines import build_pipeline
    from helpers.small_text_encoder import add_text_encoders

    pipe = add_text_encoders(build_pipeline("sd"), tmp_path)
    pipe.save_pretrained(tmp_path / "many/one")
    found = load_pipeline(source(str(tmp_path / "many"), subfolder="one"))
    expected = pipe.unet.state_dict()
    assert all(weight.equal(expected[name]) for name, weight in found.unet.state_dict().items())
    with pytest.raises(UserError, match="variant fp16 cannot be loaded"):
        load_pipeline(source(str(tmp_path / "many"), subfolder="one", variant="fp16"))


def test_tildes_in_flags_are_expanded(here: Path) -> None:
    """Oracle: os.path.expanduser for every flag that takes a path, as no shell expands `--flag=~/x`."""
    args = command.parse_args([
        "editing", "--baseline", "a", "--vae", "b", "--pipeline", "c", "--data_dir=~/d", "--output_dir=~/o", "--clip_model=~/c",
        "--classifier=~/k", "--prompts=~/p", "--target=~/t", "--metrics", "clip-text", "shown",
    ])  # fmt: skip
    assert (args.data_dir, args.clip_model, args.classifier) == tuple(os.path.expanduser(f"~/{name}") for name in "dck")
    assert (args.output_dir, args.prompts, args.target) == tuple(here / name for name in "opt")
