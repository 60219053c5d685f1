"""The first table of a report: what each attack does to the original VAE, so whether there is anything to defend against."""

from __future__ import annotations

from collections.abc import Sequence

from srl_utils.evaluation.motion import SHARE, TRAVEL
from srl_utils.evaluation.perturbations import CLEAN, GAUSSIAN_NOISE, NO_THREAT
from srl_utils.evaluation.report.tables import METRIC_TITLES, Panel, measured
from srl_utils.evaluation.results import Difference, Record, Row, Rows, Setting, paired_difference
from srl_utils.images.pixels import format_pixel_distance

OUTCOME_METRICS = ("psnr", "clip", "rfid", "fid")
GRIP, NO_GRIP = "more than noise", "no grip"


def effects_on(vae: str, rows: Rows, records: Sequence[Record]) -> Panel | None:
    """Return what the attacks of a study do to a VAE; None if it has no attack whose motion of latents and outcome were measured.

    An attack does more than noise if it lowers the PSNR or moves the latents more than Gaussian noise of its size does:
    if the 95% interval of one of the paired differences excludes 0. Else it has no grip. An attack without an L-infinity
    budget is compared with the weakest noise.

    Args:
        vae: name of the baseline.
        rows: of the study.
        records: of the study.
    """
    own = _Measured(vae, rows, records)
    attacks = own.attacks()
    if not any(attack.objective for attack in attacks):
        return None
    metrics = [name for name in OUTCOME_METRICS if name in {row.metric for row in rows}]
    titles = [
        "images",
        "epsilon",
        METRIC_TITLES[TRAVEL],
        METRIC_TITLES[SHARE],
        *(METRIC_TITLES[name] for name in metrics),
    ]
    judged = bool(own.noises)
    table = [[*titles, "verdict"] if judged else titles]
    for attack in attacks:
        for outcome in own.outcomes(attack):
            values = [own.text(attack, name) for name in (TRAVEL, SHARE)]
            values += [own.text(attack._replace(attack=outcome), name) for name in metrics]
            epsilon = format_pixel_distance(attack.epsilon) if attack.epsilon else ""
            verdict = [own.verdict(attack, outcome)] if judged else []
            table.append([outcome, epsilon, *values, *verdict])
    if len(table) == 1:  # latents moved, but no outcome was measured
        return None
    return Panel(f"What the attacks do to {vae}", EXPLANATION, table)


EXPLANATION = (
    "Latents moved: their distance from those of the clean image, over the median distance between two images' latents. "
    "Share of the way, for attacks with a target: 0 if the latents are as far from the target's as before, 1 if they are "
    "there. Epsilon is an attack's largest change of a pixel, and the noise's standard deviation. No grip: neither the PSNR "
    "nor the latents show, beyond their 95% intervals, that the attack does more than noise of its size. It then says "
    "nothing about a defence, or there are too few images."
)


class _Measured:
    """The values of one VAE under the attacks made on it. For the baseline, both threat models are the same attack."""

    def __init__(self, vae: str, rows: Rows, records: Sequence[Record]) -> None:
        self.rows: dict[Setting, Row] = {_key(row.setting): row for row in rows if row.vae == vae}
        self.values: dict[Setting, dict[int, float]] = {}
        for record in records:
            if record.vae == vae and record.setting.metric in ("psnr", TRAVEL):
                self.values.setdefault(_key(record.setting), {})[record.index] = record.value
        self.noises = sorted(key.epsilon for key in self.rows if (key.attack, key.metric) == (GAUSSIAN_NOISE, TRAVEL))

    def attacks(self) -> list[Setting]:
        """Return the settings whose motion of latents was measured, after that of clean images, which do not move."""
        clean = Setting(CLEAN.name, None, NO_THREAT, 0.0, TRAVEL)
        return [clean, *(key for key in self.rows if key.metric == TRAVEL)]

    def outcomes(self, attack: Setting) -> list[str]:
        """Return the names of an attack's outcomes: with the variants of the task, such as `pid, img2img-0.5`."""
        named = [
            key.attack
            for key in self.rows
            if key.metric == "psnr" and key.epsilon == attack.epsilon and key.attack.partition(", ")[0] == attack.attack
        ]
        return list(dict.fromkeys(named))

    def text(self, attack: Setting, metric: str) -> str:
        """Return a mean with its interval; empty if it was not measured."""
        row = self.rows.get(attack._replace(metric=metric))
        return "" if row is None else " ".join(measured(metric, row.value, row.ci95))

    def verdict(self, attack: Setting, outcome: str) -> str:
        """Return `GRIP` if an attack does more than noise, else `NO_GRIP`; an empty text if it is no attack."""
        if attack.objective is None:
            return ""
        epsilon = attack.epsilon if attack.epsilon in self.noises else self.noises[0]
        noise = Setting(GAUSSIAN_NOISE, None, NO_THREAT, epsilon, TRAVEL)
        lost = self._beyond(noise, attack, outcome.replace(attack.attack, GAUSSIAN_NOISE, 1), outcome, "psnr")
        moved = self._beyond(noise, attack, GAUSSIAN_NOISE, attack.attack, TRAVEL)
        more = (lost is not None and lost.ci95[1] < 0) or (moved is not None and moved.ci95[0] > 0)
        return GRIP if more else NO_GRIP

    def _beyond(
        self, noise: Setting, attack: Setting, under_noise: str, outcome: str, metric: str
    ) -> Difference | None:
        """Return the paired difference of an attack's values from those under noise."""
        attacked = self.values.get(attack._replace(attack=outcome, metric=metric), {})
        return paired_difference(attacked, self.values.get(noise._replace(attack=under_noise, metric=metric), {}))


def _key(setting: Setting) -> Setting:
    """Return the setting without its threat model, which makes no difference on the baseline."""
    return setting._replace(threat_model=NO_THREAT)
