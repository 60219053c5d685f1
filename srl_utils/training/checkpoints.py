"""Save a run without losing anything: atomic writes, checkpoints that continue exactly, pruning after saving.

A checkpoint is written under another name, sealed with a manifest of its checksums, and renamed. One that differs from
its manifest is skipped in favour of the one before it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils.constants import SCALER_NAME
from diffusers import ModelMixin
from diffusers.training_utils import EMAModel
from torch import nn

from srl_utils.errors import MissingFile, ResourceError, UnusableFile, UserError
from srl_utils.files import fault, flush, seal
from srl_utils.resources import failed_write, gigabytes
from srl_utils.vae.files import first_line
from srl_utils.vae.loading import (
    HALF_PRECISION,
    is_weights_file,
    restore_autoencoder,
    save_autoencoder,
    save_variant,
)

logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"
SETTINGS_FILE = "settings.json"
"""The settings of the run, inside a checkpoint."""
ARGUMENTS_FILE = "training_args.json"
"""The settings of the last session, in the output folder."""
EMA_FILE = "ema.pt"


class Stateful(Protocol):
    """Counters that JSON can hold."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def save_drop_in(vae: ModelMixin, output_dir: Path, *, variants: Sequence[str] = ()) -> None:
    """Write the files that `from_pretrained(output_dir)` needs; each file is replaced in one rename.

    Weights of an earlier run that are not written again are removed, whatever their precision and layout, since programs
    would load them although they belong to another VAE.

    Args:
        vae: the VAE to save.
        output_dir: where to write.
        variants: weights to write beside the full ones, of `VARIANTS`.
    """
    aside = output_dir / ".drop-in.partial"
    shutil.rmtree(aside, ignore_errors=True)  # left by a run that was killed here
    try:
        save_autoencoder(vae, aside)
        for variant in variants:
            save_variant(vae, aside, variant)
        files = list(aside.iterdir())
        for file in files:
            flush(file)
        for outdated in _weights_beside(output_dir, {file.name for file in files}):
            outdated.unlink()
        for file in files:
            os.replace(file, output_dir / file.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)  # frees the space on a full disk


def _weights_beside(folder: Path, names: set[str]) -> list[Path]:
    """Return the weights in `folder` that are not among `names`.

    Variants that no run writes, such as a user's copies, are left out.
    """
    written = "|".join(HALF_PRECISION)
    return [path for path in folder.iterdir() if path.name not in names and is_weights_file(path.name, written)]


@dataclass(frozen=True)
class Checkpoints:
    """The `checkpoint-N` folders of a run. A folder gets that name only when it is complete.

    Attributes:
        output_dir: folder of the run.
        total_limit: checkpoints to keep; None keeps all.
        num_bytes: approximate size of a checkpoint.
    """

    output_dir: Path
    total_limit: int | None = None
    num_bytes: int = 0

    def check_room(self) -> None:
        """Raise a ResourceError unless two checkpoints fit on the disk, the new one and the one before it."""
        free = shutil.disk_usage(self.output_dir).free
        if free < 2 * self.num_bytes:
            raise ResourceError(
                f"{gigabytes(free)} are free in {self.output_dir}, and two checkpoints of about "
                f"{gigabytes(self.num_bytes)} must fit beside each other; make room or choose another `output_dir`"
            )

    def found(self) -> list[Path]:
        """Return the checkpoints, oldest first. Each was complete when it was saved."""
        folders = [path for path in self.output_dir.glob("checkpoint-*") if re.search(r"-\d+$", path.name)]
        replaced = [path for path in self.output_dir.glob(".checkpoint-*.outdated") if not _final(path).exists()]
        return sorted(folders + replaced, key=step_of)

    def resolve(self, resume_from_checkpoint: str, *, tell: Callable[[str], object] = logger.warning) -> Path | None:
        """Return the checkpoint to resume from.

        Args:
            resume_from_checkpoint: a folder, or `latest` for the newest undamaged one.
            tell: called with a line on each damaged checkpoint that is skipped.

        Returns:
            The folder; None for `latest` if there are no checkpoints.

        Raises:
            MissingFile: a FileNotFoundError, if the path is not a checkpoint.
            UnusableFile: an OSError, if the checkpoint is damaged, or if all are.
        """
        if resume_from_checkpoint == "latest":
            return self._newest_whole(tell)
        for candidate in (Path(resume_from_checkpoint), self.output_dir / resume_from_checkpoint):
            if (candidate / STATE_FILE).is_file():
                if damage := fault(candidate):
                    raise UnusableFile(
                        f"{candidate} is damaged: {damage}; 'latest' skips it", parameter="resume_from_checkpoint"
                    )
                return candidate
        present = ", ".join(path.name for path in self.found()) or "none"
        raise MissingFile(
            f"'{resume_from_checkpoint}' is not a checkpoint of this script; give 'latest' or a checkpoint's folder "
            f"({self.output_dir} holds: {present})",
            parameter="resume_from_checkpoint",
        )

    def _newest_whole(self, tell: Callable[[str], object]) -> Path | None:
        folders = self.found()
        for folder in reversed(folders):
            damage = fault(folder)
            if damage is None:
                return folder
            tell(f"{folder} is damaged and skipped: {damage}")
        if folders:
            raise UnusableFile(
                f"all checkpoints in {self.output_dir} are damaged; remove them to start from the beginning, or "
                "choose another `output_dir`"
            )
        return None

    def save(self, accelerator: Accelerator, step: int) -> Path:
        """Save the state of all processes as `checkpoint-{step}`, then remove the oldest checkpoints.

        Raises:
            ResourceError: if the disk does not take it; earlier checkpoints stay intact.
        """
        try:
            return self._save(accelerator, step)
        except Exception as error:
            reason = failed_write(error)
            if reason is None:
                raise
            shutil.rmtree(self.output_dir / f".checkpoint-{step}.partial", ignore_errors=True)
            raise ResourceError(
                f"checkpoint-{step} cannot be written to {self.output_dir}: {reason}; it takes about "
                f"{gigabytes(self.num_bytes)}. The checkpoints before it are intact: make room and run the same command "
                "with `resume_from_checkpoint` latest"
            ) from None

    def _save(self, accelerator: Accelerator, step: int) -> Path:
        final = self.output_dir / f"checkpoint-{step}"
        aside = self.output_dir / f".checkpoint-{step}.partial"
        if accelerator.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(aside))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            seal(aside)
            _replace_folder(aside, final)
            self.tidy(final)
        accelerator.wait_for_everyone()
        return final

    def set_aside(self, step: int) -> list[Path]:
        """Rename the checkpoints after `step` and return them, when a run goes back to an earlier step.

        Otherwise `latest` would continue from them.
        """
        later = [folder for folder in self.found() if step_of(folder) > step]
        return [self._renamed(folder) for folder in later]

    def _renamed(self, folder: Path) -> Path:
        stem = f"abandoned-checkpoint-{step_of(folder)}"
        names = chain([stem], (f"{stem}.{number}" for number in count(2)))
        place = next(place for name in names if not (place := self.output_dir / name).exists())
        os.replace(folder, place)
        return place

    def tidy(self, newest: Path) -> None:
        """Remove all but `newest` and the last others, and what an interrupted save has left."""
        if self.total_limit is not None:
            others = [folder for folder in self.found() if folder != newest]
            for folder in others[: max(len(others) - self.total_limit + 1, 0)]:
                os.replace(folder, self.output_dir / f".checkpoint-{step_of(folder)}.pruned")
        for folder in set(self.output_dir.glob(".checkpoint-*")) - set(self.found()):
            shutil.rmtree(folder)


