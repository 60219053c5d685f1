"""Saving without ever losing anything: atomic writes, checkpoints that continue exactly, pruning after saving."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file

from srl_utils.autoencoders import WEIGHTS_NAME, save_autoencoder, save_variant
from srl_utils.errors import UserError

STATE_FILE = "trainer_state.json"
EMA_FILE = "ema.pt"


class Stateful(Protocol):
    """Counters that JSON can hold."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with a path beside `path` and renames it: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    write(aside)
    os.replace(aside, path)


def write_text_atomically(path: Path, text: str) -> None:
    """In UTF-8; names of files that are no Unicode have their odd bytes escaped."""
    write_atomically(path, lambda aside: aside.write_text(text, encoding="utf-8", errors="backslashreplace"))


def save_drop_in(vae: AutoencoderKL, output_dir: Path, *, variants: Sequence[str] = ()) -> None:
    """Writes what `AutoencoderKL.from_pretrained(output_dir)` needs; each file changes in one rename.

    `variants`, `fp16` or `bf16`, are half-precision weights to write beside the full ones.
    """
    aside = output_dir / ".drop-in.partial"
    save_autoencoder(vae, aside)
    for variant in variants:
        save_variant(vae, aside, variant)
    for file in aside.iterdir():
        os.replace(file, output_dir / file.name)
    aside.rmdir()


@dataclass(frozen=True)
class Checkpoints:
    """The `checkpoint-N` folders of a run; one exists under that name only once it is complete."""

    output_dir: Path
    total_limit: int | None = None

    def found(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        folders = [path for path in self.output_dir.glob("checkpoint-*") if re.search(r"-\d+$", path.name)]
        return sorted(folders, key=step_of)

    def resolve(self, resume_from: str) -> Path | None:
        """The folder to continue from: the newest for `latest` (None where there is none), else the path.

        Raises:
            UserError: if the path is not a checkpoint.
        """
        if resume_from == "latest":
            return self.found()[-1] if self.found() else None
        for candidate in (Path(resume_from), self.output_dir / resume_from):
            if (candidate / STATE_FILE).is_file():
                return candidate
        present = ", ".join(path.name for path in self.found()) or "none"
        raise UserError(
            f"--resume_from_checkpoint {resume_from} is no checkpoint of this script; "
            f"'latest' or a folder is expected, {self.output_dir} holds: {present}"
        )

    def save(self, accelerator: Accelerator, step: int) -> Path:
        """Saves the state of all processes as `checkpoint-{step}`, then prunes the oldest."""
        final = self.output_dir / f"checkpoint-{step}"
        aside = self.output_dir / f".checkpoint-{step}.partial"
        if accelerator.is_main_process:
            self._discard_leftovers()
        accelerator.wait_for_everyone()
        accelerator.save_state(str(aside))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            _replace_folder(aside, final)
            self._prune()
        accelerator.wait_for_everyone()
        return final

    def _prune(self) -> None:
        if self.total_limit is not None:
            for folder in self.found()[: -self.total_limit]:
                shutil.rmtree(folder)

    def _discard_leftovers(self) -> None:
        for folder in self.output_dir.glob(".checkpoint-*"):
            shutil.rmtree(folder)


def step_of(checkpoint: Path) -> int:
    """The number in `checkpoint-N`."""
    return int(checkpoint.name.rsplit("-", 1)[1])


def register_state(
    accelerator: Accelerator, vae: AutoencoderKL, ema: EMAModel | None, counters: dict[str, Stateful]
) -> None:
    """Makes `accelerator.save_state` and `load_state` carry the VAE, its EMA and the named counters.

    The VAE is written as a diffusers folder, `checkpoint-N/vae`, instead of accelerate's `model.safetensors`.
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

    def load(models: list, folder: str) -> None:
        models.clear()
        vae.load_state_dict(load_file(Path(folder) / "vae" / WEIGHTS_NAME))
        if ema is not None:
            ema.load_state_dict(torch.load(Path(folder) / EMA_FILE, map_location="cpu", weights_only=True))
            ema.to(accelerator.device)
        state = json.loads((Path(folder) / STATE_FILE).read_text())
        for name, counter in counters.items():
            counter.load_state_dict(state[name])

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _replace_folder(aside: Path, final: Path) -> None:
    """Renames `aside` to `final`; a folder of that name, from a run that was rewound, gives way."""
    outdated = final.with_name(f".{final.name}.outdated")
    if final.exists():
        os.replace(final, outdated)
    os.replace(aside, final)
    shutil.rmtree(outdated, ignore_errors=True)
