"""Ask what compatibility costs: three ways to a robust autoencoder, and what each costs the diffusion model.

    python -m experiments.compatibility --quick        # make compatibility-quick
    python -m experiments.compatibility                # make compatibility

The ways are the method (the encoder alone, near the original), encoder and decoder together, and a training from random
weights with the attack in it. The first two take the same time; the last, which has no original to start from, takes three
times as long. The diffusion model is then used as it is, fine-tuned for some steps, or trained anew. Finished parts are
kept, so the command can be interrupted and repeated.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from experiments.adaptation import ADAPTED, ANEW, EDITED, GENERATED
from experiments.claims import ORIGINAL, Results, spread, trained_name
from experiments.figures import with_legend
from experiments.plan import SCENES, TRAINING_SCENES
from experiments.runner import WEIGHTS, Module, Runner, experiment_parser, machine
from miniature.scene_set import PAIR_SHARE
from srl_utils.evaluation.motion import TRAVEL
from srl_utils.evaluation.perturbations import ADAPTIVE, NO_THREAT
from srl_utils.evaluation.report.figures import STYLE, save
from srl_utils.evaluation.report.tables import markdown_table
from srl_utils.evaluation.tasks.base import DRIFT
from srl_utils.files import read_json, write_text_atomically
from srl_utils.vae.loading import WEIGHTS_NAME

ENCODER = "encoder"
FIDS = {GENERATED: "generated images", EDITED: "edits"}
AS_GOOD = 1.1
"""A diffusion model is as good as before if its FIDs are at most so many times those with the original."""


class Way(NamedTuple):
    """A way to a robust autoencoder."""

    steps: int
    flags: Sequence[object]
    """Of the training script for the encoder alone, else of `experiments.whole_training`."""
    clean_share: float = 0.0
    """Share of the steps before the attack begins."""
    taught_seeds: int = 1
    """Seeds whose latents a denoiser is taught; more where the answer is not plain at once."""


WAYS = {
    ENCODER: Way(600, ["--recipe", "fast"]),
    "encoder and decoder": Way(600, ["--vae", WEIGHTS / "vae"], taught_seeds=3),
    "from nothing": Way(2_300, ["--learning_rate", "2e-3"]),
    "from nothing, clean first": Way(3_000, ["--learning_rate", "2e-3"], clean_share=0.5),
}
"""By name. The first two take about 6 minutes of a core, and the others, which have no original to start from, 18."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The size of the experiments.

    Attributes:
        steps: share of each way's steps that is trained.
        seeds: trainings of each way.
        training_scenes: scenes to train the autoencoders on.
        images: scenes of the evaluation under attack.
        smoothed: scenes at which Lipschitz constants are measured.
        attack_steps: of APGD.
        adapted: numbers of steps with which the denoiser is fine-tuned.
        anew: numbers of steps with which one is trained anew, for the first seed.
        taught: scenes that the denoiser sees.
        generated: images that it generates.
        torch_compile: whether to compile the autoencoders' trainings.
    """

    steps: float
    seeds: int
    training_scenes: int
    images: int
    smoothed: int
    attack_steps: int
    adapted: Sequence[int]
    anew: Sequence[int]
    taught: int
    generated: int
    torch_compile: bool


FULL = Scale(
    steps=1, seeds=3, training_scenes=4000, images=24, smoothed=8, attack_steps=50,
    adapted=(0, 30, 100, 300), anew=(200, 600), taught=4000, generated=256, torch_compile=True,
)  # fmt: skip
QUICK = Scale(
    steps=0.01, seeds=1, training_scenes=64, images=4, smoothed=2, attack_steps=5, adapted=(0, 2), anew=(2,), taught=64,
    generated=8, torch_compile=False,
)  # fmt: skip


def main() -> None:
    """Train, evaluate, adapt, and write tables and the figure."""
    args = experiment_parser("compatibility", __doc__, quick=True).parse_args()
    scale = QUICK if args.quick else FULL
    names = [trained_name(way, seed) for way in WAYS for seed in range(scale.seeds)]
    taught = taught_autoencoders(scale)
    run = Runner(args.output_dir, WEIGHTS / "vae", title="compatibility", num_calls=len(names) + len(taught) + 4)
    run.scenes(TRAINING_SCENES, scale.training_scenes, seed=1, pair_share=PAIR_SHARE)  # as `scene_set` draws them
    run.scenes(SCENES, scale.images, seed=0)
    # A seed of every way comes before the next one, so that an interrupted run has something to compare.
    run.modules([training_of(run, way, seed, scale) for seed in range(scale.seeds) for way in WAYS])
    data = ["--data_dir", args.output_dir / SCENES, "--num_images"]
    run.evaluate("reconstruction", "reconstruction", names, [*data, scale.images, *reconstruction_flags(scale)])
    run.evaluate("smoothness", "geometry", names, [*data, scale.smoothed, "--parts", "smoothness"])
    run.modules([adaptation_to(run, name, scale) for name in taught])
    run.bar.close()
    keep_adaptation(run, taught)
    reconstruction, smoothness, adaptation = (
        Results.read(args.output_dir / name / "results.json") for name in ("reconstruction", "smoothness", "adaptation")
    )
    draw_price(reconstruction, adaptation, scale, args.output_dir / "compatibility.png")
    text = "\n\n".join([
        f"{machine()}, {date.today().isoformat()}, {run.minutes():.0f} minutes, parts that ran side by side added up. Scale: {scale}.",
        "## Autoencoders", autoencoders_table(reconstruction, smoothness, scale),
        "## The diffusion model", adaptation_table(adaptation, scale),
    ])  # fmt: skip
    write_text_atomically(args.output_dir / "compatibility.md", f"{text}\n")
    print(text)


def taught_autoencoders(scale: Scale) -> list[str]:
    """Return the names of the autoencoders whose latents a denoiser is taught: a seed of every way, then the next one."""
    by_seed = [(way, seed) for seed in range(scale.seeds) for way in WAYS if seed < WAYS[way].taught_seeds]
    return [ORIGINAL, *(trained_name(way, seed) for way, seed in by_seed)]


def training_of(run: Runner, way: str, seed: int, scale: Scale) -> Module:
    """Return the training of a way's seed: of the encoder alone, near the original, or of encoder and decoder."""
    name, steps = trained_name(way, seed), max(2, round(scale.steps * WAYS[way].steps))
    compiled = ["--torch_compile"] if scale.torch_compile else []
    flags = [*WAYS[way].flags, "--seed", seed, *compiled]
    if way == ENCODER:
        data = ["--train_data_dir", run.folder / TRAINING_SCENES, "--max_train_steps", steps]
        return run.training(name, [*data, *flags], num_validation=1)
    flags = [
        *flags, "--steps", steps, "--clean_steps", round(WAYS[way].clean_share * steps),
        "--num_scenes", scale.training_scenes, "--work_dir", run.folder / "taught", "--output_dir", run.vae(name),
    ]  # fmt: skip
    return Module(f"train {name}", "experiments.whole_training", flags, run.vae(name) / WEIGHTS_NAME)


