"""The wheel: it is built, installed where the repository is out of sight, and used there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from zipfile import ZipFile

import pytest
from helpers.cards import FULL
from helpers.hub_server import HubServer
from helpers.runs import ROOT, build_tiny_vae
from PIL import Image
from skimage import data

from srl_utils.hub.card import render_card
from srl_utils.vae.loading import WEIGHTS_NAME, save_autoencoder

Installed = Callable[..., str]
"""Runs the Python that has the wheel, in an empty folder, and returns what it printed."""

BUILD_SDIST = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
PUBLISH_WITH_CARD = """
import sys
from dataclasses import replace
from pathlib import Path
from cards import FULL
from srl_utils.hub.card import render_card
from srl_utils.hub.publishing import Publisher
folder, weights, checksum = Path(sys.argv[1]), *sys.argv[2:]
card = render_card(replace(FULL, weights={weights: checksum}))
(folder / "README.md").write_text(card, encoding="utf-8")
sys.exit(not Publisher("user/model", folder, token=None, private=False).publish_result())
"""


def check_run(command: list[object], **settings: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=200, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the source archive of a copy of the repository."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "copy"
    shutil.copytree(ROOT / "srl_utils", copy / "srl_utils", symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "requirements", copy / "requirements")
    for path in filter(Path.is_file, ROOT.iterdir()):
        shutil.copy(path, copy)
    archive = check_run([sys.executable, "-c", BUILD_SDIST, folder], cwd=copy).splitlines()[-1]
    check_run(
        [
            sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation",
            "--wheel-dir", folder, folder / archive,
        ]
    )  # fmt: skip
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv/bin/python"
    check_run([sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel])
    packages = next((folder / "venv").glob("lib/python*/site-packages"))
    (packages / "others.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    (folder / "empty").mkdir()

    def run(*arguments: object, **environment: str) -> str:
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return check_run([python, *arguments], cwd=folder / "empty", env={**inherited, **environment})

    assert Path(run("-c", "import srl_utils; print(srl_utils.__file__)").strip()).is_relative_to(packages)
    return run


@pytest.fixture(scope="module")
def vae_at(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    save_autoencoder(build_tiny_vae(), folder)
    return folder


def test_wheel_has_the_code_the_licence_and_the_extras(wheel: Path) -> None:
    """Oracle: the repository's files, and the specification of the extras."""
    with ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = next(archive.read(name) for name in names if name.endswith("METADATA")).decode()
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "srl_utils").rglob("*.py")} <= names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"srl_utils"}
    assert {f"srl_utils/app/examples/{name}" for name in ("scene.png", "protected.png", "results.json")} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    for line in (
        "License-Expression: Apache-2.0",
        'Requires-Dist: peft>=0.17; extra == "eval"',
        "Requires-Dist: torch>=",
    ):
        assert line in metadata
    for extra in ("app", "eval", "heif", "maps", "video", "dev"):
        assert f"Provides-Extra: {extra}" in metadata


def test_wheel_evaluates_and_writes_the_report(installed: Installed, vae_at: Path, tmp_path: Path) -> None:
    """Oracle: specification; the rows of both attacks, and a page with its style and its script."""
    installed(
        "-m", "srl_utils.evaluation", "reconstruction", "--baseline", vae_at, "--vae", f"same={vae_at}",
        "--dataset_name", "scikit-image", "--resolution", "16", "--num_images", "1", "--attacks", "clean", "pgd-2",
        "--epsilons", "8/255", "--metrics", "psnr", "--no_checks", "--output_dir", tmp_path / "out",
    )  # fmt: skip
    rows = json.loads((tmp_path / "out/results.json").read_text())
    assert {(row["vae"], row["attack"]) for row in rows} >= {("same", "clean"), ("same", "pgd-2")}
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    for name in ("report.css", "report.js"):
        assert (ROOT / "srl_utils/evaluation/report/templates" / name).read_text(encoding="utf-8").strip() in page


def test_wheel_sanitizes(installed: Installed, vae_at: Path, tmp_path: Path) -> None:
    """Oracle: the size of the photograph; its pixels change."""
    photograph = Image.fromarray(data.astronaut()).resize((32, 24))
    photograph.save(tmp_path / "photograph.png")
    installed(
        "-m", "srl_utils.pipelines", "sanitize", tmp_path / "photograph.png", tmp_path / "clean.png", "--vae", vae_at
    )
    with Image.open(tmp_path / "clean.png") as clean:
        assert clean.size == photograph.size and clean.tobytes() != photograph.tobytes()


def test_wheel_renders_a_card_and_publishes_it(installed: Installed, vae_at: Path, tmp_path: Path) -> None:
    """Oracle: the card that the repository renders of the same facts, and the files on a local Hub."""
    folder = shutil.copytree(vae_at, tmp_path / "vae")
    checksum = sha256((folder / WEIGHTS_NAME).read_bytes()).hexdigest()
    with HubServer() as hub:
        variables = {**hub.environment(tmp_path / "home"), "PYTHONPATH": str(ROOT / "tests/helpers")}
        installed("-c", PUBLISH_WITH_CARD, folder, WEIGHTS_NAME, checksum, **variables)
        published = hub.repositories["user/model"].find("main").files
    card = render_card(replace(FULL, weights={WEIGHTS_NAME: checksum}))
    assert published["README.md"] == card.encode()
    assert WEIGHTS_NAME in published
