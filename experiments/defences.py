"""Compare defences on the miniature world: rival objectives at equal time, purifiers, and chains of both.

    python -m experiments.defences --quick             # make defences-quick
    python -m experiments.defences                     # make defences

Trains the encoder with each objective, each as long as the others, and with other originality weights. The evaluation
attacks reconstructions and latents, and edits images protected on the original VAE (transfer) and on each defence itself
(adaptive). Finished parts are kept, so the command can be interrupted and repeated.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

from experiments.claims import ORIGINAL, Defence, Results, decibels_won_back, defence_of, percent, spread, trained_name
from experiments.defence_figures import draw_curves, draw_defences
from experiments.plan import EDITS, SCENES, TRAINING_SCENES, networks
from experiments.runner import BATCH, WEIGHTS, Runner, experiment_parser, machine
from srl_utils.evaluation.motion import TRAVEL
from srl_utils.evaluation.perturbations import ADAPTIVE, NO_THREAT, TRANSFER
from srl_utils.evaluation.report.tables import markdown_table
from srl_utils.evaluation.tasks.base import DRIFT
from srl_utils.files import read_json, write_text_atomically

INFERENCE_STEPS = 20


class Rival(NamedTuple):
    """A way of training."""

    flags: str
    steps: int
    """They take about the same time with every rival."""
    curve: bool = False
    """Whether it is trained with other originality weights as well."""


THREE_STEPS = "--recipe fast --pgd_steps 3 --pgd_step_size 4/255"
RIVALS = {
    "no attack": Rival("--recipe fast --pgd_steps 0", 390),
    "noise": Rival("--recipe fast --gaussian_noise 8/255", 390),
    "paper": Rival("--recipe paper --originality_units scaled --originality_weight 0.03", 58),
    "srl, one step": Rival("--recipe fast", 245),
    "srl": Rival(THREE_STEPS, 142, curve=True),
    "srl+feature": Rival("--recipe latent", 180, curve=True),
    "feature": Rival(f"{THREE_STEPS} --objective feature", 340, curve=True),
    "trades": Rival(f"{THREE_STEPS} --objective trades --latent_weight 0.3", 235, curve=True),
    "equivariance": Rival("--recipe fast --objective equivariance", 390, curve=True),
    "purify": Rival(f"{THREE_STEPS} --objective purify --latent_attack_share 0.5", 180, curve=True),
    "purify, LoRA": Rival(f"{THREE_STEPS} --objective purify --latent_attack_share 0.5 --lora_rank 16", 170),
}
"""Ways of training. Steps follow from the operations of a step."""
RECIPES_ALPHA = 0.03
"""The originality weight of the recipes."""
PROTECTIONS = ("photoguard-encoder", "mist-fused", "sds")
PURIFIERS = (
    "jpeg-75", "jpeg-30", "resize-0.5", "resize-0.5+jpeg-75", "jpeg-75+resize-0.5", "noise-0.05", "noise-0.1",
    "adverse-cleaner", "vae-loop", "img2img-0.1", "img2img-0.3",
)  # fmt: skip
SEEN_THROUGH = tuple(name for name in PURIFIERS if name != "adverse-cleaner")
"""Those before which adaptive attacks are made. Attacks on image-to-image know the VAE alone. Through AdverseCleaner's 68
filters, one takes minutes for 16 images."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The size of the experiments.

    Attributes:
        steps: share of each rival's steps that is trained.
        alphas: originality weights of the curves, beside that of the recipes.
        training_scenes: scenes to train on.
        generated: images of generation.
        judged: images of reconstruction and editing.
        attack_steps: steps of the attacks.
        seeds: trainings of each rival.
        adaptive_seeds: those of them whose edits are attacked adaptively.
    """

    steps: float
    alphas: Sequence[float]
    training_scenes: int
    generated: int
    judged: int
    attack_steps: int
    seeds: int
    adaptive_seeds: int


FULL = Scale(
    steps=1, alphas=(0.0, 0.3), training_scenes=1000, generated=32, judged=16, attack_steps=50, seeds=3, adaptive_seeds=1
)  # fmt: skip
QUICK = Scale(
    steps=0.05, alphas=(0.3,), training_scenes=200, generated=8, judged=4, attack_steps=10, seeds=1, adaptive_seeds=1
)  # fmt: skip


def main() -> None:
    """Train, evaluate, and write tables and figures."""
    args = experiment_parser("defences", __doc__, quick=True).parse_args()
    scale = QUICK if args.quick else FULL
    trainings = planned_trainings(scale, args.output_dir / TRAINING_SCENES)
    run = Runner(args.output_dir, WEIGHTS / "vae", title="defences", num_calls=2 + len(trainings) + 6)
    run.scenes(TRAINING_SCENES, scale.training_scenes, seed=1)
    run.scenes(SCENES, scale.generated, seed=0)
    run.modules([run.training(name, flags, num_validation=1) for name, flags in trainings.items()])
    data = ["--data_dir", args.output_dir / SCENES]
    compared = names_of_rivals(scale.seeds)
    run.evaluate("reconstruction", "reconstruction", list(trainings), [*data, *reconstruction_flags(scale)])
    run.evaluate("generation", "generation", compared, [*data, *generation_flags(scale)])
    run.evaluate("transfer", "editing", compared, [*data, *editing_flags(scale, [TRANSFER])])
    run.evaluate(
        "adaptive", "editing", names_of_rivals(scale.adaptive_seeds), [*data, *editing_flags(scale, [ADAPTIVE])]
    )
    best = best_rival(results_in(args.output_dir, "transfer"))
    for name, threat, purifiers in (
        ("purifiers", TRANSFER, PURIFIERS), ("adaptive-purifiers", ADAPTIVE, SEEN_THROUGH),
    ):  # fmt: skip
        flags = [*data, *editing_flags(scale, [threat]), "--purifiers", *purifiers]
        run.evaluate(name, "editing", [best], flags)
    run.bar.close()
    reconstruction, generation = (results_in(args.output_dir, name) for name in ("reconstruction", "generation"))
    edits = results_in(args.output_dir, "transfer", "adaptive", "purifiers", "adaptive-purifiers")
    defences = defences_of(edits, best)
    draw_defences(defences, args.output_dir / "defences.png")
    draw_curves(curves(reconstruction, scale), args.output_dir / "originality.png")
    text = "\n\n".join([
        f"{machine()}, {date.today().isoformat()}, {run.minutes():.0f} minutes, parts that ran side by side added up. Scale: {scale}.",
        "## Rivals at equal time", rivals_table(reconstruction, generation, scale, run),
        "## Edits", defences_table(defences, read_json(args.output_dir / "purifiers/timings.json")),
    ])  # fmt: skip
    write_text_atomically(args.output_dir / "defences.md", f"{text}\n")
    print(text)


def planned_trainings(scale: Scale, scenes: Path) -> dict[str, list[object]]:
    """Return the flags of all trainings by the name of the VAE: each rival's seeds, then the other originality weights.

    Args:
        scale: of the experiments.
        scenes: folder of the images to train on.
    """
    trainings: dict[str, list[object]] = {}
    for name, rival in RIVALS.items():
        steps = max(2, round(scale.steps * rival.steps))
        flags = ["--train_data_dir", scenes, *shlex.split(rival.flags), "--max_train_steps", steps]
        for seed in range(scale.seeds):
            trainings[trained_name(name, seed)] = [*flags, "--seed", seed]
        for alpha in scale.alphas if rival.curve else ():
            trainings[with_alpha(name, alpha)] = [*flags, "--originality_weight", alpha, "--seed", 0]
    return trainings


def names_of_rivals(seeds: int) -> list[str]:
    """Return the names of the rivals' VAEs of so many seeds each."""
    return [trained_name(rival, seed) for rival in RIVALS for seed in range(seeds)]


