"""Measure a miniature autoencoder: its reconstruction of unseen images, clean and attacked, and its latents' scale.

python -m miniature.measure                              # the shipped weights, on embedded images
python -m miniature.measure --photographs FOLDER         # also on 64 px centre crops of your photographs
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ModelMixin
from PIL import Image
from torch import Tensor

from miniature.scenes import draw_dead_leaves, draw_scene
from srl_utils.attacks.draws import image_generators
from srl_utils.attacks.protections import PROTECTIONS, Victim, protect
from srl_utils.evaluation import cells
from srl_utils.evaluation.motion import FLIPS, SHARE, USE, codebook_use, motion
from srl_utils.evaluation.perturbations import CLEAN, noise, strong_attack
from srl_utils.evaluation.report.tables import markdown_table
from srl_utils.evaluation.results import Row, to_rows
from srl_utils.evaluation.tasks.base import Metrics, Reconstruction
from srl_utils.images.decoding import decode_rgb
from srl_utils.images.photographs import photograph_tiles
from srl_utils.images.pixels import from_pil
from srl_utils.vae.codec import Codec
from srl_utils.vae.loading import AutoencoderSource, load_autoencoder

SIZE = 64
EPSILON = 8 / 255
UNSEEN_SEED = 10_000  # the build draws from seed 0
NUM_IMAGES = 32
PULL_EPSILON, PULL_STEPS = 16 / 255, 100
"""Budget and steps of the targeted attack on the latents."""


@dataclass(frozen=True)
class Measurement:
    """What was measured on a set of images.

    Attributes:
        rows: of their reconstruction.
        share: of the way to other latents that theirs went.
        use: share of the codes that they use; None for continuous latents.
    """

    rows: list[Row]
    share: float
    use: float | None

    def to_json(self) -> dict[str, object]:
        """Return the content of `measured.json` for these images."""
        used = {} if self.use is None else {USE: self.use}
        return {"rows": [row.to_json() for row in self.rows], SHARE: self.share} | used


def measure_scaling_factor(vae: AutoencoderKL) -> float:
    """Return 1 / standard deviation of the latents of scenes, dead leaves and training photographs."""
    images = torch.cat([scenes(UNSEEN_SEED, 128), dead_leaves(UNSEEN_SEED, 128), tiles("train", limit=128)]).to(
        vae.device
    )
    with torch.no_grad():
        latents = torch.cat([vae.encode(batch).latent_dist.mean for batch in images.split(32)])
    return round(1 / latents.std().item(), 5)


def measure(vae: ModelMixin, extra: dict[str, Tensor] | None = None) -> dict[str, Measurement]:
    """Measure each set of unseen images: clean, with noise, under the strong attack, and pulled to another image.

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
    return {
        name: Measurement(
            reconstruction_rows(codec, images, name), latent_share(codec, images), codebook_use(codec, images, 32)
        )
        for name, images in sets.items()
    }


def reconstruction_rows(codec: Codec, images: Tensor, title: str) -> list[Row]:
    """Return PSNR, SSIM and changed tokens of reconstructions: clean, with noise, and under the strong attack."""
    task = Reconstruction(metrics=Metrics(names=["psnr", "ssim", FLIPS]), baseline=codec, images=images)
    perturbations = [CLEAN, noise(EPSILON), strong_attack(EPSILON)]
    numbers = range(len(images))
    return to_rows(
        cells.measure([codec], perturbations, task, images, numbers=numbers, seed=0, batch_size=32, title=title)
    )


def latent_share(codec: Codec, images: Tensor) -> float:
    """Return the share of the way to another image's latents that Nightshade goes, in the mean."""
    targets = images.roll(1, dims=0)
    protected = protect(
        PROTECTIONS["nightshade"], Victim.of(codec), images, target=targets, epsilon=PULL_EPSILON,
        num_steps=PULL_STEPS, generators=image_generators(0, range(len(images))),
    )  # fmt: skip
    with torch.no_grad():
        return (
            motion(codec, images, protected, unit=1.0, wanted=[SHARE], goal=codec.encode(targets))[SHARE].mean().item()
        )


def as_saved(vae: ModelMixin) -> ModelMixin:
    """Return a trained autoencoder as it loads from its file: rounded to float16, and in contiguous memory."""
    return vae.to(memory_format=torch.contiguous_format).eval().half().float()


def save(vae: ModelMixin, args: argparse.Namespace, *, about: str, settings: Sequence[str]) -> None:
    """Write the weights in float16, `measured.json`, and a README with its table into `args.output_dir`.

    Args:
        vae: the autoencoder, from `as_saved`.
        args: settings of the training, and the folder.
        about: the README's text on shape and training, with `{parameters}` and `{build}`.
        settings: names of the settings that the README tells.
    """
    folder: Path = args.output_dir
    build = {name: getattr(args, name) for name in settings}
    vae.half().save_pretrained(folder)
    results = measure(vae.float())
    content = {"build": build, "results": {name: measured.to_json() for name, measured in results.items()}}
    (folder / "measured.json").write_text(json.dumps(content, indent=1) + "\n")
    parameters = sum(parameter.numel() for parameter in vae.parameters())
    told = about.format(
        parameters=f"{parameters / 1e6:.2f}", build=", ".join(f"{key} {value}" for key, value in build.items())
    )
    (folder / "README.md").write_text(README.format(about=told, table=table(results)))


def table(results: dict[str, Measurement]) -> str:
    """Return a Markdown table with one line per set of images: PSNR in dB, the share of the way, and tokens."""
    attacks = list(dict.fromkeys(row.attack for measured in results.values() for row in measured.rows))
    discrete = any(measured.use is not None for measured in results.values())
    titles = ["tokens changed", "codes used"] if discrete else []
    lines = [["images (64 px)", *(f"{attack} (dB)" for attack in attacks), "latents pulled", *titles]]
    for name, measured in results.items():
        values = {(row.metric, row.attack): row.value for row in measured.rows}
        line = [name, *(f"{values['psnr', attack]:.2f}" for attack in attacks), f"{measured.share:.0%}"]
        tokens = [f"{values[FLIPS, attacks[-1]]:.0%}", f"{measured.use:.0%}"] if measured.use is not None else []
        lines.append(line + tokens)
    return markdown_table(lines)


README = """{about}
Another build gives a similar autoencoder with other bits: compiled code and another number of threads round differently.

The table has the PSNR in dB on unseen images, by `python -m miniature.measure`. `pgd-50x2` is PGD on the mean squared
error with 50 steps, 2 restarts and epsilon 8/255. The noise has standard deviation 8/255. "Latents pulled" says how far
Nightshade, with epsilon 16/255 and 100 steps, pulls the latents towards those of another image. "Tokens changed" is what
`pgd-50x2` does to discrete latents.

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
    print(table(measure(load_autoencoder(AutoencoderSource(pretrained_model_name_or_path=arguments.vae)), photographs)))