def adaptation_to(run: Runner, name: str, scale: Scale) -> Module:
    """Return the teaching of the denoiser with an autoencoder's latents; one is trained anew for the first seed alone."""
    anew = scale.anew if name in (ORIGINAL, *WAYS) else ()
    folder = adaptation_folder(run, name)
    flags = [
        "--vae", run.vae(name), "--steps", *scale.adapted, "--steps_anew", *anew, "--num_scenes", scale.taught,
        "--num_images", scale.generated, "--work_dir", run.folder / "taught", "--output_dir", folder,
    ]  # fmt: skip
    last = f"{ANEW}-{anew[-1]}.json" if anew else f"{ADAPTED}-{scale.adapted[-1]}.json"
    return Module(f"adapt to {name}", "experiments.adaptation", flags, folder / last)


def adaptation_folder(run: Runner, name: str) -> Path:
    """Return the folder of what a denoiser taught an autoencoder's latents generates."""
    return run.folder / "denoisers" / run.vae(name).name


def keep_adaptation(run: Runner, names: Sequence[str]) -> None:
    """Write what the denoisers generate as results of `adaptation`."""
    rows = [
        {"vae": name, "attack": path.stem, "threat_model": NO_THREAT, "metric": metric, "value": value}
        for name in names
        for path in sorted(adaptation_folder(run, name).glob("*.json"))
        for metric, value in read_json(path).items()
    ]
    path = run.folder / "adaptation/results.json"
    path.parent.mkdir(exist_ok=True)
    write_text_atomically(path, json.dumps(rows, indent=1) + "\n")


def reconstruction_flags(scale: Scale) -> list[object]:
    """Return the flags of the reconstruction command."""
    attack = f"apgd-{scale.attack_steps}"
    return [
        "--attacks", "clean", attack, f"{attack}-latents", "--epsilons", "8/255", "--threat_models", ADAPTIVE, "--no_checks",
        "--metrics", "psnr", "rfid", DRIFT, TRAVEL, "--classifier", WEIGHTS / "classifier",
    ]  # fmt: skip


