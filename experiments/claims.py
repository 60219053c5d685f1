"""Judge the paper's claims by the results of its experiments.

A figure is computed for each training seed and shown as mean and standard deviation. What attacks take from an edit is
measured on the original VAE; a variant wins back the share of it that its own edits do not lose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from srl_utils.evaluation.perturbations import ADAPTIVE, CLEAN, NO_THREAT, TRANSFER
from srl_utils.evaluation.report.tables import markdown_table
from srl_utils.evaluation.tasks.poisoning import NO_DOSE
from srl_utils.files import read_json

ORIGINAL, ROBUST, CONTROL = "original", "robust", "no attack"
HOLDS, IN_PART, FAILS = "holds", "holds in part", "does not hold"
UNTESTED = "cannot be judged: the attack takes nothing from the original"
WANTED = {TRANSFER: 0.7, ADAPTIVE: 0.4}
"""Shares of an edit's loss that have to be won back for a claim to hold; the control may have half of it at most."""
NO_POISON = NO_DOSE.name
LEAST_LOSS = {"fid": 1.0, "clip-text": 0.01}
"""A smaller loss is not told from none: the attack has no grip."""
LEAST_DAMAGE = 0.1
"""A smaller loss of images as prompted says nothing of poisons: it is four of 48 images."""


def trained_name(variant: str, seed: int) -> str:
    """Return the name of a variant's VAE of one training seed."""
    return variant if seed == 0 else f"{variant} (seed {seed})"


class Results:
    """Mean values of evaluations, by VAE, attack with its edit, threat model and metric."""

    def __init__(self, values: Mapping[tuple[str, str, str, str], float]) -> None:
        """Take values by VAE, attack, threat model and metric."""
        self.values = values
        self.attacks = list(dict.fromkeys(attack for _, attack, _, _ in values))

    @classmethod
    def read(cls, *paths: Path) -> Results:
        """Read the `results.json` of each evaluation. On several data sets, attacks are named `faces: clean`."""
        rows = [row for path in paths for row in read_json(path)]
        return cls({
            (row["vae"], on_data_set(row.get("dataset"), row["attack"]), row["threat_model"], row["metric"]): row["value"]
            for row in rows
        })  # fmt: skip

    def of(self, variant: str, attack: str, threat: str, metric: str) -> list[float]:
        """Return one value for each training seed of a variant; an empty list if it was not measured."""
        named = (self.values.get((trained_name(variant, seed), attack, threat, metric)) for seed in range(10))
        return [value for value in named if value is not None]

    def on(self, data_set: str) -> Results:
        """Return the results on one of several data sets, with the attacks' own names."""
        prefix = on_data_set(data_set, "")
        return Results({
            (vae, attack.removeprefix(prefix), *setting): value
            for (vae, attack, *setting), value in self.values.items()
            if attack.startswith(prefix)
        })  # fmt: skip

    def edits_under(self, attack: str) -> list[str]:
        """Return the names of all edits of images under an attack, such as `advdm, img2img-0.5`."""
        return [name for name in self.attacks if name.partition(", ")[0] == attack and name != attack]


def on_data_set(data_set: str | None, attack: str) -> str:
    """Return the name of an attack on one of several data sets; None if there is only one."""
    return attack if data_set is None else f"{data_set}: {attack}"


@dataclass(frozen=True)
class Claim:
    """A claim of the paper with the figures that speak for or against it."""

    text: str
    unit: str
    original: float | None
    control: Sequence[float]
    robust: Sequence[float]
    verdict: str

    def line(self) -> list[str]:
        """Return the claim as a line of a table."""
        original = "" if self.original is None else f"{self.original:.3g}"
        return [self.text, self.unit, original, spread(self.control), spread(self.robust), self.verdict]


def spread(values: Sequence[float]) -> str:
    """Return mean and standard deviation over training seeds."""
    if not values:
        return ""
    return f"{mean(values):.3g}" + (f" ± {stdev(values):.2g}" if len(values) > 1 else "")


