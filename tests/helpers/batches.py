"""The first batches of a training's data."""

from __future__ import annotations

from itertools import islice

import torch
from torch import Tensor

from srl_utils.images.datasets import TrainingData
from srl_utils.images.loading import Batch, training_batches


def first_batches(data: TrainingData, number: int, **layout) -> list[Batch]:
    return list(islice(training_batches(data, **({"batch_size": 4} | layout)), number))


def joined(batches: list[Batch]) -> tuple[list[int], Tensor]:
    positions = [position for batch in batches for position in batch.positions]
    return positions, torch.cat([batch.images for batch in batches])