def with_alpha(rival: str, alpha: float) -> str:
    """Return the name of a rival's VAE with another originality weight."""
    return f"{rival}, alpha {alpha:g}"


def reconstruction_flags(scale: Scale) -> list[object]:
    """Return the flags of the reconstruction command."""
    attack = f"apgd-{scale.attack_steps}"
    return [
        "--num_images", scale.judged, "--attacks", "clean", attack, f"{attack}-latents", "--epsilons", "8/255",
        "--threat_models", ADAPTIVE, "--no_checks", "--metrics", "psnr", "rfid", DRIFT, TRAVEL, "--classifier",
        WEIGHTS / "classifier",
    ]  # fmt: skip


def generation_flags(scale: Scale) -> list[object]:
    """Return the flags of the generation command."""
    return [
        *networks(INFERENCE_STEPS), "--num_images", scale.generated, "--strengths", "0.5", "--batch_size", 8,
        "--metrics", "clip", "fid", "denoising-loss",
    ]  # fmt: skip


def editing_flags(scale: Scale, threats: Sequence[str]) -> list[object]:
    """Return the flags of the editing command."""
    return [
        *networks(INFERENCE_STEPS), *EDITS, "--num_images", scale.judged, "--strengths", "0.3", "0.6", "--edits",
        "img2img-0.3", "img2img-0.6", "--batch_size", 8,
        "--attacks", "clean", *PROTECTIONS, "--epsilons", "16/255", "--threat_models", *threats, "--max_attack_steps", scale.attack_steps,
        "--no_checks", "--metrics", "psnr", "clip", "clip-text", "fid",
    ]  # fmt: skip


