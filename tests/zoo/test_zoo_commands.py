"""The zoo's commands on a small VAE: measuring, weights on demand, and submitting."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from helpers.runs import ROOT, build_tiny_vae
from helpers.zoo import entry, write_entry
from PIL import Image

from srl_utils.command_line import message_of
from srl_utils.errors import UserError
from srl_utils.files import read_json
from srl_utils.vae.loading import save_autoencoder
from srl_utils.zoo import measuring
from srl_utils.zoo.__main__ import main
from srl_utils.zoo.protocols import PROTOCOLS

Zoo = Callable[..., str]
"""Runs a command of the zoo and returns what it printed."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A zoo with the embedded images and no entries."""
    (tmp_path / "zoo/entries").mkdir(parents=True)
    (tmp_path / "zoo/images").symlink_to(ROOT / "zoo/images")
    return tmp_path / "zoo"


@pytest.fixture
def zoo(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Zoo:
    def call(command: str, *words: object) -> str:
        for state in (AcceleratorState, PartialState, GradientState):
            monkeypatch.setattr(state, "_shared_state", {})
        place = ["--output_dir", folder.parent / "out"] if command == "evaluate" else []
        assert main([str(word) for word in (command, *words, "--zoo", folder, *place)]) == 0
        return capsys.readouterr().out

    return call


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the protocol be short, so that its rows can be submitted."""
    monkeypatch.setitem(PROTOCOLS, "embedded", PROTOCOLS["embedded"].quick)


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo") / "tiny"
    save_autoencoder(build_tiny_vae(), folder)
    return folder


def row_of(folder: Path, name: str) -> dict:
    return json.loads((folder.parent / "out" / name / "row.json").read_text())


def test_a_folder_is_measured_as_the_evaluation_does(zoo: Zoo, folder: Path, vae: Path, tmp_path: Path) -> None:
    """Oracle: the results of the evaluation's own command in the row's folder; both threat models count."""
    other = tmp_path / "base"
    save_autoencoder(build_tiny_vae(seed=1), other)
    printed = zoo("evaluate", vae, "--base", other, "--protocol", "embedded", "--quick")
    row, results = row_of(folder, "tiny/quick"), read_json(tmp_path / "out/tiny/quick/evaluation/results.json")
    assert row["results"] == [result for result in results if result["vae"] == "tiny"]
    attacked = [
        result["value"] for result in row["results"] if result["attack"] == "pgd-2" and result["metric"] == "psnr"
    ]
    assert len(attacked) == 2 and f"worst case {min(attacked):.2f} dB" in printed
    assert row["encoder_ms"] > 0 and row["fingerprint"] != PROTOCOLS["embedded"].fingerprint
    digests = read_json(tmp_path / "out/tiny/quick/evaluation/study.json")["vaes"]
    assert (row["base"], row["base_digest"], row["digest"]) == (str(other), digests["original"], digests["tiny"])


def test_a_quick_measurement_leaves_the_whole_one_alone(
    zoo: Zoo, folder: Path, vae: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the number of images of each row; both are measured, and the time of the encoder is that of this call."""
    monkeypatch.setitem(PROTOCOLS, "embedded", replace(PROTOCOLS["embedded"].quick, num_images=3))
    zoo("evaluate", vae, "--protocol", "embedded", "--quick")
    kept = folder.parent / "out/tiny/timings.json"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text(json.dumps({"purifiers": {}, "encoders": {"tiny": 1e9}, "device": "another", "n": 4}))
    zoo("evaluate", vae, "--protocol", "embedded")
    whole, quick = row_of(folder, "tiny"), row_of(folder, "tiny/quick")
    assert {result["n"] for result in whole["results"]} == {3} and {result["n"] for result in quick["results"]} == {2}
    assert whole["encoder_ms"] < 1e9 and whole["device"] != "another"


def test_the_checks_of_a_row_are_those_of_the_evaluation(
    zoo: Zoo, folder: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the sentence on the checks that the evaluation prints; a file of another protocol beside them is not read.

    Then the row is submitted, and the entry gets the digest of its base; a row of other weights of the base is refused.
    """
    protocol = replace(PROTOCOLS["embedded"].quick, check_images=1, resolution=16)
    monkeypatch.setitem(PROTOCOLS, "embedded", protocol)
    stale = tmp_path / "out/tiny/evaluation/checks" / f"1-{8 / 255!r}-2-10-50-200-500.json"
    stale.parent.mkdir(parents=True)
    stale.write_text(json.dumps([{"question": "stale", "passed": False, "figures": ""}]))
    other = tmp_path / "base"
    save_autoencoder(build_tiny_vae(seed=1), other)
    printed = zoo("evaluate", vae, "--base", other, "--protocol", "embedded")
    row, said = row_of(folder, "tiny"), re.search(r"checks of the robustness FAILED \((.*)\)\.", printed)
    failed = [part.removeprefix("tiny: ") for part in said[1].split("; ")] if said else []
    assert row["failed_checks"] == failed and (said or "All checks of the robustness passed" in printed)
    path, measured = (
        write_entry(tmp_path / "new", name="tiny", weights=str(vae), base=str(other)),
        tmp_path / "out/tiny/row.json",
    )
    measured.write_text(json.dumps({**row, "base_digest": "0" * 16}))
    with pytest.raises(UserError, match="the weights of the base have the digest"):
        zoo("submit", path, measured)
    measured.write_text(json.dumps(row))
    zoo("submit", path, measured)
    assert yaml.safe_load((folder / "entries/tiny.yaml").read_text())["base_digest"] == row["base_digest"]


def test_other_weights_than_the_entrys_are_refused(zoo: Zoo, folder: Path, vae: Path) -> None:
    """Oracle: one line with both digests, before anything is measured."""
    write_entry(folder, weights=str(vae), digest="f" * 16)
    with pytest.raises(UserError, match=r"small: the weights have the digest [0-9a-f]{16}, and the entry has f{16}$"):
        zoo("evaluate", "small", "--quick")
    assert not (folder.parent / "out").exists()


def test_other_images_than_the_protocols_are_refused(zoo: Zoo, folder: Path, vae: Path) -> None:
    """Oracle: one changed pixel."""
    (folder / "images").unlink()
    (folder / "images/embedded").mkdir(parents=True)
    for path in (ROOT / "zoo/images/embedded").iterdir():
        image = Image.open(path).convert("RGB")
        if path.name == "scene-07.png":
            image.putpixel((5, 5), (1, 2, 3))
        image.save(folder / "images/embedded" / path.name)
    with pytest.raises(UserError, match=r"the images have the digest \w+, and those of the protocol have"):
        zoo("evaluate", vae, "--protocol", "embedded")


def test_weights_are_made_once(
    zoo: Zoo, folder: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the number of calls of the command, of which the first one is interrupted; only a measurement makes them."""
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "train_srl_vae.py"
    script.write_text(
        "import shutil, sys; from pathlib import Path\n"
        "calls = Path(sys.argv[1]); calls.write_text((calls.read_text() if calls.exists() else '') + 'x')\n"
        "if calls.read_text() == 'x': sys.exit(7)\n"
        "shutil.copytree(sys.argv[2], sys.argv[4]); Path(sys.argv[4], 'README.md').touch()\n"
    )
    calls, made = tmp_path / "calls", tmp_path / "made"
    command = f"python train_srl_vae.py {calls} {vae} --output_dir {made}"
    path = write_entry(folder, weights=str(made), command=command)
    assert f"would be made first, by {command}" in zoo("evaluate", "small", "--quick", "--dry_run")
    with pytest.raises(UserError, match=r"there are no finished weights in [^;]*; make them first"):
        zoo("submit", path, "row.json", "--dry_run")
    assert not calls.exists()
    with pytest.raises(UserError, match="small: its command ended with the exit code 7"):
        zoo("evaluate", "small", "--quick")
    for _ in range(2):
        zoo("evaluate", "small", "--quick")
    assert calls.read_text() == "xx"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["small", "--base", "x"], "--base: has no effect on small"),
        (["elsewhere"], "choose a --protocol: embedded, full"),
        (["___", "--protocol", "embedded"], "___: a VAE is named like its folder"),
        (["x/original", "--base", "x", "--protocol", "embedded"], "name: evaluations call the base original"),
    ],
)
def test_bad_calls_get_one_line(zoo: Zoo, folder: Path, words: list[str], message: str) -> None:
    """Oracle: specification."""
    write_entry(folder)
    with pytest.raises(UserError) as caught:
        zoo("evaluate", *words)
    assert message in message_of(caught.value)