def autoencoders_table(reconstruction: Results, smoothness: Results, scale: Scale) -> str:
    """Return a line for each way: quality, robustness, drift, and Lipschitz constants."""
    attack, clean = f"apgd-{scale.attack_steps}", ("clean", NO_THREAT)
    columns = {
        "clean (dB)": (reconstruction, *clean, "psnr"),
        "FID": (reconstruction, *clean, "rfid"),
        "attacked (dB)": (reconstruction, attack, ADAPTIVE, "psnr"),
        "latents moved": (reconstruction, f"{attack}-latents", ADAPTIVE, TRAVEL),
        "drift": (reconstruction, *clean, DRIFT),
        "Lipschitz, encoder": (smoothness, *clean, "lipschitz-encoder"),
        "Lipschitz, both": (smoothness, *clean, "lipschitz-both"),
    }
    lines = [["way", *columns]]
    for way in (ORIGINAL, *WAYS):
        lines.append([way, *(spread(results.of(way, *setting)) for results, *setting in columns.values())])
    return markdown_table(lines)


def adaptation_table(adaptation: Results, scale: Scale) -> str:
    """Return a line for each way, start and kind of image: their FID by the steps of the denoiser."""
    steps = sorted({*scale.adapted, *scale.anew})
    lines = [["way", "denoiser", "FID of", *(f"{number} steps" for number in steps)]]
    for way, start, (metric, title) in product((ORIGINAL, *WAYS), (ADAPTED, ANEW), FIDS.items()):
        cells = [spread(adaptation.of(way, f"{start}-{number}", NO_THREAT, metric)) for number in steps]
        lines.append([way, start, title, *cells])
    return markdown_table(lines)


def steps_needed(adaptation: Results, way: str, scale: Scale) -> int | None:
    """Return the fewest steps of fine-tuning with which the denoiser generates and edits as well as before; None if none do."""
    before = [fid(adaptation, ORIGINAL, ADAPTED, 0, metric) for metric in FIDS]
    for steps in scale.adapted:
        now = [fid(adaptation, way, ADAPTED, steps, metric) for metric in FIDS]
        if all(value <= AS_GOOD * wanted for value, wanted in zip(now, before, strict=True)):
            return steps
    return None


def fid(adaptation: Results, way: str, start: str, steps: int, metric: str) -> float:
    """Return the mean FID of what a denoiser makes after some steps."""
    return fmean(adaptation.of(way, f"{start}-{steps}", NO_THREAT, metric))


def draw_price(reconstruction: Results, adaptation: Results, scale: Scale, path: Path) -> None:
    """Draw the FIDs against the denoiser's steps, and robustness against the steps that are needed."""
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(12, 4))
        *curves, price = figure.subplots(1, 1 + len(FIDS))
        for axes, (metric, title) in zip(curves, FIDS.items(), strict=True):
            axes.set(yscale="log", ylabel=f"FID of {title}", xlabel="steps of the denoiser (dashed: trained anew)")
            draw_adaptation(axes, adaptation, scale, metric)
        places = {steps: place for place, steps in enumerate([*scale.adapted, None])}
        for way in (ORIGINAL, *WAYS):
            attacked = fmean(reconstruction.of(way, f"apgd-{scale.attack_steps}", ADAPTIVE, "psnr"))
            price.plot(places[steps_needed(adaptation, way, scale)], attacked, "o", label=way)
        price.set(ylabel="PSNR under attack (dB)", xlabel="steps until the denoiser is as good as before")
        price.set_xticks(range(len(places)), [*(f"{steps:,}" for steps in scale.adapted), "more"])
        save(with_legend(figure), path)


def draw_adaptation(axes: Axes, adaptation: Results, scale: Scale, metric: str) -> None:
    """Draw an FID against the denoiser's steps: of one that is fine-tuned, and dashed of one that is trained anew."""
    for place, way in enumerate((ORIGINAL, *WAYS)):
        for start, numbers, line in ((ADAPTED, scale.adapted, "o-"), (ANEW, scale.anew, "o--")):
            values = [fid(adaptation, way, start, steps, metric) for steps in numbers]
            axes.plot(numbers, values, line, color=f"C{place}", label=way if start == ADAPTED else None)
    ticks = sorted({*scale.adapted, scale.anew[-1]})  # more would overlap
    axes.set_xscale("symlog", linthresh=10)
    axes.set_xticks(ticks, [f"{steps:,}" for steps in ticks])
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(ScalarFormatter())
    axes.xaxis.minorticks_off()


if __name__ == "__main__":
    main()
