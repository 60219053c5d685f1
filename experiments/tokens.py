"""Make the miniature's discrete autoencoder robust, and compare its rivals at equal time.

    python -m experiments.tokens                       # make tokens

Trains it without an attack, on feature distances alone (as arXiv 2602.18252 does with tokenizers), with TRADES and with
SRL-VAE, each as long as the others, and attacks reconstructions, features and tokens. Finished parts are kept, so the
command can be interrupted and repeated.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from datetime import date

from experiments.claims import ORIGINAL, Results, decibels_won_back, percent, spread, trained_name
from experiments.runner import WEIGHTS, Runner, experiment_parser, machine
from srl_utils.evaluation.motion import FLIPS, USE
from srl_utils.evaluation.perturbations import ADAPTIVE, NO_THREAT
from srl_utils.evaluation.report.tables import markdown_table
from srl_utils.evaluation.tasks.base import DRIFT
from srl_utils.files import write_text_atomically

SEEDS = 3
ATTACKED = "--recipe fast --pgd_steps 3 --pgd_step_size 4/255"
VARIANTS = {
    "no attack": "--recipe fast --pgd_steps 0 --max_train_steps 930",
    "feature distance": f"{ATTACKED} --objective feature --max_train_steps 760",
    "trades": f"{ATTACKED} --objective trades --latent_weight 0.05 --max_train_steps 520",
    "srl": f"{ATTACKED} --max_train_steps 400",
}
"""Flags by variant; the numbers of steps take about the same time. The squared distance of these latents is dozens of times
the error of the pixels, so a weight as for continuous ones would leave nothing of the reconstruction."""
ATTACKS = {"reconstruction": "apgd-100", "features": "apgd-100-latents", "tokens": "apgd-100-tokens"}
"""Attacks by what they aim at."""
EPSILON = "8/255"
SHARED = ["--dataset_name", "scikit-image", "--epsilons", EPSILON, "--threat_models", ADAPTIVE]
EVALUATION = [
    *SHARED, "--num_images", 16, "--attacks", "clean", *ATTACKS.values(), "--metrics", "psnr", "ssim", DRIFT, FLIPS, USE,
    "--no_checks",
]  # fmt: skip
CHECKS = [*SHARED, "--num_images", 4, "--attacks", "pgd-10", "--metrics", "psnr", "--num_check_images", 4]
"""Of the first seed's robustness: three minutes for each VAE."""


def main() -> None:
    """Train, evaluate, and write the table."""
    args = experiment_parser("tokens", __doc__).parse_args()
    run = Runner(args.output_dir, WEIGHTS / "vq", title="tokens", num_calls=len(VARIANTS) * SEEDS + 2)
    trainings = {
        trained_name(variant, seed): ["--dataset_name", "scikit-image", "--seed", seed, *shlex.split(flags)]
        for seed in range(SEEDS)
        for variant, flags in VARIANTS.items()
    }
    run.modules([run.training(*each) for each in trainings.items()])
    names = list(trainings)
    run.evaluate("reconstruction", "reconstruction", names, EVALUATION)
    run.evaluate("checks", "reconstruction", names[: len(VARIANTS)], CHECKS)
    run.bar.close()
    seconds = run.seconds()
    times = {
        variant: [seconds.get(f"train {trained_name(variant, seed)}", 0) for seed in range(SEEDS)]
        for variant in VARIANTS
    }
    made = f"{machine()}, {date.today().isoformat()}, {EPSILON}, adaptive attacks"
    table = results_table(Results.read(args.output_dir / "reconstruction/results.json"), times)
    write_text_atomically(args.output_dir / "tokens.md", f"{made}\n\n{table}\n")
    print(table)


def results_table(results: Results, times: dict[str, Sequence[int]]) -> str:
    """Return a line for each variant: PSNR and changed tokens, clean and under each attack; drift; codes in use; the
    share of the decibels won back that the attack on reconstructions takes; time.

    Args:
        results: of the evaluation.
        times: seconds of each training, by variant.
    """
    attacked = [(title, (attack, ADAPTIVE)) for title, attack in ATTACKS.items()]
    settings = [("clean", ("clean", NO_THREAT)), *attacked]
    titles = [f"{title} (dB)" for title, _ in settings] + [f"tokens changed: {title} (%)" for title, _ in settings]
    lines = [["VAE", *titles, "drift", "codes used (%)", "won back (%)", "seconds"]]
    for variant in (ORIGINAL, *VARIANTS):
        psnr = [spread(results.of(variant, *setting, "psnr")) for _, setting in settings]
        won = spread(percent(decibels_won_back(results, variant, ATTACKS["reconstruction"])))
        flips = [spread(percent(results.of(variant, *setting, FLIPS))) for _, setting in settings]
        drift = spread(results.of(variant, "clean", NO_THREAT, DRIFT))
        use = spread(percent(results.of(variant, "clean", NO_THREAT, USE)))
        lines.append([variant, *psnr, *flips, drift, use, won, spread(times.get(variant, []))])
    return markdown_table(lines)


if __name__ == "__main__":
    main()
