"""Compute how steady clips are in time, one value per clip; the clean clip says what should move."""

from __future__ import annotations

import numpy as np
import torch
from skimage.registration import optical_flow_ilk
from skimage.transform import warp
from torch import Tensor

from srl_utils.images.pixels import to_unit_range

WARPING, FLICKER = "warping-error", "flicker"
CLIP_METRICS = (WARPING, FLICKER)
FOLLOWED = 0.05
"""Largest difference, in units of a [0,1] image, by which a clean pixel may miss the place that the flow carries it to.
Pixels beyond it are hidden, enter the frame, or move otherwise than the flow says."""


def flicker(clips: Tensor, reference: Tensor) -> Tensor:
    """Return how much more or less clips change from frame to frame than the clean ones, `[N]`, in units of a [0,1] image.

    This is the mean of |(x' - x) - (r' - r)|, with x' the frame after x: 0 if a clip differs from the clean one by the
    same in all frames.

    Args:
        clips: `[N,3,T,H,W]` in [-1,1], T at least 2.
        reference: the clean clips.
    """
    changes, wanted = (_unit(each).diff(dim=2) for each in (clips, reference))
    return (changes - wanted).abs().flatten(1).mean(dim=1)


def warping_error(clips: Tensor, reference: Tensor) -> Tensor:
    """Return the mean squared difference of each frame from the next one, moved back along the clean flow, `[N]`.

    Source: Lai et al., "Learning Blind Video Temporal Consistency", ECCV 2018, section 4.2. The flow is that of the
    clean clip, by the iterative Lucas-Kanade method of scikit-image. It counts where it carries clean pixels to their like
    (`FOLLOWED`), in place of the paper's masks of occlusions.

    Args:
        clips: `[N,3,T,H,W]` in [-1,1], T at least 2.
        reference: the clean clips.
    """
    errors = [_clip_error(*pair) for pair in zip(_frames(clips), _frames(reference), strict=True)]
    return torch.tensor(errors, device=clips.device)


def _clip_error(frames: np.ndarray, clean: np.ndarray) -> float:
    """Return the error of one clip, `[T,H,W,3]` in [0,1], over all pairs of frames."""
    total = counted = 0.0
    for now, after, clean_now, clean_after in zip(frames, frames[1:], clean, clean[1:], strict=False):
        places = _followed_places(clean_now, clean_after)
        kept = np.abs(_moved(clean_after, places) - clean_now).max(axis=2) <= FOLLOWED
        total += np.square(_moved(after, places) - now).mean(axis=2)[kept].sum()
        counted += kept.sum()
    return float(total / max(counted, 1.0))


def _followed_places(now: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Return where in the next frame each pixel of a frame is: rows and columns, `[2,H,W]`."""
    rows, columns = optical_flow_ilk(now.mean(axis=2), after.mean(axis=2), radius=5)
    height, width = rows.shape
    grid = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    return np.stack([grid[0] + rows, grid[1] + columns])


def _moved(frame: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Return a frame `[H,W,3]` read at the places `[2,H,W]`."""
    channels = [warp(frame[..., channel], places, mode="edge") for channel in range(frame.shape[2])]
    return np.stack(channels, axis=2)


def _frames(clips: Tensor) -> np.ndarray:
    """Return clips as arrays `[N,T,H,W,3]` in [0,1]."""
    return _unit(clips).permute(0, 2, 3, 4, 1).cpu().numpy()


def _unit(clips: Tensor) -> Tensor:
    return to_unit_range(clips.detach().to(torch.float32)).clamp(0, 1)