def compared(text: str, unit: str, results: Results, setting: tuple[str, str, str], *, higher: bool) -> Claim:
    """Return a claim that the robust VAE's value is better than the original's, and than the control's.

    It holds if it is better than both by more than the seeds' spread, and in part if it is better than the original only.

    Args:
        text: the claim.
        unit: what is measured.
        results: of the evaluation.
        setting: attack, threat model and metric.
        higher: whether higher values are better.
    """
    (original,) = results.of(ORIGINAL, *setting)
    control, robust = results.of(CONTROL, *setting), results.of(ROBUST, *setting)
    sign = 1 if higher else -1
    gains = [sign * (value - original) for value in robust]
    over_control = [sign * (value - mean(control)) for value in robust]
    verdict = (
        HOLDS if beyond_spread(gains) and beyond_spread(over_control) else IN_PART if beyond_spread(gains) else FAILS
    )
    return Claim(text, unit, original, control, robust, verdict)


def beyond_spread(gains: Sequence[float]) -> bool:
    """Return whether gains are positive by more than twice their standard error."""
    error = stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
    return mean(gains) > 2 * error


def won_back(results: Results, variant: str, attack: str, threat: str, metric: str) -> list[float]:
    """Return the share of an attack's damage to edits that a variant wins back, for each seed; empty without damage, or
    if an edit was not measured.

    FID is measured against the original's edits of clean images, which have 0. Damage is summed over all edits.
    """
    edits = results.edits_under(attack)
    own, original = ([results.of(vae, edit, threat, metric) for edit in edits] for vae in (variant, ORIGINAL))
    if not all([*own, *original]):
        return []
    clean = [0.0 if metric == "fid" else clean_value(results, edit, metric) for edit in edits]
    lost = abs(sum(clean) - sum(value for (value,) in original))
    if lost < LEAST_LOSS[metric] * len(edits):
        return []
    return [1 - abs(sum(clean) - sum(values)) / lost for values in zip(*own, strict=True)]


def decibels_won_back(results: Results, variant: str, attack: str) -> list[float]:
    """Return the share of the PSNR that an adaptive attack takes from the original's reconstructions which a variant wins
    back, for each seed."""
    (clean,), (attacked,) = (results.of(ORIGINAL, *of, "psnr") for of in ((CLEAN.name, NO_THREAT), (attack, ADAPTIVE)))
    return [(value - attacked) / (clean - attacked) for value in results.of(variant, attack, ADAPTIVE, "psnr")]


@dataclass(frozen=True)
class Defence:
    """What a defence costs and wins: a value for each training seed."""

    harm: list[float]
    """FID of edits of clean images against those by the original, mean of the edits."""
    won: dict[str, dict[str, list[float]]]
    """Share of a protection's damage to edits that is won back, in percent, by threat model and protection."""

    def mean_won(self, threat: str) -> list[float]:
        """Return the mean over the protections; empty if none was tried."""
        return mean_of(list(self.won[threat].values()))

    def least_won(self, threat: str) -> list[float]:
        """Return the least of the protections: the worst case; empty if none was tried."""
        return [min(seed) for seed in zip(*self.won[threat].values(), strict=True)]


def defence_of(edits: Results, name: str, protections: Sequence[str]) -> Defence:
    """Return what a defence costs and wins; a protection that was not tried or has no grip is left out."""
    harm = [edits.of(name, edit, NO_THREAT, "fid") for edit in edits.edits_under(CLEAN.name)]
    won = {
        threat: {protection: percent(won_back(edits, name, protection, threat, "fid")) for protection in protections}
        for threat in (TRANSFER, ADAPTIVE)
    }
    return Defence(
        mean_of(harm),
        {threat: {name: shares for name, shares in by_name.items() if shares} for threat, by_name in won.items()},
    )


def mean_of(settings: Sequence[Sequence[float]]) -> list[float]:
    """Return the mean of several settings for each seed."""
    return [mean(seed) for seed in zip(*settings, strict=True)]


def percent(shares: Sequence[float]) -> list[float]:
    """Return shares in percent."""
    return [100 * share for share in shares]


