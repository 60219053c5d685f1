"""Writes docs/results.md from its template and from what the experiments measured.

python -m docs.scripts.results

`make results` keeps the experiments' results in docs/measured first. Numbers of the template that are not
in these files are typed.
"""

from __future__ import annotations

import argparse
from collections import ChainMap
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from experiments.claims import ORIGINAL, Results, damage, decibels_won_back, defence_of, mean_of, won_back
from experiments.defences import PROTECTIONS
from experiments.measured import MEASURED, PAGE, load_measured
from srl_utils.attacks.corruptions import CORRUPTIONS
from srl_utils.evaluation.perturbations import CLEAN, NO_THREAT
from srl_utils.files import write_text_atomically

NOT_MEASURED = "-"


class NotMeasured(LookupError):
    """The template asks for a value that no experiment has measured."""


def spread(values: Sequence[float], decimals: int = 1, unit: str = "") -> str:
    """Return the mean over training seeds, and their standard deviation if there are several."""
    if not values:
        raise NotMeasured
    deviation = f" ± {stdev(values):.{decimals}f}" if len(values) > 1 else ""
    return f"{round(mean(values), decimals) + 0.0:.{decimals}f}{unit}{deviation}"


def of(results: Results, vae: str, attack: str, threat: str, metric: str, decimals: int = 1, scale: float = 1.0) -> str:
    """Return a VAE's value, times `scale`, over its seeds."""
    try:
        return spread([scale * value for value in results.of(vae, attack, threat, metric)], decimals)
    except NotMeasured:
        raise NotMeasured(f"{metric} of {vae} under {attack} ({threat})") from None


def mean_only(*arguments: object, **keywords: object) -> str:
    """Return the mean of `of` without the standard deviation."""
    return of(*arguments, **keywords).partition(" ±")[0]


def won(results: Results, vae: str, attack: str, threat: str, metric: str) -> str:
    """Return the share of an attack's damage to edits that a VAE wins back, in percent; "-" without damage."""
    shares = won_back(results, vae, attack, threat, metric)
    return spread([100 * share for share in shares], 0, "%") if shares else NOT_MEASURED


def won_decibels(results: Results, vae: str, attack: str) -> str:
    """Return the share of the PSNR that an adaptive attack takes which a VAE wins back, in percent."""
    return spread([100 * share for share in decibels_won_back(results, vae, attack)], 0, "%")


def gained(sets: Sequence[Results], vae: str, attack: str) -> str:
    """Return by how many dB a VAE's reconstructions of perturbed images are nearer the clean images than the original's, mean
    of several data sets."""
    gains = []
    for results in sets:
        (original,) = results.of(ORIGINAL, attack, NO_THREAT, "psnr")
        gains.append([value - original for value in results.of(vae, attack, NO_THREAT, "psnr")])
    return spread(mean_of(gains))


def lost_to_passes(results: Results, vae: str) -> str:
    """Return the dB that a VAE's tenth pass is worse than its first."""
    passes = zip(*(results.of(vae, f"reencoded-{count}", NO_THREAT, "psnr") for count in (1, 10)), strict=True)
    return spread([first - tenth for first, tenth in passes]).partition(" ")[0]


def edits(results: Results, vae: str, attack: str, threat: str, metric: str, decimals: int) -> str:
    """Return the mean over all edits of a VAE's value."""
    values = [results.of(vae, edit, threat, metric) for edit in results.edits_under(attack)]
    return spread(mean_of([each for each in values if each]), decimals)


def harm(results: Results, name: str) -> str:
    """Return the FID of edits of clean images by a defence, mean of the edits."""
    return spread(defence_of(results, name, PROTECTIONS).harm)


def won_edits(results: Results, name: str, threat: str) -> str:
    """Return the share of the protections' damage to edits that a defence wins back, in percent: their mean, and the least
    in brackets; "-" if it was not tried."""
    defence = defence_of(results, name, PROTECTIONS)
    if not defence.won[threat]:
        return NOT_MEASURED
    return f"{spread(defence.mean_won(threat), 0, '%')} ({spread(defence.least_won(threat), 0, '%').partition(' ')[0]})"


def clip_lost(results: Results, attack: str, threat: str) -> str:
    """Return what an attack takes from the CLIP similarity of the original's edits with the prompt, mean of the edits."""
    clean, harmed = (
        mean_of([results.of(ORIGINAL, edit, each, "clip-text") for edit in results.edits_under(name)])
        for name, each in ((CLEAN.name, NO_THREAT), (attack, threat))
    )
    return f"{clean[0] - harmed[0]:.3f}"


def shown(results: Results, vae: str, poison: str, threat: str) -> str:
    """Return the share of images that show their prompt, in percent."""
    return spread([100 * value for value in results.of(vae, poison, threat, "shown")], 0, "%")


def lost_to_poisons(results: Results, vae: str, poison: str) -> str:
    """Return the share of images as prompted that poisons cost a VAE, in percentage points."""
    return f"{100 * mean(damage(results, vae, poison)):.0f} points"


def together(*results: Results) -> Results:
    """Return the values of several evaluations of the same VAEs."""
    return Results(dict(ChainMap(*(each.values for each in results))))


def page() -> str:
    """Return the page's text.

    Raises:
        NotMeasured: if the template asks for a value that is not in docs/measured.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    functions = (
        of, mean_only, won, won_decibels, gained, lost_to_passes, edits, harm, won_edits, clip_lost, shown, lost_to_poisons, together,
    )  # fmt: skip
    environment.globals.update({function.__name__: function for function in functions})
    environment.globals["CORRUPTIONS"] = CORRUPTIONS
    measured = {path.stem: load_measured(path.stem) for path in MEASURED.glob("*.json")}
    return environment.get_template("results.md.jinja").render(**measured)


def main(arguments: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args(arguments)
    write_text_atomically(PAGE, page())


if __name__ == "__main__":
    main()
