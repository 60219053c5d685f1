"""Resume with other flags: apply each change from there on or refuse it, and record and publish applied changes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from srl_utils.errors import UserError
from srl_utils.files import read_json
from srl_utils.training.checkpoints import ARGUMENTS_FILE, EMA_FILE, SETTINGS_FILE, STATE_FILE

FREE = frozenset({
    "cache_dir", "dataloader_num_workers", "max_bad_images", "recipe", "validation_steps", "dry_run",
    "gradient_checkpointing", "attack_batch_size", "output_dir", "checkpointing_steps", "checkpoints_total_limit",
    "save_variant", "resume_from_checkpoint", "logging_dir", "report_to", "tracker_project_name", "push_to_hub",
    "hub_model_id", "hub_private_repo", "hub_strategy", "hub_token", "mixed_precision", "torch_compile",
})  # fmt: skip
"""Flags that are not compared. They do not change the trained weights, or other entries are compared in their place: the
single flags for the recipe, the execution for precision and compiling."""
REFUSED = frozenset({"seed", "use_ema", "use_8bit_adam", "lora_rank"})
"""Flags that cannot change, since the state in the checkpoint depends on them."""
BASE = frozenset({"pretrained_model_name_or_path", "subfolder", "revision", "variant"})
"""Flags that may change as long as they name the same weights."""
TRAINING_DATA = frozenset({
    "dataset_name", "dataset_config_name", "train_data_dir", "train_split", "image_column", "streaming", "max_train_samples"
})  # fmt: skip
VALIDATION_DATA = frozenset(
    {"validation_data_dir", "validation_split", "num_validation_images", "resolution", "num_frames"}
)
"""Flags that may change as long as the validation images stay the same."""
APPLIED = TRAINING_DATA | {
    "num_processes", "center_crop", "random_flip", "epsilon", "pgd_steps", "gaussian_noise", "pgd_step_size",
    "no_pgd_random_start", "lpips_weight", "lpips_net", "objective", "originality_weight", "originality_units",
    "latent_weight", "latent_attack_share", "sample_posterior", "train_batch_size", "num_train_epochs",
    "max_train_steps", "gradient_accumulation_steps", "learning_rate", "scale_lr",
    "lr_scheduler", "lr_warmup_steps", "lr_num_cycles", "lr_power", "adam_beta1", "adam_beta2", "adam_weight_decay",
    "adam_epsilon", "max_grad_norm", "execution", "allow_tf32",
}  # fmt: skip
"""Flags whose new value holds from the resumed step on, and two entries that are not flags: num_processes, execution."""
TRAINING_IMAGES = "training_images"
"""Name of a change in the number of training images that the same flags find."""
NEWER_FLAGS: dict[str, Any] = {"objective": "srl", "num_frames": 1, "lora_rank": None}
"""What runs did before these flags existed."""
WORDS = {"execution": "{}", TRAINING_IMAGES: "{} training images"}
"""Texts for entries that are not flags."""
PLACES = frozenset({"pretrained_model_name_or_path", "dataset_name", "train_data_dir", "validation_data_dir"})


@dataclass(frozen=True)
class Change:
    """A flag whose value after step `step` differs from before."""

    name: str
    step: int
    before: Any
    after: Any


@dataclass(frozen=True)
class Inputs:
    """Digests of the inputs of a run, which tell whether they are the same when it resumes.

    Attributes:
        base: digest of the original VAE's weights.
        validation: digest of the validation images.
        training_images: number of training images; None for a stream.
    """

    base: str
    validation: str
    training_images: int | None


@dataclass(frozen=True)
class Settings:
    """The settings of a run as JSON values, and how they changed.

    Attributes:
        arguments: the flags.
        inputs: None in records of older versions.
        changes: what was changed on resuming.
    """

    arguments: Mapping[str, Any]
    inputs: Inputs | None = None
    changes: Sequence[Change] = ()

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Settings:
        inputs = record.get("inputs")
        return cls(
            record["arguments"], inputs and Inputs(**inputs), [Change(**change) for change in record.get("changes", [])]
        )


@dataclass(frozen=True)
class Earlier:
    """The checkpoint that a run resumes from.

    Attributes:
        checkpoint: its folder.
        step: steps that were made.
        samples: samples that were read.
        settings: the flags that are known; few for an old checkpoint without a record.
    """

    checkpoint: Path
    step: int
    samples: int
    settings: Settings


def read_earlier(checkpoint: Path) -> Earlier:
    """Return how far a checkpoint's run was, and its settings.

    Checkpoints of older versions take the settings from `training_args.json` beside them.

    Raises:
        UserError: if the checkpoint's files are not those of this script.
    """
    place = checkpoint / SETTINGS_FILE
    if not place.exists():
        place = checkpoint.parent / ARGUMENTS_FILE
    try:
        progress = read_json(checkpoint / STATE_FILE)["progress"]
        settings = Settings.from_record(read_json(place) if place.exists() else {"arguments": {}})
        arguments = {**NEWER_FLAGS, **settings.arguments, "use_ema": (checkpoint / EMA_FILE).exists()}
        return Earlier(checkpoint, progress["step"], progress["samples"], replace(settings, arguments=arguments))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{checkpoint} does not fit this run: its state cannot be read ({error!r})") from None


def check_flags(arguments: Mapping[str, Any], earlier: Earlier) -> None:
    """Refuse flags that cannot change, before anything is loaded.

    Raises:
        UserError: with both values of each flag.
    """
    unknown = earlier.settings.inputs is None  # an older record has no digests, so the flags must be equal
    _refuse(earlier, arguments, REFUSED | (BASE | VALIDATION_DATA if unknown else frozenset()))
    steps = arguments["max_train_steps"]
    if steps is not None and steps < earlier.step:
        raise UserError(
            f"{earlier.checkpoint} has made {earlier.step} steps, more than {steps}; give more steps, or resume from an "
            "earlier checkpoint",
            parameter="max_train_steps",
        )


def settle(current: Settings, earlier: Earlier, *, steps_left: bool = True) -> Settings:
    """Return `current` with the history of the run: earlier changes, and those made now.

    Args:
        current: the settings of this run.
        earlier: the checkpoint.
        steps_left: False if the training has ended, so that nothing can change.

    Raises:
        UserError: if the original VAE or the validation images differ.
    """
    before = earlier.settings
    if before.inputs is not None and current.inputs is not None:
        _check_inputs(current, current.inputs, before.inputs, earlier)
    return replace(current, changes=[*before.changes, *(_changes(current, earlier) if steps_left else ())])


def _changes(current: Settings, earlier: Earlier) -> Iterator[Change]:
    before = earlier.settings
    applied = APPLIED - {"num_train_epochs"} if current.arguments["max_train_steps"] else APPLIED
    for name in changed(before.arguments, current.arguments, applied):
        yield Change(name, earlier.step, before.arguments[name], current.arguments[name])
    then, now = (inputs and inputs.training_images for inputs in (before.inputs, current.inputs))
    if before.inputs is not None and then != now:
        yield Change(TRAINING_IMAGES, earlier.step, then, now)


def changed(before: Mapping[str, Any], after: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Return the names of the flags that differ, in the order of `after`; a flag that one side lacks does not count."""
    return [name for name in after if name in names and name in before and not _same(name, before[name], after[name])]


