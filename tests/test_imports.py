from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.runs import ROOT

TRAINING = "train_srl_vae"

# What each module of srl_utils may import from srl_utils. A new file has to be entered here.
ALLOWED: dict[str, set[str]] = {
    "": set(),
    "errors": set(),
    "images": set(),
    "photographs": {"decoding"},
    "interruption": set(),
    "attacks": set(),
    "attacks.draws": set(),
    "attacks.gradient": {"attacks.draws", "images"},
    "attacks.random_search": {"attacks.draws", "attacks.gradient"},
    "attacks.corruptions": {"attacks.draws", "images"},
    "attacks.denoiser": {"attacks.draws", "errors", "losses"},
    "attacks.protections": {
        "attacks.denoiser", "attacks.draws", "attacks.gradient", "autoencoders", "errors", "images", "losses"
    },
    "precision": set(),
    "losses": {"errors", "precision"},
    "autoencoder_files": {"errors"},
    "autoencoders": {"autoencoder_files", "errors", "losses", "precision"},
    "arithmetic": {"autoencoders"},
    "layers": {"precision"},
    "execution": {"autoencoders", "errors"},
    "launching": {"errors"},
    "overfitting": set(),
    "readback": set(),
    "resuming": {"checkpoints", "errors"},
    "progress": set(),
    "step": {
        "attacks.corruptions", "attacks.draws", "attacks.gradient", "autoencoders", "images", "layers", "losses"
    },
    "latents": set(),
    "codecs": {"autoencoders", "latents"},
    "metrics": {"images"},
    "set_metrics": {"errors", "images"},
    "evaluation": set(),
    "evaluation.reconstruction": {"evaluation.metering", "progress", 
        "attacks.gradient", "attacks.corruptions", "autoencoders", "codecs", "losses", "metrics", "images"
    },
    "evaluation.report": {"evaluation.metering", "progress", "codecs", "evaluation.reconstruction", "images", "losses", "metrics"},
    "evaluation.differences": {"evaluation.reconstruction", "metrics"},
    "evaluation.figures": {"checkpoints", "evaluation.reconstruction", "images"},
    "evaluation.document": {
        "checkpoints", "evaluation.caveats", "evaluation.differences", "evaluation.figures", "evaluation.reconstruction",
        "evaluation.report", "evaluation.sanity", "images", "markdown",
    },
    "evaluation.sanity": {"evaluation.metering", "progress", 
        "attacks.draws", "attacks.gradient", "attacks.random_search", "autoencoders", "codecs",
        "evaluation.reconstruction", "images", "losses",
    },
    "evaluation.catalogue": {
        "attacks.corruptions", "attacks.denoiser", "attacks.gradient", "attacks.protections", "attacks.random_search",
        "autoencoders", "codecs", "errors", "evaluation.reconstruction", "losses",
    },
    "evaluation.study": {"evaluation.metering", "progress", 
        "checkpoints", "codecs", "errors", "evaluation.reconstruction", "evaluation.tasks", "losses", "set_metrics"
    },
    "evaluation.tasks": {"codecs", "evaluation.reconstruction", "images", "losses", "set_metrics"},
    "evaluation.extremes": {"progress", 
        "checkpoints", "codecs", "evaluation.reconstruction", "evaluation.report", "evaluation.study",
        "evaluation.tasks", "images", "losses", "metrics",
    },
    "evaluation.keeping": {"checkpoints"},
    "evaluation.editing": {"evaluation.metering", 
        "attacks.denoiser", "attacks.draws", "codecs", "errors", "evaluation.keeping", "evaluation.reconstruction", "evaluation.tasks", "images",
        "pipelines", "set_metrics",
    },
    "evaluation.generation": {
        "attacks.denoiser", "codecs", "errors", "evaluation.editing", "evaluation.reconstruction",
        "evaluation.tasks", "images", "set_metrics",
    },
    "evaluation.finetuning": {"attacks.denoiser", "errors", "evaluation.reconstruction"},
    "evaluation.poisoning": {"evaluation.metering", 
        "checkpoints", "codecs", "errors", "evaluation.editing", "evaluation.finetuning", "evaluation.keeping",
        "evaluation.reconstruction", "evaluation.tasks", "losses", "set_metrics",
    },
    "training_flags": {"command_line", "sources"},
    "evaluation.metering": {"codecs"},
    "evaluation.caveats": {"evaluation.tasks", "metrics", "set_metrics"},
    "evaluation.places": {"autoencoders", "command_line", "errors"},
    "evaluation.commands": set(),
    "evaluation.commands.common": {
        "attacks.protections", "autoencoder_files", "autoencoders", "checkpoints", "codecs", "command_line", "data", "decoding", "errors",
        "evaluation.catalogue", "evaluation.caveats", "evaluation.document", "evaluation.editing", "evaluation.extremes", "evaluation.places",
        "evaluation.reconstruction", "pipelines",
        "evaluation.report", "evaluation.sanity", "evaluation.study", "evaluation.tasks", "launching", "listing", "locking", "losses", "metrics", "pictures",
        "set_metrics", "sources",
    },
    "evaluation.commands.reconstruction": {
        "command_line", "evaluation.catalogue", "evaluation.commands.common", "evaluation.sanity", "evaluation.tasks",
    },
    "evaluation.commands.generation": {
        "command_line", "evaluation.commands.common", "evaluation.editing", "evaluation.generation",
        "evaluation.reconstruction", "evaluation.study",
    },
    "evaluation.commands.editing": {
        "captions", "command_line", "errors", "evaluation.catalogue", "evaluation.commands.common", "evaluation.editing",
        "listing",
    },
    "evaluation.commands.poisoning": {
        "attacks.protections", "checkpoints", "command_line", "evaluation.catalogue",
        "evaluation.commands.common", "evaluation.figures", "evaluation.finetuning", "evaluation.generation",
        "evaluation.poisoning", "evaluation.reconstruction", "evaluation.report", "evaluation.study", "progress",
    },
    "evaluation.__main__": {
        "command_line", "evaluation.commands.editing", "evaluation.commands.generation",
        "evaluation.commands.poisoning", "evaluation.commands.reconstruction",
    },
    "logs": set(),
    "colours": {"logs"},
    "sample_ranges": set(),
    "png_chunks": set(),
    "tiff_pages": {"png_chunks", "sample_ranges"},
    "iso_boxes": set(),
    "decoding": {"colours", "iso_boxes", "png_chunks", "sample_ranges", "tiff_pages"},
    "pictures": {"decoding", "images", "errors"},
    "listing": {"decoding", "errors", "pictures"},
    "captions": {"errors", "pictures"},
    "webdataset": {"logs", "captions", "decoding", "errors", "listing", "pictures"},
    "sources": {"captions", "errors", "listing", "photographs", "pictures", "webdataset"},
    "data": {"decoding", "errors", "listing", "pictures", "resources", "sources"},
    "integrity": set(),
    "locking": {"errors"},
    "resources": {"errors"},
    "checkpoints": {"autoencoder_files", "autoencoders", "errors", "integrity", "resources"},
    "command_line": {"errors", "images", "resources"},
    "pipelines": {"pipelines.sanitizing", "pipelines.swapping"},
    "pipelines.precision": {"autoencoder_files", "autoencoders", "errors", "latents"},
    "pipelines.swapping": {"errors", "autoencoders", "pipelines.precision"},
    "pipelines.metadata": set(),
    "pipelines.sanitizing": {
        "autoencoders", "decoding", "errors", "images", "pipelines.metadata", "pipelines.precision", "pipelines.swapping",
    },
    "pipelines.formats": {"checkpoints", "pipelines.metadata"},
    "pipelines.files": {"decoding", "errors", "pipelines.formats", "pipelines.metadata", "pipelines.sanitizing"},
    "pipelines.__main__": {
        "command_line", "decoding", "errors", "listing", "pipelines.files", "pipelines.formats", "pipelines.sanitizing",
        "pipelines.swapping", "resources",
    },
    "journal": {"checkpoints"},
    "evaluation.judge": {
        "autoencoders", "checkpoints", "codecs", "evaluation.reconstruction", "evaluation.report", "losses",
    },
    "hub": set(),
    "markdown": set(),
    "hub.card": {"images", "markdown"},
    "hub.contents": {"autoencoders", "errors", "hub.card", "integrity"},
    "hub.publishing": {"errors", "hub.contents"},
    "hub.__main__": {"autoencoders", "command_line", "hub.contents", "hub.publishing"},
}  # fmt: skip


