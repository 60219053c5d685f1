"""The app as a Space: what is published, by the real client against a server on localhost."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers.hub_server import HubServer, Status
from helpers.runs import ROOT

from srl_utils.errors import MissingFile
from srl_utils.hub.spaces import FOLDERS, PAGE, space_files

NAME = "user/srl-vae"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A repository with the folders of a Space, and little in them."""
    root = tmp_path / "clone"
    shutil.copytree(ROOT / "spaces", root / "spaces")
    shutil.copytree(ROOT / "requirements", root / "requirements")
    shutil.copy(ROOT / "requirements.txt", root)
    (root / "LICENSE").write_text("licence\n")
    for folder in FOLDERS:
        (root / folder / "__pycache__").mkdir(parents=True)
        (root / folder / "__pycache__/module.pyc").write_bytes(b"compiled")
        (root / folder / "config.json").write_text("{}")
    return root


def push(hub: HubServer, home: Path, root: Path, *flags: str) -> tuple[int, str]:
    """Run the command as if `root` were the clone."""
    code = (
        "import sys; from pathlib import Path; from srl_utils.hub import spaces, __main__ as hub; "
        "root = Path(sys.argv.pop(1)); hub.space_files = lambda: spaces.space_files(root); "
        "from srl_utils.command_line import exit_code; sys.exit(exit_code(hub.main))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(root), "push-space", "--repo_id", NAME, *flags], cwd=ROOT,
        env={**os.environ, **hub.environment(home)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_a_space_is_pushed_and_pushed_again(tmp_path: Path, clone: Path) -> None:
    """Oracle: the server's files: those of the clone, without what an earlier push left in the same folders."""
    with HubServer() as hub:
        (clone / "srl_utils/old.py").write_text("old = 1\n")
        code, printed = push(hub, tmp_path / "home", clone)
        assert code == 0, printed
        assert f"the page is at {hub.url}/spaces/{NAME}" in printed
        assert ("POST", "/api/repos/create") in hub.requests
        assert any(path.startswith(f"/api/spaces/{NAME}/commit/main") for _, path in hub.requests)
        assert "srl_utils/old.py" in hub.repositories[NAME].branches["main"].files
        (clone / "srl_utils/old.py").unlink()
        code, printed = push(hub, tmp_path / "home", clone, "--private")
        assert code == 0, printed
        repository = hub.repositories[NAME]
        assert repository.private
        assert set(repository.branches["main"].files) - {".gitattributes"} == {
            *PAGE, "LICENSE", "requirements.txt", *(f"{folder}/config.json" for folder in FOLDERS)
        }  # fmt: skip


def test_a_refused_push_is_one_line(tmp_path: Path, clone: Path) -> None:
    """Oracle: specification; the server refuses the commit."""
    with HubServer() as hub:
        hub.fail("commit", Status(403, {}, {"error": "no"}), times=None)
        code, printed = push(hub, tmp_path / "home", clone)
    assert code == 3 and "Traceback" not in printed
    assert f"error: the push of the app to {NAME} failed" in printed


def test_a_space_has_all_that_the_app_imports() -> None:
    """Oracle: the repository: the front matter's file and licence, the packages of each list, the embedded models."""
    files = space_files()
    front = yaml.safe_load((ROOT / "spaces/README.md").read_text(encoding="utf-8").split("---\n")[1])
    assert front["sdk"] == "gradio" and front["app_file"] in files
    assert front["license"] == "apache-2.0" and "Apache License" in files["LICENSE"].read_text(encoding="utf-8")
    requirements = files["requirements.txt"].decode()
    assert all(f"\n{name}>=" in requirements for name in ("torch", "transformers", "gradio"))
    assert "srl_utils/app/examples/scene.png" in files
    assert "miniature/weights/robust/pytorch_lora_weights.safetensors" in files
    assert not any("__pycache__" in name for name in files)
    imported = {
        node.names[0].name for node in ast.walk(ast.parse(files["app.py"].read_text())) if isinstance(node, ast.Import)
    }
    assert imported == {"runpy", "sys"}


def test_a_space_needs_a_clone(tmp_path: Path) -> None:
    """Oracle: specification, for an installed package."""
    with pytest.raises(MissingFile, match="run this command there"):
        space_files(tmp_path)
