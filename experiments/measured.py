"""Keep an experiment's mean values in a small file, from which `docs/results.md` is written, and the pictures it shows.

python -m experiments.measured outputs/paper       # writes docs/measured/paper.json and docs/*.png
python -m docs.scripts.results                     # writes docs/results.md
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from experiments.claims import Results
from experiments.runner import ROOT
from srl_utils.evaluation.perturbations import CLEAN, NO_THREAT
from srl_utils.evaluation.timings import Timings
from srl_utils.files import read_json, write_text_atomically

MEASURED = ROOT / "docs/measured"
PAGE = ROOT / "docs/results.md"
DIGITS = 5
"""Significant ones, more than any table shows."""


def main() -> None:
    """Write the file of each experiment, and replace its pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", help="output folders of experiments")
    for folder in parser.parse_args().folders:
        path = MEASURED / f"{folder.resolve().name}.json"
        write_text_atomically(path, as_text(summary(folder)))
        pictures = pictures_of(folder, PAGE.read_text(encoding="utf-8"))
        for picture in pictures:
            shutil.copy(picture, PAGE.parent)
        print(f"Written: {', '.join([path.name, *(picture.name for picture in pictures)])}")


def pictures_of(folder: Path, page: str) -> list[Path]:
    """Return the pictures in `folder` that the page shows, by their names."""
    found = (path for pattern in ("*.png", "*.gif", "figures/*.png") for path in sorted(folder.glob(pattern)))
    return [path for path in found if f"]({path.name})" in page]


def summary(folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Return the values of each evaluation in `folder`, by VAE and by attack, threat model and metric.

    Seconds per image are kept as a metric of clean images: `seconds of encoders` and `seconds of purifiers`, by their names.

    Raises:
        SystemExit: if the folder has no results.
    """
    found = {path.parent.name: Results.read(path) for path in sorted(folder.glob("*/results.json"))}
    if not found:
        raise SystemExit(f"{folder} has no results; run its experiment first, such as `make {folder.name}`")
    parts: dict[str, dict[str, dict[str, float]]] = {}
    for name, results in found.items():
        for (vae, *setting), value in results.values.items():
            parts.setdefault(name, {}).setdefault(" | ".join(setting), {})[vae] = rounded(value)
    for path in sorted(folder.glob("*/timings.json")):
        timings = Timings(**read_json(path))
        for kind, seconds in (("encoders", timings.encoders), ("purifiers", timings.purifiers)):
            setting = " | ".join((CLEAN.name, NO_THREAT, f"seconds of {kind}"))
            parts[path.parent.name][setting] = {name: rounded(value) for name, value in seconds.items()}
    return parts


def rounded(value: float) -> float:
    """Return `value` with as many significant digits as are kept."""
    return float(f"{value:.{DIGITS}g}")


def as_text(parts: dict[str, dict[str, dict[str, float]]]) -> str:
    """Return the file's text, with a line for each attack, threat model and metric."""
    evaluations = []
    for name, settings in parts.items():
        lines = ",\n".join(f"  {json.dumps(setting)}: {json.dumps(values)}" for setting, values in settings.items())
        evaluations.append(f" {json.dumps(name)}: {{\n{lines}\n }}")
    return "{\n" + ",\n".join(evaluations) + "\n}\n"


def load_measured(name: str) -> dict[str, Results]:
    """Return the results of an experiment's evaluations, as its file in `docs/measured` has them."""
    return {
        evaluation: Results(
            {
                (vae, *setting.split(" | ")): value
                for setting, by_vae in settings.items()
                for vae, value in by_vae.items()
            }
        )
        for evaluation, settings in read_json(MEASURED / f"{name}.json").items()
    }


if __name__ == "__main__":
    main()