@pytest.mark.usefixtures("quick")
def test_an_entry_is_submitted_with_its_row(zoo: Zoo, folder: Path, vae: Path, tmp_path: Path) -> None:
    """Oracle: the files in the zoo are those submitted, with the digest of the weights; then the row is listed."""
    zoo("evaluate", vae, "--protocol", "embedded")
    row = tmp_path / "out/tiny/row.json"
    path = write_entry(tmp_path / "new", name="tiny", weights=str(vae))
    assert "tiny" not in zoo("list")
    text = zoo("submit", path, row, "--pull_request")
    assert (
        text.startswith("Zoo: add tiny\n") and row.read_text().rstrip() in text and not list(folder.glob("entries/*"))
    )
    zoo("submit", path, row, "--dry_run")
    assert not list(folder.glob("entries/*"))
    zoo("submit", path, row)
    assert (folder / "rows/tiny.json").read_text() == row.read_text()
    written = yaml.safe_load((folder / "entries/tiny.yaml").read_text())
    assert written == {**yaml.safe_load(path.read_text()), "digest": json.loads(row.read_text())["digest"]}
    assert "| tiny |" in zoo("list").replace("  ", "") and "not measured" not in zoo("list")
    page = tmp_path / "leaderboard.md"
    page.write_text((ROOT / "docs/leaderboard.md").read_text())
    zoo("leaderboard", "--output_dir", tmp_path)
    assert "| tiny " in page.read_text() and (tmp_path / "zoo.html").is_file()


