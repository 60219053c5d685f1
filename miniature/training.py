"""The training loop of the miniature's networks: it can stop at any step and resumes with the same next batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from srl_utils.files import write_atomically
from srl_utils.training.execution import choose_precision

WARMUP_STEPS = 200
LOGGING_STEPS = 100
BETAS = (0.9, 0.99)
"""AdamW's, in training with the cosine schedule."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a network is trained.

    Attributes:
        work_dir: folder of the saved state, from which a stopped training resumes.
        steps: optimizer steps.
        batch_size: samples of a step.
        learning_rate: peak of the schedule.
        seed: seed of weights and samples.
        device: PyTorch device.
        torch_compile: whether to compile the networks.
    """

    work_dir: Path
    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    device: str
    torch_compile: bool

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function`, compiled if `torch_compile` is set."""
        return torch.compile(function) if self.torch_compile else function


class Stateful(Protocol):
    """A network, an optimizer or a schedule: whatever has a state to save."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> object: ...


class Loop:
    """Calls an update for each step, logs its values, and saves everything that the next step depends on."""

    def __init__(self, path: Path, parts: Mapping[str, Stateful], *, steps: int, saving_steps: int) -> None:
        """Load the state at `path` if it exists.

        Args:
            path: file of the saved state.
            parts: what is saved and loaded, by name.
            steps: number of steps in all.
            saving_steps: steps between two saved states; the last step is always saved.
        """
        self.path, self.parts, self.steps, self.saving_steps = path, parts, steps, saving_steps
        self.step = 0
        if path.exists():
            self._load()

    def run(self, update: Callable[[int], dict[str, Tensor]]) -> None:
        """Call `update` with the number of each remaining step; it returns the values to log, by name."""
        first, started = self.step, time.time()
        while self.step < self.steps:
            values = update(self.step)
            self.step += 1
            if self.step % LOGGING_STEPS == 0:
                told = " ".join(f"{name} {value.item():.4f}" for name, value in values.items())
                seconds = (time.time() - started) / (self.step - first)
                print(f"step {self.step}: {told} {seconds:.3f} s/step", flush=True)
            if self.step % self.saving_steps == 0 or self.step == self.steps:
                self._save()

    def _save(self) -> None:
        state = {name: part.state_dict() for name, part in self.parts.items()} | {"step": self.step}
        write_atomically(self.path, lambda aside: torch.save(state, aside))

    def _load(self) -> None:
        state = torch.load(self.path, map_location="cpu", weights_only=True)  # resumes on another device too
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.step = state["step"]
        print(f"resuming after step {self.step}")


def cosine_schedule(optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    """Return a schedule of the learning rate with a linear warm-up and a cosine to zero."""
    return get_scheduler("cosine", optimizer, num_warmup_steps=WARMUP_STEPS, num_training_steps=steps)


def autocast(device: torch.device, *, compiled: bool) -> torch.autocast:
    """Return a context in which networks compute in the precision that is fastest on the device."""
    precision, _ = choose_precision(device, compiled)
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def descend(network: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Update `network` by the gradient of `loss`, clipped to a norm of 1."""
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def train(
    network: nn.Module,
    loss: Callable[[nn.Module, int], Tensor],
    name: str,
    settings: Settings,
    *,
    saving_steps: int = 250,
) -> nn.Module:
    """Train a network with AdamW and a cosine schedule; return it in evaluation mode.

    Args:
        network: the network, trained in place.
        loss: returns the loss of the network at a step. Its samples must depend on the step's number alone.
        name: of the file with the saved state, from which a stopped training resumes.
        settings: how it is trained, and the file's folder.
        saving_steps: steps between two saved states.
    """
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.learning_rate, betas=BETAS, weight_decay=0.01)
    schedule = cosine_schedule(optimizer, settings.steps)
    parts = {"network": network, "optimizer": optimizer, "schedule": schedule}
    loop = Loop(settings.work_dir / name, parts, steps=settings.steps, saving_steps=saving_steps)
    device = next(network.parameters()).device

    def update(step: int) -> dict[str, Tensor]:
        with autocast(device, compiled=settings.torch_compile):
            value = loss(network, step)
        descend(network, optimizer, value)
        schedule.step()
        return {"loss": value}

    network.train()
    loop.run(update)
    return network.eval()
