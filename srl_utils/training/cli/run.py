"""A training run: what it works with, how far it is, and how it is validated."""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from diffusers.training_utils import EMAModel
from torch.optim.lr_scheduler import LambdaLR

from srl_utils.hub.publishing import Publisher
from srl_utils.images.datasets import TrainingData
from srl_utils.images.ledger import ImageLedger
from srl_utils.training.checkpoints import Checkpoints
from srl_utils.training.cli.arguments import PublishedCommand
from srl_utils.training.cli.planning import Plan
from srl_utils.training.journal import Journal
from srl_utils.training.overfitting import OverfittingGuard
from srl_utils.training.resuming import Settings
from srl_utils.training.step import Networks, Step
from srl_utils.training.validation import Validation, averaged_weights


@dataclass
class Progress:
    """How far a run is. A step whose gradient was not finite counts, since its images are used up."""

    step: int = 0
    samples: int = 0
    skipped: int = 0
    skipped_in_row: int = 0
    seconds: float = 0.0
    """Time in steps, without validation and checkpoints, over all sessions of the run."""
    first_steps: float = 0.0
    """Part of `seconds` in the first step of each session, which compiles the networks."""
    waiting: float = 0.0
    """Part of `seconds` spent waiting for images."""

    def state_dict(self) -> dict[str, float]:
        """Return the values for a checkpoint."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take the values of a checkpoint."""
        self.__dict__.update(state)


@dataclass(frozen=True)
class Run:
    """Everything that the training loop works with."""

    args: argparse.Namespace
    accelerator: Accelerator
    data: TrainingData
    plan: Plan
    method: Step
    optimizer: AcceleratedOptimizer
    scheduler: LambdaLR
    ema: EMAModel | None
    progress: Progress
    ledger: ImageLedger
    guard: OverfittingGuard
    checkpoints: Checkpoints
    journal: Journal
    validation: Validation
    publisher: Publisher | None
    settings: Settings
    command: PublishedCommand

    @property
    def networks(self) -> Networks:
        """The networks of the step."""
        return self.method.networks


@dataclass(frozen=True)
class Stop:
    """Why a run ends before its last step."""

    reason: str
    exit_code: int


def judged_weights(run: Run) -> AbstractContextManager[None]:
    """Put the averaged weights into the encoder inside the context, if the run keeps an average."""
    return averaged_weights(run.ema, run.networks.trained)


def validate(run: Run) -> dict[str, float]:
    """Measure the current weights, write the values down, warn of overfitting; return the values by name."""
    with judged_weights(run):
        values = run.validation.measure_progress(run.progress.step)
    run.journal.write(run.progress.step, values)
    warning = run.guard.judge(values[f"validation/{run.validation.attack.name}/psnr"])
    if warning is not None:
        run.accelerator.print(f"Warning, step {run.progress.step}: {warning}")
    return values