def clean_value(results: Results, edit: str, metric: str) -> float:
    """Return the metric of the original's edits of clean images."""
    _, _, name = edit.partition(", ")
    return results.of(ORIGINAL, f"clean, {name}", NO_THREAT, metric)[0]


def closeness_claim(editing: Results, between_seeds: Results) -> Claim:
    """Return the claim that the robust VAE changes edits of clean images as little as another training of it does.

    Args:
        editing: edits by the robust VAEs, compared with the original's.
        between_seeds: edits by further robust VAEs, compared with the first one's.
    """
    robust, usual = (clean_similarity(results) for results in (editing, between_seeds))
    verdict = HOLDS if mean(robust) >= mean(usual) else FAILS
    return Claim(
        f"edits of clean images stay: as much as between trainings ({spread(usual)})", "PSNR (dB)", None, [], robust,
        verdict,
    )  # fmt: skip


def clean_similarity(results: Results) -> list[float]:
    """Return the PSNR of edits of clean images against the baseline's, in dB, for each robust VAE: the mean of all edits."""
    values = [results.of(ROBUST, edit, NO_THREAT, "psnr") for edit in results.edits_under(CLEAN.name)]
    return mean_of(values)


def edits_claims(attacked: Mapping[str, Results]) -> list[Claim]:
    """Return the claims on edits of protected images: one for each attack, threat model and metric.

    Args:
        attacked: results of the edits, by attack.
    """
    claims = []
    for attack, results in attacked.items():
        for threat, wanted in WANTED.items():
            for metric, title in (("fid", "FID"), ("clip-text", "CLIP similarity")):
                control, robust = (won_back(results, name, attack, threat, metric) for name in (CONTROL, ROBUST))
                text = f"edits of images under {attack}, {threat}"
                claims.append(
                    Claim(text, f"{title} won back", None, control, robust, share_verdict(control, robust, wanted))
                )
    return claims


def poison_claim(results: Results, poison: str) -> Claim:
    """Return the claim on fine-tuning with poisons made on the original VAE: the damage is halved at least.

    Damage is the loss of images as prompted, between fine-tunings of one VAE without poisons and with them.
    """
    (original,), control, robust = (damage(results, name, poison) for name in (ORIGINAL, CONTROL, ROBUST))
    verdict = damage_verdict(original, control, robust)
    return Claim(f"fine-tuning on {poison}", "images as prompted lost", original, control, robust, verdict)


def damage(results: Results, variant: str, poison: str) -> list[float]:
    """Return the share of images as prompted that poisons cost a variant, for each seed."""
    unharmed = results.of(variant, NO_POISON, NO_THREAT, "shown")
    harmed = results.of(variant, poison, TRANSFER, "shown")
    return [before - after for before, after in zip(unharmed, harmed, strict=True)]


def damage_verdict(original: float, control: Sequence[float], robust: Sequence[float]) -> str:
    """Return whether at least half of the original's damage is averted, and twice as much as by the control."""
    if original < LEAST_DAMAGE:
        return UNTESTED
    averted, by_control = original - mean(robust), original - mean(control)
    if averted >= original / 2 and averted >= 2 * by_control:
        return HOLDS
    return IN_PART if averted > max(0.0, by_control) else FAILS


def share_verdict(control: Sequence[float], robust: Sequence[float], wanted: float) -> str:
    """Return whether enough is won back, and at least twice as much as by the control."""
    if not robust:
        return UNTESTED
    twice = not control or mean(robust) >= 2 * mean(control)
    if mean(robust) >= wanted and twice:
        return HOLDS
    return IN_PART if mean(robust) > 0 and (not control or mean(robust) > mean(control)) else FAILS


def verdict_table(claims: Sequence[Claim]) -> str:
    """Return the claims as a Markdown table."""
    titles = ["the paper's claim", "measure", ORIGINAL, CONTROL, ROBUST, "verdict"]
    return markdown_table([titles, *(claim.line() for claim in claims)])
