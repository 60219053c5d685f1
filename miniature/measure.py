"""Measure a miniature autoencoder: its reconstruction of unseen images, clean and attacked, and its latents' scale.

python -m miniature.measure                              # the shipped weights, on embedded images
python -m miniature.measure --photographs FOLDER         # also on 64 px centre crops of your photographs
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from miniature.scenes import draw_dead_leaves, draw_scene
from srl_utils.evaluation import cells
from srl_utils.evaluation.perturbations import CLEAN, noise, strong_attack
from srl_utils.evaluation.report.tables import markdown_table
from srl_utils.evaluation.results import Row, to_rows
from srl_utils.evaluation.tasks.base import Metrics, Reconstruction
from srl_utils.images.decoding import decode_rgb
from srl_utils.images.photographs import photograph_tiles
from srl_utils.images.pixels import from_pil
from srl_utils.vae.codec import Codec

SIZE = 64
EPSILON = 8 / 255
UNSEEN_SEED = 10_000  # the build draws from seed 0
NUM_IMAGES = 32


def measure_scaling_factor(vae: AutoencoderKL) -> float:
    """Return 1 / standard deviation of the latents of scenes, dead leaves and training photographs."""
    images = torch.cat([scenes(UNSEEN_SEED, 128), dead_leaves(UNSEEN_SEED, 128), tiles("train", limit=128)]).to(
        vae.device
    )
    with torch.no_grad():
        latents = torch.cat([vae.encode(batch).latent_dist.mean for batch in images.split(32)])
    return round(1 / latents.std().item(), 5)


def measure(vae: AutoencoderKL, extra: dict[str, Tensor] | None = None) -> dict[str, list[Row]]:
    """Return the result rows of each set of unseen images: clean, with noise, and under the strong attack.

    Args:
        vae: the autoencoder.
        extra: more sets of images `[N,3,H,W]` in [-1,1], by name.
    """
    codec = Codec.of(vae, "miniature")
    sets = {
        "held-out scikit-image photographs": tiles("validation", limit=NUM_IMAGES),
        "scenes": scenes(UNSEEN_SEED + 1, NUM_IMAGES),
        "dead leaves": dead_leaves(UNSEEN_SEED + 1, NUM_IMAGES),
        **(extra or {}),
    }
    perturbations = [CLEAN, noise(EPSILON), strong_attack(EPSILON)]
    return {
        name: to_rows(
            cells.measure(
                [codec], perturbations, reconstruction(codec, images), images, numbers=range(len(images)), seed=0,
                batch_size=32, title=name,
            )
        )
        for name, images in sets.items()
    }  # fmt: skip


def reconstruction(codec: Codec, images: Tensor) -> Reconstruction:
    """Return the task of reconstructing `images`, measured by PSNR and SSIM."""
    return Reconstruction(metrics=Metrics(names=["psnr", "ssim"]), baseline=codec, images=images)


def write_measurements(vae: AutoencoderKL, folder: Path, *, build: dict[str, object]) -> None:
    """Write `measured.json` and a README with its table into the weights' folder; `build` are the build's settings."""
    results = measure(vae)
    content = {
        "build": build,
        "scaling_factor": vae.config.scaling_factor,
        "results": {name: [row.to_json() for row in rows] for name, rows in results.items()},
    }
    (folder / "measured.json").write_text(json.dumps(content, indent=1) + "\n")
    parameters = sum(parameter.numel() for parameter in vae.parameters())
    (folder / "README.md").write_text(
        README.format(
            parameters=f"{parameters / 1e6:.2f}",
            scaling_factor=vae.config.scaling_factor,
            build=", ".join(f"{key} {value}" for key, value in build.items()),
            table=table(results),
        )
    )


def table(results: dict[str, list[Row]]) -> str:
    """Return the PSNR in dB as a Markdown table with one line per set of images."""
    attacks = list(dict.fromkeys(row.attack for rows in results.values() for row in rows))
    lines = [["images (64 px)", *attacks]]
    for name, rows in results.items():
        psnr = {row.attack: row.value for row in rows if row.metric == "psnr"}
        lines.append([name, *(f"{psnr[attack]:.2f}" for attack in attacks)])
    return markdown_table(lines)


README = """# The miniature autoencoder

A `diffusers.AutoencoderKL` of {parameters} million parameters for images of 64 px (or another multiple of 4).

`make miniature` trained it on drawn scenes, dead leaves and augmented crops of scikit-image's training photographs, and
on no other photographs; `srl_utils/images/photographs.py` lists them. It was trained for the pixels alone, then against
a patch discriminator too. Settings: {build}.

Another build gives a similar autoencoder with other bits: compiled code and another number of threads round differently.

`scaling_factor` {scaling_factor} is the measured 1 / standard deviation of its latents.

The table has the PSNR in dB on unseen images, by `python -m miniature.measure`. The attack is PGD on the mean squared
error with 50 steps, 2 restarts and epsilon 8/255. The noise has standard deviation 8/255.

{table}
"""


def scenes(seed: int, count: int) -> Tensor:
    """Draw the first `count` scenes of a series, `[N,3,SIZE,SIZE]` in [-1,1]."""
    return _stack(draw_scene(seed, index, size=SIZE).image for index in range(count))


def dead_leaves(seed: int, count: int) -> Tensor:
    """Draw the first `count` dead-leaves images of a series, `[N,3,SIZE,SIZE]` in [-1,1]."""
    return _stack(draw_dead_leaves(seed, index, size=SIZE) for index in range(count))


def tiles(split: str, *, limit: int) -> Tensor:
    """Return `limit` tiles, spread evenly over the photographs of `split`, `[N,3,SIZE,SIZE]` in [-1,1]."""
    everything = photograph_tiles(split, side=SIZE)
    picks = torch.linspace(0, len(everything) - 1, min(limit, len(everything))).long()
    return _stack(everything[pick] for pick in picks)


def center_crops(folder: Path, *, limit: int) -> Tensor:
    """Return the central 64 px, at full resolution, of the first `limit` images of `folder`, `[N,3,SIZE,SIZE]`."""
    crops = []
    for path in sorted(folder.iterdir())[:limit]:
        image = decode_rgb(path)
        left, top = (image.width - SIZE) // 2, (image.height - SIZE) // 2
        crops.append(image.crop((left, top, left + SIZE, top + SIZE)))
    return _stack(crops)


def _stack(images: Sequence[Image.Image]) -> Tensor:
    return torch.stack([from_pil(image) for image in images])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vae", default="miniature/weights/vae")
    parser.add_argument("--photographs", type=Path, help="a folder of photographs of at least 64 px")
    arguments = parser.parse_args()
    photographs = arguments.photographs and {"your photographs": center_crops(arguments.photographs, limit=100)}
    print(table(measure(AutoencoderKL.from_pretrained(arguments.vae), photographs)))
