"""Steadiness of clips."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from srl_utils.metrics.clips import flicker, warping_error
from srl_utils.metrics.losses import PerceptualDistance, ReconstructionLoss
from srl_utils.metrics.pixels import psnr, ssim


def panned(images, *, step: int, frames: int = 4) -> Tensor:
    """A view of 48 px that moves over a smooth picture by `step` pixels a frame: `[1,3,T,48,48]`."""
    rough = images(1, 16)
    picture = torch.nn.functional.interpolate(rough, size=(80, 80), mode="bicubic").clamp(-1, 1)
    return torch.stack([picture[..., 16:64, start : start + 48] for start in range(0, frames * step, step)], dim=2)


def test_flicker_counts_changes_that_the_clean_clip_lacks(images) -> None:
    """Oracle: closed form: an equal shift of all frames has none; one frame brighter by d changes two of three steps by
    d; a still clip has what the clean one moves."""
    clip = 0.5 * panned(images, step=2)
    assert flicker(clip + 0.1, clip).tolist() == pytest.approx([0.0], abs=1e-6)
    brighter = clip.clone()
    brighter[:, :, 1] += 0.2  # 0.1 of a [0,1] image
    assert flicker(brighter, clip).tolist() == pytest.approx([0.1 * 2 / 3], abs=1e-6)
    still = clip[:, :, :1].expand_as(clip)
    assert flicker(still, clip).item() == pytest.approx(clip.diff(dim=2).abs().mean().item() / 2, rel=1e-5)


def test_a_moving_picture_warps_onto_itself(images) -> None:
    """Oracle: invariance: the error of the clean clip under its own flow is far below that of a clip that stands still or
    of frames that flicker."""
    clip = 0.8 * panned(images, step=2)
    own = warping_error(clip, clip).item()
    still = warping_error(clip[:, :, :1].expand_as(clip), clip).item()
    signs = torch.tensor([0.1, -0.1, 0.1, -0.1]).view(1, 1, 4, 1, 1)
    flickering = warping_error(clip + signs, clip).item()
    assert own < 2e-4
    assert still > 5 * own
    assert flickering == pytest.approx(0.1**2, rel=0.05)  # frames differ by 0.2 in [-1,1], 0.1 in [0,1]


def test_clips_are_measured_one_by_one(images) -> None:
    """Oracle: invariance, each clip alone, and frames shuffled together with the clean ones' for PSNR and SSIM."""
    clips = torch.cat([panned(images, step=1), panned(images, step=3)])
    noisy = clips + 0.1 * torch.randn(clips.shape, generator=torch.Generator().manual_seed(0))
    for metric in (flicker, warping_error, psnr, ssim):
        alone = [metric(noisy[number : number + 1], clips[number : number + 1]).item() for number in range(2)]
        assert metric(noisy, clips).tolist() == pytest.approx(alone, rel=1e-5)
    for metric in (psnr, ssim):
        frames = [metric(noisy[:, :, time], clips[:, :, time]) for time in range(4)]
        torch.testing.assert_close(metric(noisy, clips), torch.stack(frames).mean(dim=0))


def test_the_loss_of_a_clip_is_the_mean_of_its_frames(images, random_lpips) -> None:
    """Oracle: the loss of each frame; a part of the target belongs to the same clips."""
    loss = ReconstructionLoss(PerceptualDistance(random_lpips), weight=0.5)
    clips = torch.stack([images(3, 32).transpose(0, 1), images(3, 32, seed=1).transpose(0, 1)])
    others = clips.flip(2)
    target = loss.target(clips)
    frames = [loss(others[:, :, time], loss.target(clips[:, :, time])) for time in range(3)]
    torch.testing.assert_close(loss(others, target), torch.stack(frames).mean(dim=0))
    torch.testing.assert_close(loss(others[1:], target.part(1, 2)), loss(others, target)[1:])
