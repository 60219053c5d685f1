"""Compare the times of one training step, ours and the textbook's, alternated in one run.

    python -m benchmarks.train_step                                    # the miniature VAE on this machine
    python -m benchmarks.train_step --model sd --resolution 256 --batch_size 8 --device cuda

Both run the same recipe on the same images. The full-size shapes have random weights, which do not change the time.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import lpips
import psutil
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from benchmarks.textbook import TextbookStep
from srl_utils.attacks.draws import image_generators
from srl_utils.attacks.gradient import PGDConfig
from srl_utils.command_line import Parser, exit_code, non_negative_float, non_negative_int, pixel_distance, positive_int
from srl_utils.evaluation.report.tables import markdown_table
from srl_utils.metrics.losses import PerceptualDistance, ReconstructionLoss
from srl_utils.resources import device_name, seconds_of
from srl_utils.training.arithmetic import step_arithmetic
from srl_utils.training.execution import can_compile, choose_execution
from srl_utils.training.step import Step, build_networks

MINIATURE = Path(__file__).parents[1] / "miniature/weights/vae"
FULL_SIZE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
}
"""Shape of the VAE of Stable Diffusion 1 and 2. SDXL's differs in the scale of its latents only."""
SHAPES = {
    "sd": {**FULL_SIZE, "sample_size": 512, "scaling_factor": 0.18215},
    "sdxl": {**FULL_SIZE, "sample_size": 1024, "scaling_factor": 0.13025},
}
TEXTBOOK, OURS = "textbook", "ours"
MATMUL_SIDE = {"cuda": 8192, "cpu": 1024}
CONV_SIDE = {"cuda": (16, 256, 128), "cpu": (8, 64, 64)}
"""Batch size, channels and side of the convolution whose speed is measured."""


@dataclass
class Timings:
    """Measurements of one kind of step: the first step's and the other steps' seconds, and the peak memory."""

    warm_up: float = 0.0
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    args = parse_args(arguments)
    device = torch.device(args.device)
    vae = build_vae(args)
    steps = {TEXTBOOK: textbook_step(args, vae), OURS: our_step(args, vae)}
    timings = {name: Timings() for name in steps}
    for name, step in steps.items():
        with measured(device, timings[name]):
            timings[name].warm_up = seconds_of(step, device)
    for _ in range(args.repeats):
        for name, step in steps.items():
            timings[name].seconds.append(seconds_of(step, device))
    report = summarise(args, vae, timings)
    print(json.dumps(report, indent=1) if args.json else table(report))
    return 0


# --- the two steps --------------------------------------------------------------------------------------


def build_vae(args: argparse.Namespace) -> AutoencoderKL:
    """Return the shipped miniature, or a full-size shape with random weights."""
    if args.model in SHAPES:
        torch.manual_seed(args.seed)
        return AutoencoderKL(**SHAPES[args.model]).to(args.device)
    return AutoencoderKL.from_pretrained(MINIATURE).to(args.device)


def draw_images(args: argparse.Namespace) -> Tensor:
    """Draw smooth random images `[N,3,R,R]` in [-1,1]; the time does not depend on their content."""
    noise = torch.randn(args.batch_size, 3, 8, 8, generator=torch.Generator().manual_seed(args.seed))
    return nn.functional.interpolate(noise, size=args.resolution, mode="bicubic").clamp(-1, 1).to(args.device)


def build_lpips(args: argparse.Namespace) -> lpips.LPIPS | None:
    """Return LPIPS with random weights, which need no download; None without an LPIPS term."""
    if args.lpips_weight == 0:
        return None
    return lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).to(args.device)


def attack_of(args: argparse.Namespace) -> PGDConfig:
    """Return the attack of both steps."""
    return PGDConfig(epsilon=args.epsilon, step_size=args.pgd_step_size, num_steps=args.pgd_steps)


def textbook_step(args: argparse.Namespace, vae: AutoencoderKL) -> Callable[[], Tensor]:
    """Return the textbook's step."""
    attack, clean = attack_of(args), draw_images(args)
    step = TextbookStep(
        copy.deepcopy(vae),
        build_lpips(args),
        epsilon=attack.radius,
        step_size=2 * attack.step_size,
        num_steps=attack.num_steps,
        lpips_weight=args.lpips_weight,
    )
    return lambda: step(clean, attack.start(clean, image_generators(args.seed, range(len(clean)))))


