"""Listening to a run: values of each step, time, progress bar, reasons to stop."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass

from accelerate.utils import gather_object
from torch import Tensor

from srl_utils.command_line import message_of
from srl_utils.console import progress_bar
from srl_utils.errors import UserError
from srl_utils.images.loading import Batch
from srl_utils.training.cli.run import Progress, Run, Stop
from srl_utils.training.interruption import Interruption
from srl_utils.training.readback import Readback

MAX_SKIPPED_IN_ROW = 10
EXIT_NOT_FINITE = 4
OF_THE_UPDATE = ("gradient_norm", "interrupted", "bad_images")
"""Values that follow the terms of the loss, in this order: means over processes."""


@dataclass(frozen=True)
class StepFacts:
    """What the host knows about a step before the device has computed it."""

    step: int
    learning_rate: float
    seconds: float
    waited: float
    bad_images: list[str]


class Clock:
    """Adds the seconds of each step to the progress, without validation and checkpoints."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.first_step = progress, progress.step + 1
        self.restart()

    def restart(self) -> None:
        """Start timing the next step now."""
        self.started = time.perf_counter()

    def count_step(self, batches: Waiting) -> tuple[float, float]:
        """Return the seconds since the last call, and the part of them spent waiting for `batches`."""
        seconds, waited = time.perf_counter() - self.started, batches.take_seconds()
        self.restart()
        self.progress.seconds += seconds
        self.progress.waiting += waited
        if self.progress.step == self.first_step:
            self.progress.first_steps += seconds
        return seconds, waited


class Waiting:
    """An iterator that measures how long its caller waits for batches."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self.batches, self.seconds = batches, 0.0

    def __next__(self) -> Batch:
        started = time.perf_counter()
        batch = next(self.batches)
        self.seconds += time.perf_counter() - started
        return batch

    def take_seconds(self) -> float:
        """Return the seconds of waiting since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


class Listener:
    """Records the values of each step, and finds reasons to stop in them.

    Values are read back one step late, while the device computes the next step, so a run stops one step after the cause.
    """

    def __init__(self, run: Run, interruption: Interruption) -> None:
        self.run, self.interruption = run, interruption
        self.validation: dict[str, float] = {}
        """Values of the last validation, for the progress bar."""
        self.bar = progress_bar(
            run.plan.max_train_steps,
            desc="training",
            unit="step",
            initial=run.progress.step,
            disable=not run.accelerator.is_local_main_process,
        )
        self._readback: Readback[StepFacts] = Readback()

    def push(self, facts: StepFacts, values: Tensor, *, wait: bool) -> Stop | None:
        """Take the values of a step; return the first reason to stop in the values read back so far.

        Args:
            facts: what the host knows about the step.
            values: the terms of the loss, then `OF_THE_UPDATE`, as a vector on the device.
            wait: wait until the values of all steps are read back.
        """
        arrived = self._readback.push(facts, values)
        return self._first_reason(arrived + self._readback.drain() if wait else arrived)

    def drain(self) -> Stop | None:
        """Read back the remaining values and close the progress bar; return the first reason to stop in them."""
        reason = self._first_reason(self._readback.drain())
        self.bar.close()
        return reason

    def _first_reason(self, arrived: list[tuple[StepFacts, list[float]]]) -> Stop | None:
        names = (*self.run.method.terms, *OF_THE_UPDATE)
        reasons = [self._hear(facts, dict(zip(names, numbers, strict=True))) for facts, numbers in arrived]
        return next((reason for reason in reasons if reason is not None), None)

    def _hear(self, facts: StepFacts, values: dict[str, float]) -> Stop | None:
        run, progress = self.run, self.run.progress
        interrupted, bad_images = values.pop("interrupted") > 0, values.pop("bad_images") > 0
        if bad_images:
            run.ledger.add(gather_object(facts.bad_images))
        finite = math.isfinite(values["gradient_norm"])
        progress.skipped += not finite
        progress.skipped_in_row = 0 if finite else progress.skipped_in_row + 1
        if finite and "attacked_psnr" in values:
            run.guard.count(values["attacked_psnr"])
        values |= {
            "learning_rate": facts.learning_rate,
            "skipped_steps": progress.skipped,
            "images_per_second": run.plan.samples_per_step / facts.seconds,
            "data_wait": facts.waited / facts.seconds,
        }
        run.journal.write(facts.step, values)
        self.bar.set_postfix_str(postfix(values, self.validation), refresh=False)
        self.bar.update()
        return reason_to_stop(run, facts.step, self.interruption if interrupted else None)


def postfix(values: dict[str, float], validation: dict[str, float]) -> str:
    """Return the text of the progress bar: loss terms, PSNR under attack, validation PSNR, speed."""
    shown = ("loss", "mse", "lpips", "originality", "latent")
    parts = [f"{name} {values[name]:.4f}" for name in shown if name in values]
    if "attacked_psnr" in values:
        parts.append(f"attacked {values['attacked_psnr']:.2f} dB")
    measured = [f"{name.split('/')[1]} {value:.2f}" for name, value in validation.items() if name.endswith("psnr")]
    if measured:
        parts.append(f"validation {', '.join(measured)} dB")
    return ", ".join([*parts, f"{values['images_per_second']:.1f} img/s"])


def reason_to_stop(run: Run, step: int, interruption: Interruption | None) -> Stop | None:
    """Return why the run should stop after the values of `step`, or None."""
    progress = run.progress
    try:
        run.ledger.check(run.args.max_bad_images)
    except UserError as error:
        return Stop(message_of(error), error.exit_code)
    if progress.skipped_in_row >= MAX_SKIPPED_IN_ROW:
        first = step - progress.skipped_in_row + 1
        reason = f"the gradient has not been finite since step {first} ({progress.skipped} steps skipped in all)"
        return Stop(f"{reason}; a lower --learning_rate or --mixed_precision no may help", EXIT_NOT_FINITE)
    if interruption is not None:
        number = interruption.signal or signal.SIGTERM  # None where only another process got the signal
        return Stop(f"stopped by {signal.Signals(number).name} at step {progress.step}", 128 + number)
    return None