def told(changes: Iterable[Change]) -> list[str]:
    """Return a line on each flag that changed, such as `--seed 0 until step 3, then 1`, without local folders."""
    lines: dict[str, str] = {}
    for change in changes:
        before, after = shortened(change.before), shortened(change.after)
        now = f"another {after}" if before == after else _value(after)
        start = lines.get(change.name, as_typed(change.name, before))
        lines[change.name] = f"{start} until step {change.step}, then {now}"
    return list(lines.values())


def shortened(value: Any) -> Any:
    """Return `value`, or only its last part if it is a path outside the folder in which the command was typed."""
    if not isinstance(value, str):
        return value
    path = Path(value)
    leaves = path.is_absolute() or value.startswith("~") or ".." in path.parts
    return path.name.strip() or value if leaves else value


def as_typed(name: str, value: Any) -> str:
    """Return the flag as it is typed on the command line, such as `--seed 3`, or `no --seed` if it is left out.

    The model card and the messages on resuming quote the command line, so they name flags.
    """
    if name in WORDS:
        return WORDS[name].format(_value(value))
    if value is None or value is False or value == []:
        return f"no --{name}"
    return f"--{name}" if value is True else f"--{name} {_value(value)}"


def digest(tensors: Iterable[Tensor]) -> str:
    """Return 16 hexadecimal digits that identify the values of `tensors`, which are on the CPU."""
    state = sha256()
    for tensor in tensors:
        state.update(tensor.detach().contiguous().numpy().data)
    return state.hexdigest()[:16]


@contextmanager
def own_hyperparameters(
    optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LambdaLR
) -> Iterator[None]:
    """Keep this run's learning rate, decays and other settings while states are loaded within the context.

    torch has no public way to set a scheduler's last learning rates, so `_last_lr` is set.
    """
    groups = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    base_lrs = scheduler.base_lrs
    yield
    scheduler.base_lrs = base_lrs
    factors = [schedule(scheduler.last_epoch) for schedule in scheduler.lr_lambdas]
    scheduler._last_lr = [rate * factor for rate, factor in zip(base_lrs, factors, strict=True)]
    for group, own, rate in zip(optimizer.param_groups, groups, scheduler._last_lr, strict=True):
        group.update(own, lr=rate)


def _check_inputs(current: Settings, now: Inputs, before: Inputs, earlier: Earlier) -> None:
    if now.base != before.base:
        _refuse(earlier, current.arguments, BASE)
        raise UserError(
            f"its weights are not those that {earlier.checkpoint} was trained from; restore them, or choose another `output_dir`",
            parameter="pretrained_model_name_or_path",
        )
    if now.validation == before.validation:
        return
    _refuse(earlier, current.arguments, TRAINING_DATA | VALIDATION_DATA)
    if now.training_images != before.training_images and current.arguments["validation_data_dir"] is None:
        raise UserError(
            f"{earlier.checkpoint} was trained on {before.training_images} images, and there are {now.training_images} now, "
            "so other images are held out; restore the dataset, or choose another `output_dir`"
        )
    raise UserError(
        f"the validation images are not those that {earlier.checkpoint} was measured on; restore them, or choose another "
        "`output_dir`"
    )


def _refuse(earlier: Earlier, arguments: Mapping[str, Any], names: Iterable[str]) -> None:
    before = earlier.settings.arguments
    if differing := changed(before, arguments, names):
        there = ", ".join(as_typed(name, before[name]) for name in differing)
        here = ", ".join(as_typed(name, arguments[name]) for name in differing)
        raise UserError(
            f"{earlier.checkpoint} was trained with {there}, and this command says {here}; "
            "give the same, or choose another `output_dir` to start anew"
        )


def _same(name: str, before: Any, after: Any) -> bool:
    if name in PLACES and isinstance(before, str) and isinstance(after, str):
        return os.path.abspath(before) == os.path.abspath(after)
    return before == after


def _value(value: Any) -> str:
    words = {None: "not given", True: "on", False: "off"}
    if isinstance(value, list):
        return " ".join(map(str, value)) or words[None]
    return words[value] if value is None or isinstance(value, bool) else str(value)