def step_of(checkpoint: Path) -> int:
    """Return the number in `checkpoint-N`, or in `.checkpoint-N.outdated`."""
    return int(re.sub(r"^.*?-(\d+).*$", r"\1", checkpoint.name))


def state_bytes(vae: ModelMixin, trained: Iterable[nn.Parameter], ema: EMAModel | None) -> int:
    """Return the approximate size of a checkpoint in bytes.

    It holds all weights, two moments of each trained weight, and the average of the trained weights, if any.

    Args:
        vae: the VAE.
        trained: its weights that are trained.
        ema: their average.
    """
    weights, moments = (sum(tensor.numel() for tensor in tensors) for tensors in (vae.parameters(), trained))
    return 4 * (weights + moments * (2 if ema is None else 3))


def register_state(
    accelerator: Accelerator,
    vae: ModelMixin,
    ema: EMAModel | None,
    counters: dict[str, Stateful],
    settings: str = "{}",
) -> None:
    """Make `accelerator.save_state` and `load_state` include the VAE, its EMA and the counters.

    The VAE is written as a diffusers folder, `checkpoint-N/vae`, instead of accelerate's `model.safetensors`.

    Args:
        accelerator: gets the hooks.
        vae: the VAE.
        ema: average of the trained weights, if any.
        counters: saved as JSON under these names.
        settings: the run's record as JSON, which is saved but not loaded.
    """

    def save(models: list, weights: list, folder: str) -> None:
        weights.clear()
        if not accelerator.is_main_process:
            return
        save_autoencoder(vae, Path(folder) / "vae")
        if ema is not None:
            torch.save(ema.state_dict(), Path(folder) / EMA_FILE)
        state = {name: counter.state_dict() for name, counter in counters.items()}
        (Path(folder) / STATE_FILE).write_text(json.dumps(state, indent=1))
        (Path(folder) / SETTINGS_FILE).write_text(settings)

    def load(models: list, folder: str) -> None:
        models.clear()
        restore_autoencoder(vae, Path(folder) / "vae")
        if ema is not None:
            ema.load_state_dict(torch.load(Path(folder) / EMA_FILE, map_location="cpu", weights_only=True))
            ema.to(accelerator.device)
        state = json.loads((Path(folder) / STATE_FILE).read_text())
        for name, counter in counters.items():
            counter.load_state_dict(state[name])

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def load_checkpoint(accelerator: Accelerator, checkpoint: Path) -> None:
    """Load the state that `register_state` has registered.

    If the checkpoint was made in another precision, the gradient scaler of fp16 starts anew.

    Raises:
        UserError: if the checkpoint belongs to another VAE or other settings, or holds no state.
    """
    scaler = accelerator.scaler
    if not (checkpoint / SCALER_NAME).exists():
        accelerator.scaler = None
    try:
        accelerator.load_state(str(checkpoint))
    except Exception as error:  # many kinds of errors: keys, shapes, kinds of files
        raise UserError(f"{checkpoint} does not fit this run: {first_line(error)}") from None
    finally:
        accelerator.scaler = scaler


def _replace_folder(aside: Path, final: Path) -> None:
    """Rename `aside` to `final`. An older folder of that name is renamed first, and removed when the new one is in place."""
    if final.exists():
        os.replace(final, _outdated(final))
    os.replace(aside, final)
    flush(final.parent)


def _outdated(final: Path) -> Path:
    return final.with_name(f".{final.name}.outdated")


def _final(outdated: Path) -> Path:
    return outdated.with_name(outdated.name.removeprefix(".").removesuffix(".outdated"))
