"""A training that can be stopped at any step and goes on with the batch it would have seen next."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from srl_utils.files import write_atomically

WARMUP_STEPS = 200


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a network is trained."""

    work_dir: Path
    """Keeps the state that a stopped training goes on from."""
    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    device: str
    torch_compile: bool

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, compiled if that is wanted."""
        return torch.compile(function) if self.torch_compile else function


@dataclass(eq=False)
class Training:
    """AdamW in bf16 autocast, with a cosine to zero.

    Attributes:
        loss: of the network and a step's number; whatever it draws must follow from that number alone.
    """

    network: nn.Module
    loss: Callable[[nn.Module, int], Tensor]
    path: Path
    steps: int
    learning_rate: float
    saving_steps: int = 250
    step: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.network.parameters(), betas=(0.9, 0.99), weight_decay=0.01)

    def run(self) -> nn.Module:
        """The network after all steps; goes on from `path` where it exists."""
        self._load()
        first, started = self.step, time.time()
        self.network.train()
        while self.step < self.steps:
            loss = self._update()
            if self.step % 100 == 0:
                seconds = (time.time() - started) / (self.step - first)
                print(f"step {self.step}: loss {loss.item():.4f} {seconds:.3f} s/step", flush=True)
            if self.step % self.saving_steps == 0 or self.step == self.steps:
                self._save()
        return self.network.eval()

    def _update(self) -> Tensor:
        cosine = 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
        self.optimizer.param_groups[0]["lr"] = self.learning_rate * min((self.step + 1) / WARMUP_STEPS, cosine)
        device = next(self.network.parameters()).device
        with torch.autocast(device.type, torch.bfloat16):
            loss = self.loss(self.network, self.step)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return loss

    def _save(self) -> None:
        state = {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }
        write_atomically(self.path, lambda aside: torch.save(state, aside))

    def _load(self) -> None:
        if not self.path.exists():
            return
        state = torch.load(self.path, weights_only=True)
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        print(f"continuing after step {self.step}")
