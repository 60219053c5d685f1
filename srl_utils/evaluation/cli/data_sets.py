"""Evaluate on several data sets: each has a folder with its own report, and one report compares them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from os.path import abspath
from pathlib import Path

from srl_utils.errors import UserError
from srl_utils.evaluation.cli.arguments import listed
from srl_utils.evaluation.report.data_sets import compared
from srl_utils.evaluation.report.document import ReportContent, write_report
from srl_utils.evaluation.report.figures import safe_name
from srl_utils.files import sole_run

DEFAULT_COLUMN = "image"


def data_sets(args: argparse.Namespace) -> dict[str, argparse.Namespace]:
    """Return the flags with each data set alone, by its name: the reference first, then `dataset_name`, then `data_dir`.

    If there are several, each has a folder in `output_dir`, and its values are those of an evaluation on it alone. Splits,
    columns and streaming are those of `dataset_name`, if that is given.

    Raises:
        UserError: if there is no data set, if two have the same name, if none has that of `reference`, or if the number of
            splits or columns does not fit.
    """
    names, folders = listed(args.dataset_name), listed(args.data_dir)
    if not (names or folders):
        raise UserError("give `dataset_name` or `data_dir`")
    splits = spread(args.split, len(names), "split")
    columns = spread(args.image_column, len(names or folders), "image_column")
    streaming = args.streaming
    found = [
        {"dataset_name": name, "data_dir": None, "split": split, "image_column": column, "streaming": streaming}
        for name, split, column in zip(names, splits, columns, strict=False)
    ]
    if names:
        columns, streaming = [DEFAULT_COLUMN] * len(folders), False
    found += [
        {"dataset_name": None, "data_dir": folder, "split": None, "image_column": column, "streaming": streaming}
        for folder, column in zip(folders, columns, strict=True)
    ]
    labels = [*map(name_of_data_set, names), *(Path(abspath(folder)).name for folder in folders)]
    check_distinct(labels)
    if args.reference not in (None, *labels):
        raise UserError(f"{args.reference} is none of {', '.join(labels)}", parameter="reference")
    if len(found) > 1:
        for label, part in zip(labels, found, strict=True):
            part["output_dir"] = args.output_dir / safe_name(label)
    parts = {label: argparse.Namespace(**{**vars(args), **part}) for label, part in zip(labels, found, strict=True)}
    return dict(sorted(parts.items(), key=lambda part: part[0] != args.reference))


def name_of_data_set(place: str) -> str:
    """Return the last part of a folder's path, and other names as they are."""
    return Path(abspath(place)).name if Path(place).exists() else place


def check_distinct(labels: list[str]) -> None:
    """Raise a UserError if two data sets would have the same folder of results."""
    by_folder: dict[str, str] = {}
    for label in labels:
        if other := by_folder.get(safe_name(label)):
            problem = (
                f"{other} and {label} have the same name in the results; name each data set once, or rename a folder"
            )
            raise UserError(problem, parameter="dataset_name")
        by_folder[safe_name(label)] = label


def spread(value: str | list[str] | None, number: int, flag: str) -> list[str | None]:
    """Return the value of a flag for each of `number` data sets: one for each is given, or one for all.

    Raises:
        UserError: if there is another number of values.
    """
    values: list[str | None] = [*listed(value)] or [None]
    if len(values) == 1:
        return values * number
    if len(values) != number:
        problem = f"there are {len(values)} values for {number} data sets; give one for each, or one for all"
        raise UserError(problem, parameter=flag)
    return values


def report_on_all(
    args: argparse.Namespace, parts: Mapping[str, argparse.Namespace], contents: Mapping[str, ReportContent]
) -> None:
    """Write the report that compares the data sets.

    Args:
        args: `output_dir`.
        parts: the flags with each data set.
        contents: of the report of each data set.
    """
    folders = ", ".join(f"{name} in {part.output_dir.name}/" for name, part in parts.items())
    note = f"Each data set has its own report, with attacks, figures and pictures: {folders}"
    with sole_run(args.output_dir, is_main_process=True):
        write_report(compared(contents, note), args.output_dir)
    print(f"All data sets: {args.output_dir / 'report.html'}, {args.output_dir / 'report.md'}")
