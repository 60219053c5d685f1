"""Command lines of every kind: no traceback, no flag ignored in silence. Hypothesis draws them from the parsers."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest
from helpers.runs import Run, smallest_training
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import train_srl_vae
from srl_utils.command_line import Parser, exit_code
from srl_utils.errors import UserError
from srl_utils.evaluation.cli import main as evaluation
from srl_utils.pipelines import __main__ as sanitizing

DOZENS = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
HOSTILE = st.sampled_from([
    "", " ", "0", "-1", "1", "2", "3", "0.5", "1.5", "nan", "inf", "-inf", "1e400", "1e-400", "8/255", "1/0", "0/0", "--",
    "9" * 400, "9" * 5000, "0x10", "1_0", "\u0663", "true", "None", "../../x", "/", "~", "x" * 300, "a\nb", "\u202e",
    "\udcff", "<script>", "$(touch x)", "%s", "{0}", "latest", "scikit-image", "bf16",
])  # fmt: skip


TRAINING = ["--train_data_dir", "photographs"]
EVALUATION = ["reconstruction", "--baseline", "a", "--vae", "b", "--data_dir", "photographs"]
SANITIZING = ["sanitize", "in.png", "out.png", "--vae", "a"]
DOWNSTREAM = [*EVALUATION[1:], "--pipeline", "c", "--caption_column", "text"]
COMMANDS = {
    "training": (train_srl_vae.parse_args, TRAINING),
    "evaluation": (evaluation.parse_args, EVALUATION),
    "generation": (evaluation.parse_args, ["generation", *DOWNSTREAM]),
    "editing": (evaluation.parse_args, ["editing", *DOWNSTREAM, "--replace", "ring=box"]),
    "poisoning": (evaluation.parse_args, ["poisoning", *DOWNSTREAM, "--concept", "a", "--target_concept", "b"]),
    "personalisation": (evaluation.parse_args, ["personalisation", *DOWNSTREAM, "--concept", "a"]),
    "sanitize": (sanitizing.parse_args, SANITIZING),
}


def flags_of(command: str) -> list[argparse.Action]:
    """The flags that a command line knows, from its parser."""
    parse, arguments = COMMANDS[command]
    parsers: list[Parser] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parser, "refuse_without_effect", lambda parser, *_: parsers.append(parser))
        parse(arguments)
    return [action for action in parsers[0]._actions if action.option_strings and action.dest != "help"]


def words_of(action: argparse.Action) -> st.SearchStrategy[list[str]]:
    """The flag with one of its choices, a number, or something hostile."""
    name = st.just(action.option_strings[0])
    if action.nargs == 0:
        return name.map(lambda flag: [flag])
    values = HOSTILE | st.integers(-2, 2**70).map(str) | st.floats().map(str) | st.text(max_size=8)
    if action.choices:
        values = st.sampled_from(sorted(action.choices)) | values
    several = st.lists(values, min_size=0 if action.nargs == "+" else 1, max_size=3 if action.nargs == "+" else 1)
    return st.tuples(name, several).map(lambda parts: [parts[0], *parts[1]])


def command_lines(command: str) -> st.SearchStrategy[list[str]]:
    flags = st.one_of([words_of(action) for action in flags_of(command)])
    return st.lists(flags, max_size=6).map(lambda parts: [word for part in parts for word in part])


@pytest.mark.timeout(600)
@pytest.mark.parametrize("examples", [100, pytest.param(2000, marks=pytest.mark.faults)])
@pytest.mark.parametrize("command", COMMANDS)
def test_any_command_line_is_taken_or_refused_in_one_line(command: str, examples: int) -> None:
    """Oracle: the promise, for thousands of drawn command lines: a namespace or a UserError, nothing else.

    The command that a training's card tells of is taken too, and says the same.
    """
    parse, required = COMMANDS[command]
    outcomes = {"taken": 0, "refused": 0}

    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(command_lines(command))
    def attempt(words: list[str]) -> None:
        try:
            args = parse([*required, *words])
        except UserError:
            outcomes["refused"] += 1
            return
        outcomes["taken"] += 1
        if command == "training":
            again = shlex.split(train_srl_vae.published(args).line)[3:]
            assert train_srl_vae.published(parse(again)).arguments == train_srl_vae.published(args).arguments

    attempt()
    assert min(outcomes.values()) > examples / 50, outcomes


WITHOUT_EFFECT = {
    "training": [
        ("--lpips_net alex", "--lpips_weight 0", "--lpips_weight 1"),
        ("--originality_units scaled", "--originality_weight 0", "--originality_weight 1"),
        ("--pgd_step_size 0.1", "--pgd_steps 0", "--pgd_steps 1"),
        ("--pgd_step_size 0.02", "--recipe fast --pgd_steps 0", "--recipe fast"),
        ("--pgd_steps 3", "--gaussian_noise 8/255", ""),
        ("--no_pgd_random_start", "--recipe fast --epsilon 0", "--recipe fast"),
        ("--lr_warmup_steps 500", "--recipe fast --lr_scheduler constant", "--recipe fast"),
        ("--lr_warmup_steps 3", "", "--lr_scheduler constant_with_warmup"),
        ("--lr_num_cycles 3", "--lr_scheduler cosine", "--lr_scheduler cosine_with_restarts"),
        ("--lr_power 2", "--lr_scheduler linear", "--lr_scheduler polynomial"),
        ("--logging_dir here", "--report_to wandb", "--report_to tensorboard"),
        ("--tracker_project_name mine", "--report_to none", "--report_to wandb"),
        ("--hub_private_repo", "", "--push_to_hub"),
        ("--hub_model_id somebody/vae", "", "--push_to_hub"),
        ("--hub_token hf_x", "", "--push_to_hub"),
        ("--dataloader_num_workers 4", "--streaming", ""),
        ("--revision v2", "--pretrained_model_name_or_path {here}", ""),
    ],
    "evaluation": [
        ("--inception_weights w.pth", "--metrics psnr", "--metrics psnr rfid"),
        ("--pipeline p", "--attacks clean pgd-3", "--attacks photoguard-diffusion"),
        ("--target t.png", "--attacks pgd-3", "--attacks mist-textural"),
        ("--max_attack_steps 3", "--attacks pgd-3", "--attacks pid"),
        ("--num_check_images 3", "--no_checks", ""),
        ("--split test", "", None),
        ("--threat_models adaptive", "--attacks clean jpeg-3", "--attacks quick"),
        ("--epsilons 8/255", "--attacks clean --no_checks", "--attacks clean"),
    ],
    "sanitize": [("--revision v2", "--vae {here}", "--vae somebody/vae")],
}


@pytest.mark.parametrize(
    ("command", "flag", "mode", "other"),
    [(command, *case) for command, cases in WITHOUT_EFFECT.items() for case in cases],
)
def test_a_flag_without_effect_is_an_error(
    command: str, flag: str, mode: str, other: str | None, tmp_path: Path
) -> None:
    """Oracle: the code that reads the flag; in one mode nothing does, in the other something does."""
    parse, required = COMMANDS[command]
    with pytest.raises(UserError, match=f"{re.split('[ =]', flag)[0]} has no effect without"):
        parse([*required, *mode.format(here=tmp_path).split(), *flag.split()])
    if other is not None:
        parse([*required, *other.split(), *flag.split()])


NEUTRAL = {
    "training": [
        "--lr_scheduler=constant --lr_warmup_steps=0",
        "--lr_warmup_steps=500",
        "--recipe fast --lr_scheduler constant --lr_warmup_steps 10",
        "--lr_scheduler cosine --lr_num_cycles=1 --lr_power=1.0",
        "--report_to=none --logging_dir=logs --tracker_project_name=srl-vae",
        "--report_to=wandb --logging_dir=logs",
        "--dataloader_num_workers=0 --streaming",
        "--gaussian_noise 8/255 --pgd_steps 0 --pgd_step_size 0.02",
        "--gaussian_noise 0 --pgd_steps 3",
        "--lpips_weight 0 --lpips_net vgg",
        "--originality_weight 0 --originality_units raw",
        "--max_train_steps 3 --num_train_epochs 2",
        "--train_split train --image_column=image",
        "--pretrained_model_name_or_path {here} --revision main",
        "--dataset_config_name default",
        "--allow_tf32 --mixed_precision=no --no-torch_compile",
        "--gradient_accumulation_steps 1 --max_grad_norm=1 --adam_weight_decay 0.0 --seed=0",
    ],
    "evaluation": [
        "--no_checks --num_check_images 8",
        "--image_column=image",
        "--attacks clean --threat_models transfer adaptive",
    ],
    "sanitize": ["--vae {here} --revision main"],
}


@pytest.mark.parametrize(("command", "words"), [(command, words) for command, all in NEUTRAL.items() for words in all])
def test_a_flag_that_asks_for_what_happens_anyway_is_accepted(command: str, words: str, tmp_path: Path) -> None:
    """Oracle: the code that reads the flag does the same with and without it."""
    parse, required = COMMANDS[command]
    parse([*required, *words.format(here=tmp_path).split()])


# Flags of the commands in the README files of diffusers' examples that this training has as well, by their script.
DOCUMENTED = {
    "train_text_to_image": "--use_ema --resolution=512 --center_crop --random_flip --train_batch_size=1 "
    "--gradient_accumulation_steps=4 --gradient_checkpointing --max_train_steps=15000 --learning_rate=1e-05 "
    "--max_grad_norm=1 --lr_scheduler=constant --lr_warmup_steps=0 --output_dir=sd-naruto-model",
    "train_text_to_image_lora": "--resolution=512 --random_flip --train_batch_size=1 --num_train_epochs=100 "
    "--checkpointing_steps=5000 --learning_rate=1e-04 --lr_scheduler=constant --lr_warmup_steps=0 --seed=42 "
    "--output_dir=sd-naruto-model-lora --report_to=wandb",
    "train_text_to_image_sdxl": "--resolution=512 --center_crop --random_flip --train_batch_size=1 "
    "--gradient_accumulation_steps=4 --gradient_checkpointing --max_train_steps=10000 --use_8bit_adam "
    "--learning_rate=1e-06 --lr_scheduler=constant --lr_warmup_steps=0 --mixed_precision=fp16 --report_to=wandb "
    "--checkpointing_steps=5000 --output_dir=sdxl-naruto-model --push_to_hub",
    "train_text_to_image_lora_sdxl": "--resolution=1024 --train_batch_size=1 --num_train_epochs=2 --checkpointing_steps=2 "
    "--learning_rate=1e-04 --lr_scheduler=constant --lr_warmup_steps=0 --mixed_precision=fp16 --max_train_steps=20 "
    "--seed=1234 --output_dir=sd-naruto-model-lora-sdxl",
    "train_text_to_image_decoder": "--resolution=768 --train_batch_size=1 --gradient_accumulation_steps=4 "
    "--gradient_checkpointing --max_train_steps=15000 --learning_rate=1e-05 --max_grad_norm=1 --checkpoints_total_limit=3 "
    "--lr_scheduler=constant --lr_warmup_steps=0 --report_to=wandb --push_to_hub --output_dir=kandi2-decoder",
    "train_dreambooth": "--resolution=512 --train_batch_size=1 --gradient_accumulation_steps=2 --gradient_checkpointing "
    "--use_8bit_adam --learning_rate=5e-6 --lr_scheduler=constant --lr_warmup_steps=0 --max_train_steps=800 --push_to_hub",
    "train_dreambooth_lora": "--report_to=wandb --resolution=64 --train_batch_size=4 --gradient_accumulation_steps=1 "
    "--learning_rate=5e-6 --scale_lr --max_train_steps=1200 --checkpointing_steps=100",
    "train_dreambooth_flux": "--mixed_precision=bf16 --resolution=1024 --train_batch_size=1 "
    "--gradient_accumulation_steps=4 --learning_rate=1. --report_to=wandb --lr_scheduler=constant --lr_warmup_steps=0 "
    "--max_train_steps=500 --seed=0 --push_to_hub",
    "train_dreambooth_lora_flux2": "--gradient_checkpointing --resolution=512 --train_batch_size=1 "
    "--gradient_accumulation_steps=4 --learning_rate=1. --report_to=wandb --lr_scheduler=constant_with_warmup "
    "--lr_warmup_steps=100 --max_train_steps=500 --seed=0 --push_to_hub",
    "train_controlnet": "--resolution=512 --learning_rate=1e-5 --train_batch_size=4 --mixed_precision=fp16 "
    "--tracker_project_name=controlnet-demo --report_to=wandb",
    "train_controlnet_flux": "--image_column=image --mixed_precision=bf16 --resolution=512 --learning_rate=1e-5 "
    "--max_train_steps=15000 --validation_steps=100 --checkpointing_steps=200 --train_batch_size=1 "
    "--gradient_accumulation_steps=16 --report_to=wandb --lr_scheduler=cosine --seed=42 --push_to_hub",
    "train_instruct_pix2pix": "--resolution=256 --random_flip --train_batch_size=4 --gradient_accumulation_steps=4 "
    "--gradient_checkpointing --max_train_steps=15000 --checkpointing_steps=5000 --checkpoints_total_limit=1 "
    "--learning_rate=5e-05 --max_grad_norm=1 --lr_warmup_steps=0 --mixed_precision=fp16 --seed=42 --push_to_hub",
    "train_unconditional": "--resolution=64 --center_crop --random_flip --output_dir=ddpm-ema-flowers-64 "
    "--train_batch_size=16 --gradient_accumulation_steps=1 --use_ema --learning_rate=1e-4 --lr_warmup_steps=500 "
    "--mixed_precision=no --push_to_hub",
    "train_autoencoderkl": "--pretrained_model_name_or_path=stabilityai/sd-vae-ft-mse --num_train_epochs=100 "
    "--gradient_accumulation_steps=2 --learning_rate=4.5e-6 --lr_scheduler=cosine --report_to=wandb --mixed_precision=bf16",
    "train_vqgan": "--resolution=128 --train_batch_size=2 --gradient_accumulation_steps=8 --report_to=wandb",
    "train_custom_diffusion": "--resolution=512 --train_batch_size=2 --learning_rate=1e-5 --lr_warmup_steps=0 "
    "--max_train_steps=250 --scale_lr --report_to=wandb",
    "train_lcm_distill_sd_wds": "--mixed_precision=fp16 --resolution=512 --learning_rate=1e-6 --adam_weight_decay=0.0 "
    "--max_train_steps=1000 --max_train_samples=4000000 --dataloader_num_workers=8 --validation_steps=200 "
    "--checkpointing_steps=200 --checkpoints_total_limit=10 --train_batch_size=12 --gradient_checkpointing "
    "--gradient_accumulation_steps=1 --use_8bit_adam --resume_from_checkpoint=latest --report_to=wandb --push_to_hub",
    "textual_inversion": "--resolution=512 --train_batch_size=1 --gradient_accumulation_steps=4 "
    "--max_train_steps=3000 --learning_rate=5.0e-04 --scale_lr --lr_scheduler=constant --lr_warmup_steps=0 --push_to_hub "
    "--output_dir=textual_inversion_cat",
}


def test_a_named_dataset_overrides_a_folder(capsys: pytest.CaptureFixture) -> None:
    """Oracle: diffusers' documentation of its scripts; the flag that does not count is named."""
    args = train_srl_vae.parse_args(["--dataset_name", "lambdalabs/pictures", "--train_data_dir", "photographs"])
    assert (args.dataset_name, args.train_data_dir) == ("lambdalabs/pictures", None)
    assert "--train_data_dir photographs is ignored: --dataset_name overrides it" in capsys.readouterr().err