def our_step(args: argparse.Namespace, vae: AutoencoderKL) -> Callable[[], Tensor]:
    """Return the step of `train_srl_vae.py`, with its defaults for a long run on this device."""
    network = build_lpips(args)
    loss = ReconstructionLoss(PerceptualDistance(network) if network else None, weight=args.lpips_weight)
    execution = choose_execution(
        torch.device(args.device),
        precision=args.mixed_precision,
        torch_compile=args.torch_compile,
        force_upcast=True,
        flops=math.inf,
    )
    networks = build_networks(
        copy.deepcopy(vae),
        loss.to(args.device),
        autocast_dtype=execution.autocast_dtype,
        torch_compile=execution.torch_compile,
    )
    step = Step(networks=networks, pgd=attack_of(args), attack_batch_size=args.attack_batch_size)
    optimizer = torch.optim.AdamW(networks.encoder.parameters(), lr=1e-5, fused=True)
    images = draw_images(args)

    def update() -> Tensor:
        value, _ = step(images, image_generators(args.seed, range(len(images))))
        value.backward()
        nn.utils.clip_grad_norm_(networks.encoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return value.detach()

    return update


# --- measuring ------------------------------------------------------------------------------------------


@contextmanager
def measured(device: torch.device, timings: Timings) -> Iterator[None]:
    """Record the peak memory used within: the GPU allocator's, or the growth of the process on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        yield
        timings.peak_bytes = torch.cuda.max_memory_allocated()
        return
    process, done = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        timings.peak_bytes = peak - before


def peak_flops(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Return the operations per second of a square matrix product and of a 3x3 convolution on this machine."""
    side = MATMUL_SIDE[device.type]
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    batch, channels, width = CONV_SIDE[device.type]
    images = torch.randn(batch, channels, width, width, device=device, dtype=dtype).to(
        memory_format=torch.channels_last
    )
    layer = nn.Conv2d(channels, channels, 3, padding=1, device=device, dtype=dtype).to(
        memory_format=torch.channels_last
    )
    work = {
        "matmul": (lambda: matrix @ matrix, 2 * side**3),
        "conv": (lambda: layer(images), 2 * 9 * channels**2 * images[:, 0].numel()),
    }
    with torch.no_grad():
        return {name: flops / best_seconds(step, device) for name, (step, flops) in work.items()}


def best_seconds(work: Callable[[], object], device: torch.device, *, repeats: int = 20) -> float:
    """Return the least seconds that `work` takes."""
    return min(seconds_of(work, device) for _ in range(repeats + 3))


# --- the report -----------------------------------------------------------------------------------------


def summarise(args: argparse.Namespace, vae: AutoencoderKL, timings: dict[str, Timings]) -> dict[str, object]:
    """Return the report's figures by name."""
    device = torch.device(args.device)
    arithmetic = step_arithmetic(
        vae,
        resolution=args.resolution,
        pgd_steps=args.pgd_steps,
        lpips_net="vgg" if args.lpips_weight else None,
    )
    flops = arithmetic.image * args.batch_size
    ratios = [slow / fast for slow, fast in zip(timings[TEXTBOOK].seconds, timings[OURS].seconds, strict=True)]
    return {
        "device": device_name(device),
        "versions": f"torch {torch.__version__}, Python {platform.python_version()}",
        "recipe": {
            name: getattr(args, name)
            for name in ("model", "resolution", "batch_size", "pgd_steps", "lpips_weight", "attack_batch_size")
        },
        "TFLOP per step": flops / 1e12,
        "ratio": median(ratios),
        "steps": {
            name: {
                "seconds": median(timing.seconds),
                "images/s": args.batch_size / median(timing.seconds),
                "TFLOP/s": flops / median(timing.seconds) / 1e12,
                "first step, seconds": timing.warm_up,
                "peak memory, GB": timing.peak_bytes / 1e9,
            }
            for name, timing in timings.items()
        },
        "peak TFLOP/s": {
            str(dtype).removeprefix("torch."): {name: value / 1e12 for name, value in peak_flops(device, dtype).items()}
            for dtype in (torch.float32, torch.bfloat16)
        },
    }


def table(report: dict[str, object]) -> str:
    """Return the report as text with a Markdown table."""
    names = list(report["steps"][OURS])
    rows = [[name, *(f"{values[column]:.3f}" for column in names)] for name, values in report["steps"].items()]
    peaks = "; ".join(
        f"{dtype} {', '.join(f'{kind} {value:.2f}' for kind, value in values.items())}"
        for dtype, values in report["peak TFLOP/s"].items()
    )
    share = report["steps"][OURS]["TFLOP/s"] / report["peak TFLOP/s"]["bfloat16"]["matmul"]
    return "\n".join(
        [
            f"{report['device']}, {report['versions']}",
            f"{report['recipe']}",
            "",
            markdown_table([["step", *names], *rows]),
            "",
            f"Ours is {report['ratio']:.2f} times as fast (median of the steps' ratios).",
            f"A step is {report['TFLOP per step']:.4f} TFLOP. Peak TFLOP/s measured here: {peaks}.",
            f"Ours reaches {share:.0%} of the bfloat16 matrix product's.",
        ]
    )


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m benchmarks.train_step", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", choices=("miniature", *SHAPES), default="miniature")
    add("--resolution", type=positive_int, default=None, help="default: 64 for the miniature, else 256")
    add("--batch_size", type=positive_int, default=8)
    add("--pgd_steps", type=non_negative_int, default=10)
    add("--epsilon", type=pixel_distance, default=8 / 255)
    add("--pgd_step_size", type=pixel_distance, default=0.02)
    add("--lpips_weight", type=non_negative_float, default=0.0, help="above 0: with LPIPS-VGG with random weights")
    add("--attack_batch_size", type=positive_int, default=None)
    add("--mixed_precision", choices=("no", "bf16"), default=None, help="of our step; default: chosen for the device")
    add(
        "--torch_compile",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="of our step; default: on if possible",
    )
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--repeats", type=positive_int, default=10)
    add("--seed", type=non_negative_int, default=0)
    add("--json", action="store_true", help="print the figures as JSON")
    args = parser.parse_args(arguments)
    if args.torch_compile is None:
        args.torch_compile = can_compile(args.device)
    args.resolution = args.resolution or (64 if args.model == "miniature" else 256)
    return args


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