def results_in(folder: Path, *names: str) -> Results:
    """Return the results of evaluations."""
    return Results.read(*(folder / name / "results.json" for name in names))


def best_rival(edits: Results) -> str:
    """Return the rival that wins back most of the edits of images protected on the original, mean of its seeds."""
    return max(RIVALS, key=lambda name: fmean(defence_of(edits, name, PROTECTIONS).mean_won(TRANSFER)))


def defences_of(edits: Results, best: str) -> dict[str, Defence]:
    """Return the rivals, the purifiers with the original, and those with the best rival, by their names in the results."""
    chains = [f"{vae} + {purifier}" for vae in (ORIGINAL, best) for purifier in PURIFIERS]
    return {name: defence_of(edits, name, PROTECTIONS) for name in (*RIVALS, *chains)}


def defences_table(defences: Mapping[str, Defence], timings: Mapping[str, Mapping[str, float]]) -> str:
    """Return a line for each defence: harm to edits of clean images, what is won back, and what it costs.

    Args:
        defences: by name.
        timings: seconds per image of the `purifiers` and of the `encoders`, which take equally long.
    """
    titles = ["FID of clean edits"]
    for threat in (TRANSFER, ADAPTIVE):
        titles += [f"{name}, {threat}" for name in (*PROTECTIONS, "mean")]
    lines = [["defence", *titles, "milliseconds per image"]]
    for name, defence in defences.items():
        _, _, purifier = name.partition(" + ")
        cost = timings["purifiers"].get(purifier, 0.0) + timings["encoders"][ORIGINAL]
        won = [
            spread(shares)
            for threat, by_name in defence.won.items()
            for shares in (*(by_name.get(each, []) for each in PROTECTIONS), defence.mean_won(threat))
        ]
        lines.append([name, spread(defence.harm), *won, f"{1000 * cost:.3g}"])
    return markdown_table(lines)


def rivals_table(reconstruction: Results, generation: Results, scale: Scale, run: Runner) -> str:
    """Return a line for each rival: quality, robustness, drift, the denoiser's loss, and seconds of all training steps."""
    attack, clean = f"apgd-{scale.attack_steps}", ("clean", NO_THREAT)
    columns = {
        "clean (dB)": (*clean, "psnr"),
        "FID": (*clean, "rfid"),
        "attacked (dB)": (attack, ADAPTIVE, "psnr"),
        "latents moved": (f"{attack}-latents", ADAPTIVE, TRAVEL),
        "drift": (*clean, DRIFT),
    }
    denoising, edits = ("clean, reconstructed", NO_THREAT, "denoising-loss"), ("clean, img2img-0.5", NO_THREAT, "fid")
    lines = [["rival", *columns, "won back (%)", "denoiser's loss", "FID of edits", "seconds"]]
    for name in (ORIGINAL, *RIVALS):
        vaes = [run.vae(trained_name(name, seed)) for seed in range(scale.seeds)] if name != ORIGINAL else []
        lines.append([
            name, *(spread(reconstruction.of(name, *column)) for column in columns.values()),
            spread(percent(decibels_won_back(reconstruction, name, attack))),
            *(spread(generation.of(name, *column)) for column in (denoising, edits)), spread([seconds_of_steps(vae) for vae in vaes]),
        ])  # fmt: skip
    return markdown_table(lines)


def seconds_of_steps(vae: Path) -> float:
    """Return the number of steps of a training times the median step's seconds, which other work disturbs little."""
    lines = (vae / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    seconds = [BATCH / row["images_per_second"] for row in map(json.loads, lines) if "images_per_second" in row]
    return len(seconds) * median(seconds)


def curves(results: Results, scale: Scale) -> dict[str, dict[float, tuple[float, float]]]:
    """Return drift and attacked PSNR in dB of each rival with each originality weight, the largest first.

    All are of the first seed.
    """
    attack, alphas = f"apgd-{scale.attack_steps}", sorted((RECIPES_ALPHA, *scale.alphas), reverse=True)

    def point(rival: str, alpha: float) -> tuple[float, float]:
        name = rival if alpha == RECIPES_ALPHA else with_alpha(rival, alpha)
        return results.values[name, "clean", NO_THREAT, DRIFT], results.values[name, attack, ADAPTIVE, "psnr"]

    return {name: {alpha: point(name, alpha) for alpha in alphas} for name, rival in RIVALS.items() if rival.curve}


if __name__ == "__main__":
    main()