@pytest.mark.parametrize("script", DOCUMENTED)
@pytest.mark.parametrize("data", ["--train_data_dir=photographs", "--dataset_name=lambdalabs/pictures"])
def test_commands_of_diffusers_documentation_are_accepted(script: str, data: str) -> None:
    """Oracle: the commands as documented, and their values."""
    words = DOCUMENTED[script].split()
    args = vars(train_srl_vae.parse_args([data, *words]))
    for word in words:
        name, _, value = word.removeprefix("--").partition("=")
        same = type(args[name])(value) if value and args[name] is not None else True
        assert args[name] == same, name


def test_a_warm_up_that_will_not_happen_is_refused() -> None:
    """Oracle: diffusers' constant schedule ignores the warm-up that some of its documented commands ask for."""
    with pytest.raises(UserError, match="--lr_warmup_steps has no effect without a schedule with warm-up"):
        train_srl_vae.parse_args([*TRAINING, "--lr_scheduler=constant", "--lr_warmup_steps=100"])


@pytest.mark.parametrize("flag", ["--enable_xformers_memory_efficient_attention", "--validation_prompt=a"])
def test_flags_of_diffusers_that_are_no_flags_here_are_refused(flag: str) -> None:
    """Oracle: specification, one line with the flag."""
    with pytest.raises(UserError, match=flag):
        train_srl_vae.parse_args([*TRAINING, flag])