def module_name(path: Path, root: Path = ROOT) -> str:
    """`srl_utils/attacks/__init__.py` as `srl_utils.attacks`."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(source: str, package: str, modules: set[str]) -> Iterator[str]:
    """Full names that a file imports, at any depth; `from a import b` is `a.b` where that is one of `modules`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base


def project_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


UTILITIES = project_files("srl_utils")
MODULES = {module_name(path) for path in UTILITIES}


def imports_of(path: Path) -> set[str]:
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    return set(imported_modules(path.read_text(encoding="utf-8"), package, MODULES))


def inside(imports: set[str], package: str) -> set[str]:
    return {name for name in imports if name == package or name.startswith(f"{package}.")}


@pytest.mark.parametrize("path", UTILITIES, ids=module_name)
def test_module_imports_only_what_it_may(path: Path) -> None:
    """Oracle: the table above, the architecture's arrows; a file that is not in it fails."""
    name = module_name(path).removeprefix("srl_utils").removeprefix(".")
    assert name in ALLOWED, f"{name} has to be entered in the table of this test"
    used = {module.removeprefix("srl_utils.") for module in inside(imports_of(path), "srl_utils")}
    assert used <= ALLOWED[name]


def test_table_has_no_circle() -> None:
    """Oracle: a graph whose arrows point one way can be taken apart leaf by leaf."""
    left = {name: set(allowed) for name, allowed in ALLOWED.items()}
    while left:
        leaves = {name for name, allowed in left.items() if not allowed & left.keys()}
        assert leaves, f"circle among {sorted(left)}"
        left = {name: allowed for name, allowed in left.items() if name not in leaves}


