"""Run every experiment of the SRL-VAE paper (arXiv 2504.17219) on the miniature world, and write one report.

    python -m experiments.paper --quick                # make paper-quick
    python -m experiments.paper                        # make paper

The command trains the variants of the ablations and the controls, evaluates them (reconstruction, generation, editing,
poisoning, geometry and unseen data), and judges each claim of the paper; `experiments/plan.py` lists them. Finished
trainings and evaluations are kept, so the command can be interrupted and repeated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path

from experiments.claims import (
    CONTROL,
    ORIGINAL,
    ROBUST,
    Claim,
    Results,
    closeness_claim,
    compared,
    decibels_won_back,
    edits_claims,
    percent,
    poison_claim,
    spread,
    trained_name,
    verdict_table,
)
from experiments.example import draw_example
from experiments.figures import draw_all
from experiments.plan import (
    BETWEEN_SEEDS,
    CHEAP_ATTACKS,
    COSTLY_ATTACK,
    COSTLY_EDITING,
    FULL,
    GEOMETRY,
    LEAVES,
    PARTS,
    QUICK,
    SCENES,
    TRAINING_SCENES,
    UNSEEN,
    UNSEEN_SETS,
    VARIANTS,
    Evaluation,
    Scale,
    evaluations,
    training_flags,
)
from experiments.runner import WEIGHTS, Runner, experiment_parser, machine
from experiments.surfaces import draw_loss_surfaces
from srl_utils.evaluation.perturbations import ADAPTIVE, CLEAN, NO_THREAT
from srl_utils.evaluation.report.tables import markdown_table
from srl_utils.files import write_text_atomically


def main() -> None:
    """Run all experiments."""
    parser = experiment_parser("paper", __doc__, quick=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    scale = QUICK if args.quick else FULL
    planned = evaluations(scale, args.output_dir)
    trainings = [(name, seed) for name, variant in VARIANTS.items() for seed in range(min(scale.seeds, variant.seeds))]
    run = Runner(
        args.output_dir, WEIGHTS / "vae", title="paper", num_calls=3 + len(trainings) + len(planned)
    )  # fmt: skip
    run.scenes(TRAINING_SCENES, scale.training_scenes, seed=1)
    run.scenes(SCENES, max(scale.images, scale.poisoned_set), seed=0)
    run.leaves(LEAVES, scale.unseen, seed=0)
    run.modules([
        run.training(trained_name(name, seed), training_flags(name, scale, args.output_dir, seed=seed))
        for name, seed in trainings
    ])  # fmt: skip
    shared = ["--data_dir", args.output_dir / SCENES, "--seed", args.seed]
    for each in planned:
        run.evaluate(each.name, each.command, each.vaes, [*shared, *each.flags], baseline=each.baseline)
    run.bar.close()
    results = results_by_part(planned, args.output_dir)
    apgd = f"apgd-{scale.attack_steps}"
    edits = dict.fromkeys((*CHEAP_ATTACKS, apgd), results["editing"]) | {COSTLY_ATTACK: results[COSTLY_EDITING]}
    poisons = {f"nightshade-{number}": number for number in scale.poisons if number}
    claims = judged(results, apgd=apgd, edits=edits, poison=list(poisons)[-1])
    draw_all(results, args.output_dir / "figures", attack=apgd, edits=edits, poisons=poisons)
    draw_example(args.output_dir / SCENES, run.vae(ROBUST), args.output_dir / "figures/example.png")
    seen = [ORIGINAL, *next(each.vaes for each in planned if each.name == GEOMETRY)]
    draw_loss_surfaces(
        args.output_dir / GEOMETRY,
        {ORIGINAL: 0, "control": seen.index(CONTROL), ROBUST: seen.index(ROBUST)},
        args.output_dir / "figures/surface.png",
    )  # fmt: skip
    text = report(results, claims, scale, seed=args.seed, minutes=run.minutes())
    write_text_atomically(args.output_dir / "paper.md", text)
    print(f"Report: {args.output_dir / 'paper.md'}")


def results_by_part(planned: Sequence[Evaluation], folder: Path) -> dict[str, Results]:
    """Return the results of all evaluations, those of one part together."""
    places: dict[str, list[Path]] = {}
    for evaluation in planned:
        places.setdefault(evaluation.part, []).append(folder / evaluation.name / "results.json")
    return {part: Results.read(*paths) for part, paths in places.items()}


def judged(results: Mapping[str, Results], *, apgd: str, edits: Mapping[str, Results], poison: str) -> list[Claim]:
    """Return the paper's claims with their verdicts.

    Args:
        results: by part of the report.
        apgd: name of the attack on the reconstruction.
        edits: results of the edits, by attack.
        poison: name of the poisons in their largest number.
    """
    reconstruction, generation = results["reconstruction"], results["generation"]
    image_to_image = ("clean, img2img-0.6", NO_THREAT, "fid")
    return [
        compared("Clean images are reconstructed better.", "PSNR (dB)", reconstruction, ("clean", NO_THREAT, "psnr"),
                 higher=True),
        compared("Attacked images too.", "PSNR (dB)", reconstruction, (apgd, ADAPTIVE, "psnr"), higher=True),
        compared("The unchanged diffusion model generates better.", "FID", generation, image_to_image, higher=False),
        *([closeness_claim(results["editing"], results[BETWEEN_SEEDS])] if BETWEEN_SEEDS in results else []),
        *edits_claims(edits),
        poison_claim(results["poisoning"], poison),
    ]  # fmt: skip


def report(results: Mapping[str, Results], claims: Sequence[Claim], scale: Scale, *, seed: int, minutes: float) -> str:
    """Return the report as Markdown.

    Args:
        results: by part.
        claims: with their verdicts.
        scale: size of the experiments.
        seed: of the evaluations.
        minutes: that all commands took.
    """
    apgd = f"apgd-{scale.unseen_steps}"
    shown = {
        part: data_sets_table(each, apgd) if part == UNSEEN else results_table(each) for part, each in results.items()
    }
    tables = [f"## {heading}\n\n{shown[part]}" for part, heading in PARTS.items() if part in shown]
    return REPORT.format(
        machine=machine(),
        date=date.today().isoformat(),
        seed=seed,
        minutes=f"{minutes:.0f}",
        scale=scale,
        claims=verdict_table(claims),
        tables="\n\n".join(tables),
    )


def results_table(results: Results) -> str:
    """Return a table with a line for each attack, threat model and metric, and a column for each variant."""
    settings = dict.fromkeys(key[1:] for key in results.values)
    variants = [ORIGINAL, *(name for name in VARIANTS if any(results.of(name, *setting) for setting in settings))]
    lines = [[*setting, *(spread(results.of(variant, *setting)) for variant in variants)] for setting in settings]
    return markdown_table([["images", "threat model", "metric", *variants], *lines])


def data_sets_table(results: Results, attack: str) -> str:
    """Return a line for each data set: clean PSNR, and the share of the PSNR under an attack that is won back."""
    titles = [
        "images",
        *(f"{name} (dB)" for name in (ORIGINAL, CONTROL, ROBUST)),
        "control: won back (%)",
        "robust: won back (%)",
    ]
    lines = []
    for data_set in (*UNSEEN_SETS, SCENES, LEAVES):
        found = results.on(data_set)
        clean = [spread(found.of(name, CLEAN.name, NO_THREAT, "psnr")) for name in (ORIGINAL, CONTROL, ROBUST)]
        won = [spread(percent(decibels_won_back(found, name, attack))) for name in (CONTROL, ROBUST)]
        lines.append([data_set, *clean, *won])
    return markdown_table([titles, *lines])


REPORT = """# The paper's experiments on the miniature world

{machine}, {date}, seed {seed}, {minutes} minutes. Scale: {scale}.

`robust` is `--recipe latent`, with alpha 0.03 in scaled units and epsilon 8/255. `alpha` and `epsilon` change one setting of
it. The paper's recipe and `recipe fast` attack reconstructions alone. `no attack` and `random noise` are controls with the
same number of training steps. Values are means over the training seeds, with their standard deviation.

## The claims

What a VAE wins back of an edit is the share of the original's loss that it does not have: 1 - FID / FID of the original,
where FID is measured against the original's edits of clean images. A claim on edits holds if 70% (transfer) or 40%
(adaptive) are won back, and at least twice as much as by the control. A claim on poisons holds if half of the
original's damage is averted, and twice as much as by the control.

![Scenes, protected scenes, and their edits by the original and the robust VAE](figures/example.png)

![PSNR and SSIM of reconstructions](figures/reconstruction.png)

![FID of edits won back](figures/edits.png)

![Images as prompted after poisoned fine-tuning](figures/poisons.png)

![PSNR around scenes with the original, the control and the robust VAE](figures/surface.png)

![Map of latents, clean and attacked](geometry/figures/map.png)

{claims}

{tables}
"""


if __name__ == "__main__":
    main()