PATHS = (
    "pretrained_model_name_or_path", "train_data_dir", "validation_data_dir", "dataset_name", "output_dir", "cache_dir",
    "resume_from_checkpoint", "logging_dir",
)  # fmt: skip


@pytest.mark.parametrize("flag", PATHS)
def test_a_leading_tilde_is_the_home_folder(flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: what a shell makes of `~` where it is a word of its own; Hub ids and other paths stay as they are."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for text, expected in (("~/here", f"{tmp_path}/here"), ("some/where", "some/where"), ("a~b", "a~b")):
        assert str(getattr(train_srl_vae.parse_args([*TRAINING, f"--{flag}={text}"]), flag)) == expected


@pytest.mark.parametrize("flag", [["--image_column", "picture"], ["--streaming", "--max_train_steps", "2"]])
def test_a_folder_of_images_has_no_columns_and_no_stream(run: Run, flags: list[str], flag: list[str]) -> None:
    """Oracle: the folder holds image files, of which neither is true."""
    code, printed = run(*flags, *flag)
    assert code == 2 and f"{flag[0]}: no effect on a folder of image files" in printed


VALUES = {
    "--resolution": ["16", "18", "17", "1", "512", "4097", "99999999"],
    "--pgd_steps": ["0", "3", "-1"],
    "--epsilon": ["0", "8/255", "1", "2", "1/0"],
    "--lpips_weight": ["0"],
    "--originality_weight": ["0", "0.1", "nan"],
    "--originality_units": ["scaled"],
    "--lr_scheduler": ["cosine", "polynomial", "constant"],
    "--lr_power": ["0", "2"],
    "--lr_warmup_steps": ["0", "7"],
    "--learning_rate": ["0", "1e-8", "1e300"],
    "--adam_beta1": ["0", "1"],
    "--seed": ["0", str(2**63 - 1), str(2**64)],
    "--train_batch_size": ["1", "3", "1000000"],
    "--gradient_accumulation_steps": ["2", "100000"],
    "--validation_split": ["0.5", "1", "nan", "train", "0.0001"],
    "--validation_data_dir": ["{photographs}", "{photographs}/nested", "/dev/null", "{long}"],
    "--train_data_dir": ["{photographs}", "/dev/null", "/proc/self/fdinfo", "{long}"],
    "--dataset_name": ["scikit-image", "nobody/nothing", "../../etc", "{photographs}"],
    "--max_train_samples": ["1", "2", "1000000"],
    "--num_validation_images": ["1", "1000"],
    "--output_dir": ["{long}", "/dev/null/x", "/proc/x", "a/../b"],
    "--resume_from_checkpoint": ["latest", "/", "{long}"],
    "--pretrained_model_name_or_path": ["/dev/null", "../../x", "{long}", "nobody/nothing"],
    "--mixed_precision": ["bf16", "fp16", "no"],
    "--save_variant": ["fp16"],
    "--max_bad_images": ["0", "1"],
    "--dataloader_num_workers": ["0", "1000"],
}
SWITCHES = ["--center_crop", "--random_flip", "--sample_posterior", "--use_ema", "--scale_lr", "--streaming"]


@pytest.mark.faults
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")
def test_any_dry_run_ends_well_or_in_one_line(run: Run, vae_folder: Path, photographs: Path, tmp_path: Path) -> None:
    """Oracle: exit code 0, or 2 with one line; the command as users run it, to the end of its checks."""
    places = {"photographs": photographs, "long": "x" * 300}
    pairs = [(flag, value) for flag, values in VALUES.items() for value in values] + [(flag, None) for flag in SWITCHES]

    @DOZENS
    @given(st.lists(st.sampled_from(pairs), min_size=1, max_size=4, unique_by=lambda pair: pair[0]))
    def attempt(chosen: list[tuple[str, str | None]]) -> None:
        words = [word.format(**places) for pair in chosen for word in pair if word is not None]
        code, printed = run(*smallest_training(vae_folder, photographs, tmp_path / "out"), *words, "--dry_run")
        errors = [line for line in printed.splitlines() if line.startswith("error: ")]
        assert (code, len(errors)) in ((0, 0), (2, 1)), printed
        assert not re.search("Traceback", printed)
        assert not (tmp_path / "out").exists()

    attempt()


OF_AN_EVALUATION = {
    "--baseline": ["{vae}", "{vae}:vae", ":", "/dev/null", "{long}", "nobody/nothing"],
    "--vae": ["a={vae}", "=", "{long}", "<b>\n---={vae}", "original={vae}"],
    "--data_dir": ["{photographs}", "/dev/null", "/proc/self/fdinfo", "{long}"],
    "--dataset_name": ["scikit-image", "nobody/nothing", "../../etc"],
    "--split": ["train", "nothing", "0.5"],
    "--image_column": ["image", "picture"],
    "--resolution": ["16", "18", "17", "1", "4097"],
    "--num_images": ["1", "1000000"],
    "--attacks": [
        "clean",
        "quick",
        "pgd-0",
        "pgd-3",
        "square-2-lpips",
        "glaze",
        "mist-semantic",
        "jpeg-9",
        "salt-and-pepper",
    ],
    "--epsilons": ["8/255", "0", "1", "nan"],
    "--threat_models": ["adaptive", "none"],
    "--metrics": ["psnr", "lpips", "clip", "rfid", "is"],
    "--inception_weights": ["/dev/null", "{long}", "{photographs}"],
    "--clip_model": ["/dev/null", "{long}", "{vae}", "../../x"],
    "--pipeline": ["/dev/null", "{long}", "{vae}", "nobody/nothing"],
    "--target": ["/dev/zero", "{long}", "{photographs}", "{photographs}/00.png"],
    "--max_attack_steps": ["1", "0"],
    "--mixed_precision": ["bf16", "fp16", "no"],
    "--seed": ["0", str(2**63 - 1)],
    "--batch_size": ["1", "1000000"],
    "--output_dir": ["{long}", "/dev/null", "/proc/x"],
}


@pytest.mark.faults
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")
def test_any_dry_run_of_an_evaluation_ends_well_or_in_one_line(
    vae_folder: Path, photographs: Path, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: as above."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "no weights"))
    places = {"photographs": photographs, "long": "x" * 300, "vae": vae_folder}
    pairs = [(flag, value) for flag, values in OF_AN_EVALUATION.items() for value in values]
    pairs += [("--no_checks", None), ("--streaming", None)]
    usual = {"--baseline": vae_folder, "--vae": f"same={vae_folder}", "--data_dir": photographs, "--resolution": 16,
             "--output_dir": tmp_path / "out", "--metrics": "psnr"}  # fmt: skip

    @DOZENS
    @given(st.lists(st.sampled_from(pairs), min_size=1, max_size=4, unique_by=lambda pair: pair[0]))
    def attempt(chosen: list[tuple[str, str | None]]) -> None:
        words = {**usual, **{flag: value and value.format(**places) for flag, value in chosen}}
        flat = [str(word) for pair in words.items() for word in pair if word is not None]
        code = exit_code(lambda: evaluation.main(["reconstruction", *flat, "--dry_run"]))
        printed = "".join(capfd.readouterr())
        errors = [line for line in printed.splitlines() if line.startswith("error: ")]
        assert (code, len(errors)) in ((0, 0), (2, 1)), printed
        assert "Traceback" not in printed and not (tmp_path / "out").exists()

    attempt()