@pytest.mark.usefixtures("quick")
def test_submissions_that_do_not_belong_together_are_refused(zoo: Zoo, folder: Path, vae: Path, tmp_path: Path) -> None:
    """Oracle: specification: the row's weights, protocol, images and name are those of the entry."""
    zoo("evaluate", vae, "--protocol", "embedded")
    row = tmp_path / "out/tiny/row.json"
    measured = json.loads(row.read_text())
    path = write_entry(tmp_path / "new", name="tiny", weights=str(vae))
    for changes, message in (
        ({"digest": "0" * 16}, "the weights have the digest"),
        ({"fingerprint": "0" * 16}, "another version of the protocol"),
        ({"name": "other"}, "the row has the name other"),
    ):
        row.write_text(json.dumps({**measured, **changes}))
        with pytest.raises(UserError, match=message):
            zoo("submit", path, row)
    row.write_text(json.dumps(measured))
    (folder / "rows").mkdir()
    (folder / "rows/first.json").write_text(json.dumps({**measured, "name": "first", "images": "0" * 16}))
    with pytest.raises(UserError, match="those of the row of first have 0000"):
        zoo("submit", path, row)
    assert not list(folder.glob("entries/*"))


@pytest.mark.usefixtures("quick")
def test_the_entry_of_another_vae_stays(zoo: Zoo, folder: Path, vae: Path, tmp_path: Path) -> None:
    """Oracle: specification: the name is taken; nothing is written, neither there nor where there is no zoo."""
    zoo("evaluate", vae, "--protocol", "embedded")
    row = tmp_path / "out/tiny/row.json"
    path = write_entry(tmp_path / "new", name="tiny", weights=str(vae))
    kept = write_entry(folder, name="tiny", weights="user/tiny").read_text()
    with pytest.raises(UserError, match="the zoo has an entry tiny with the weights user/tiny; choose another name"):
        zoo("submit", path, row)
    assert (folder / "entries/tiny.yaml").read_text() == kept and not (folder / "rows").exists()
    with pytest.raises(UserError, match="run this in a clone of the repository"):
        main(["submit", str(path), str(row), "--zoo", str(tmp_path / "nowhere")])
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("line", ['"digest": null', "digest : null", "digest:\n  null"])
@pytest.mark.usefixtures("quick")
def test_digests_are_entered_or_refused(line: str, zoo: Zoo, vae: Path, tmp_path: Path) -> None:
    """Oracle: specification: no entry is written without its digest."""
    zoo("evaluate", vae, "--protocol", "embedded")
    path = write_entry(tmp_path / "new", name="tiny", weights=str(vae))
    path.write_text(path.read_text().replace("\ndigest: null", f"\n{line}"))
    with pytest.raises(UserError, match="cannot enter digest; write each on a line of its own"):
        zoo("submit", path, tmp_path / "out/tiny/row.json")


def test_a_quick_row_is_not_submitted(zoo: Zoo, vae: Path, tmp_path: Path) -> None:
    """Oracle: specification."""
    zoo("evaluate", vae, "--protocol", "embedded", "--quick")
    with pytest.raises(UserError, match="another version of the protocol"):
        zoo(
            "submit", write_entry(tmp_path / "new", name="tiny", weights=str(vae)), tmp_path / "out/tiny/quick/row.json"
        )


def test_commands_run_with_this_python(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Oracle: the words of the process, which are printed first; no shell reads them."""
    seen: list[list[str]] = []
    monkeypatch.setattr(measuring, "run_to_its_end", lambda words: seen.append(words) or 0)
    measuring.make(entry(command="python train_srl_vae.py 'a b' ; echo"))
    assert seen == [[sys.executable, "train_srl_vae.py", "a b", ";", "echo"]]
    assert "python train_srl_vae.py 'a b' ; echo" in capsys.readouterr().out


SAVES = """
import signal, sys, time
from pathlib import Path
def save(number, frame):
    time.sleep(1)  # more than the quarter of a second that subprocess.run leaves
    Path("checkpoint").write_text(str(number))
    sys.exit(128 + number)
signal.signal(signal.SIGINT, save), signal.signal(signal.SIGTERM, save)
Path("started").touch()
time.sleep(60)
"""
RUNS = (
    "import sys; from srl_utils.zoo.measuring import run_to_its_end as run; sys.exit(run([sys.executable, 'saves.py']))"
)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_training_saves_its_checkpoint(number: signal.Signals, tmp_path: Path) -> None:
    """Oracle: what a program saves that needs a second for it. Ctrl-C reaches both processes, SIGTERM the first alone."""
    (tmp_path / "saves.py").write_text(SAVES)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", RUNS], cwd=tmp_path, env=environment, start_new_session=True
    ) as process:
        while not (tmp_path / "started").exists():
            time.sleep(0.05)
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        assert process.wait(60) == 128 + number
    assert (tmp_path / "checkpoint").read_text() == str(int(number))


@pytest.mark.parametrize(
    ("place", "name"), [("user/Small.VAE_2", "small-vae-2"), ("user/a--b-", "a-b"), ("user/Ünder", "nder"), ("___", "")]
)
def test_names_come_from_places(place: str, name: str) -> None:
    """Oracle: specification: lower-case ASCII letters and digits, with single dashes between."""
    assert measuring.name_of(place) == name