def test_utilities_never_import_the_miniature_world() -> None:
    """Oracle: specification, the miniature may import srl_utils and never the other way round."""
    assert UTILITIES
    assert not [path for path in UTILITIES if inside(imports_of(path), "miniature")]


def test_nothing_imports_the_training_script() -> None:
    """Oracle: specification; the script is started, and imported by tests alone."""
    files = [*project_files("srl_utils", "miniature", "benchmarks"), *ROOT.glob("*.py")]
    assert not [path for path in files if inside(imports_of(path), TRAINING)]


@pytest.mark.parametrize(
    ("source", "package", "expected"),
    [
        ("import srl_utils.images.pixels", "srl_utils", {"srl_utils.images.pixels"}),
        ("from srl_utils import images as i", "srl_utils", {"srl_utils.images.pixels"}),
        ("from srl_utils.images.pixels import to_pil", "srl_utils", {"srl_utils.images.pixels"}),
        ("from . import images", "srl_utils", {"srl_utils.images.pixels"}),
        ("from ..images import to_pil", "srl_utils.attacks", {"srl_utils.images.pixels"}),
        ("def late():\n    from srl_utils.images.pixels import to_pil", "srl_utils", {"srl_utils.images.pixels"}),
        ("import numpy as np", "srl_utils", {"numpy"}),
    ],
)
def test_every_way_to_import_is_seen(source: str, package: str, expected: set[str]) -> None:
    """Oracle: closed form, the language's own rules for absolute, relative, renamed and late imports."""
    assert set(imported_modules(source, package, {"srl_utils.images.pixels"})) == expected
