"""Cards with every kind of result."""

from __future__ import annotations

from dataclasses import replace

from srl_utils.evaluation.report.tables import comparison_table
from srl_utils.evaluation.results import Row, Setting, to_row
from srl_utils.hub.card import CardFacts

ORIGINAL, FINE_TUNED = "original", "fine-tuned"

ATTACKS = {"clean": 0.0, "pgd-10": 8 / 255, "pgd-50x2": 8 / 255, "gaussian-noise": 8 / 255}
HEADINGS = ["Results", "How to use it", "What it protects against, and what not", "Training", "Limits", "Citation"]
COMMAND = "accelerate launch train_srl_vae.py --output_dir 'my vae' --epsilon 0.03"


def setting(attack: str, metric: str) -> Setting:
    """What was measured under an attack of `ATTACKS`."""
    adversarial = attack.startswith("pgd")
    return Setting(attack, *(("mse", "adaptive") if adversarial else (None, "none")), ATTACKS[attack], metric)


def rows(vae: str, attacks: tuple[str, ...] = tuple(ATTACKS), *, shift: float = 0.0) -> list[Row]:
    """PSNR and SSIM of a VAE under each attack; no two values are alike, nor are two gains."""
    gains = [shift * (1 + number / 3) for number in range(len(attacks))]
    return [
        to_row(vae, setting(attack, metric), value, n=16, ci95=(0.97 * value, 1.02 * value))
        for number, (attack, gain) in enumerate(zip(attacks, gains, strict=True))
        for metric, value in (("psnr", 30.123456 - 3.3 * number + gain), ("ssim", 0.876543 - 0.1 * number + gain / 99))
    ]  # fmt: skip


RESULTS = [*rows(ORIGINAL), *rows(FINE_TUNED, shift=1.2345), *rows("fine-tuned-fp16", ("clean",), shift=1.2221)]
MINIMAL = CardFacts(
    model_id="robust", base_model="base", vae_class="AutoencoderKL", data="photos: 9 images", resolution=64, num_validation_images=16,
    steps=100, images_per_step=8, hardware="1 x CPU, 2 threads", minutes=0.0, command=COMMAND,
    arguments='{"epsilon": 0.03}', versions={"torch": "2.15.0"}, original_vae=ORIGINAL, judged_vae=FINE_TUNED,
    results=rows(ORIGINAL), results_table=comparison_table(rows(ORIGINAL), (ORIGINAL,)),
)  # fmt: skip


def with_results(facts: CardFacts, results: list[Row]) -> CardFacts:
    return replace(facts, results=results, results_table=comparison_table(results, (ORIGINAL, FINE_TUNED)))


FULL = with_results(
    replace(
        MINIMAL,
        model_id="someone/robust",
        base_model="stabilityai/stable-diffusion-2",
        base_license={"license": "other", "license_name": "some-licence", "license_link": "LICENSE.md"},
        subfolder="vae",
        data="COCO",
        dataset="detection-datasets/coco",
        minutes=12.34,
        picture="samples/comparison.png",
    ),
    RESULTS,
)
