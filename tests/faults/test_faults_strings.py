"""Names that would be paths, markup or code, and tokens that must be nowhere."""

from __future__ import annotations

import ast
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.cards import FULL
from helpers.runs import Run
from huggingface_hub import ModelCard

from srl_utils.errors import one_line, without_tokens
from srl_utils.evaluation.__main__ import main as evaluate
from srl_utils.hub.card import render_card

MARKER = "hf_MarkerMarkerMarker"
SECRET = "only-in-the-environment-4711"
HOSTILE = [
    "../../x", "/etc/passwd", "..", "<script>alert(1)</script>", "---", "a\n---\nlicense: evil", "a\n# heading", "'; ls",
    "{{ 7 * 7 }}", "`code`", '"); import os; os.system("touch x")#', "x" * 200, "%s%n", "\x1b[31mred", "\u202eright",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_card_takes_any_name(name: str) -> None:
    """Oracle: the card's own parsers. The metadata is YAML that says the names, headings and code are the template's."""
    facts = replace(FULL, model_id=name, base_model=name, data=name, dataset=name, subfolder=name)
    card, harmless = ModelCard(render_card(facts)), ModelCard(render_card(replace(FULL, subfolder="vae")))
    assert set(card.data.to_dict()) <= set(harmless.data.to_dict())
    assert card.data.datasets == [name] and card.data.license == harmless.data.license
    headings = [re.findall(r"^#+ .*", text, re.M) for text in (card.text, harmless.text)]
    assert headings[0][1:] == headings[1][1:]
    assert "<script" not in prose(card.text) and "49" not in headings[0][0]
    for ours, theirs in zip(*(python_in(text) for text in (card.text, harmless.text)), strict=True):
        assert [type(node) for node in ast.walk(ours)] == [type(node) for node in ast.walk(theirs)]


def python_in(text: str) -> list[ast.Module]:
    return [ast.parse(code) for code in re.findall(r"```python\n(.*?)```", text, re.S)]


def prose(text: str) -> str:
    """`text` without its code, in which nothing is markup."""
    return re.sub(r"`[^`\n]+`", "", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))


def test_names_of_vaes_cannot_leave_the_folder_nor_be_taken_for_each_other(vae_folder: Path, tmp_path: Path) -> None:
    """Oracle: the files before and after, and rows of each name. `a b` and `a_b` once shared a file."""
    names = [*(name.replace("---", "x---") for name in HOSTILE), "a b", "a_b"]
    inside = tmp_path / "inside"
    inside.mkdir()
    code = evaluate([
        "reconstruction", "--baseline", str(vae_folder), "--vae", *(f"{name}={vae_folder}" for name in names),
        "--dataset_name", "scikit-image", "--resolution", "16", "--num_images", "1", "--attacks", "pgd-1", "--epsilons",
        "8/255", "--metrics", "psnr", "--threat_models", "adaptive", "--no_checks", "--output_dir", str(inside / "out"),
    ])  # fmt: skip
    assert code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"inside"} and [p.name for p in inside.iterdir()] == ["out"]
    rows = json.loads((inside / "out/results.json").read_text())
    assert sorted(row["vae"] for row in rows) == sorted([*names, "original"])
    assert "<script>alert" not in (inside / "out/report.html").read_text(encoding="utf-8")


def test_training_on_hostile_places(
    run: Run, flags: list[str], photographs: Path, vae_folder: Path, tmp_path: Path
) -> None:
    """Oracle: the files of a harmless run, all within the output folder; the card's metadata is still YAML."""
    photos, vae = tmp_path / "<b>photos\n---\nx: y", tmp_path / "---\nlicense: evil"
    shutil.copytree(photographs, photos)
    shutil.copytree(vae_folder, vae)
    out = tmp_path / '"); evil("\n# x'
    code, printed = run(
        *flags, "--train_data_dir", photos, "--pretrained_model_name_or_path", vae, "--output_dir", out,
        "--report_to", "tensorboard",
    )  # fmt: skip
    assert code == 0, printed
    assert {path.name for path in tmp_path.iterdir()} == {photos.name, vae.name, out.name}
    card = ModelCard.load(out / "README.md")
    assert "x" not in card.data.to_dict() and card.data.to_dict().get("license") is None
    assert "<b>" not in prose(card.text)


def test_no_token_and_no_variable_is_written_or_printed(
    run: Run, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: a search for both in every byte that the run has written or printed."""
    monkeypatch.setenv("HF_TOKEN", MARKER)
    monkeypatch.setenv("SOME_SECRET", SECRET)
    code, printed = run(*flags, "--report_to", "tensorboard", "--checkpointing_steps", "2")
    assert code == 0
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    for secret in (MARKER, SECRET):
        assert secret not in printed and secret.encode() not in written


@pytest.mark.parametrize(
    "mistake",
    [
        ["--hub_tokn", MARKER], [f"--hub_tokn={MARKER}"], ["--push_to_hub", "--hub_token", MARKER], ["--hub_token", MARKER],
        ["--hub_token", MARKER, ""], ["--seed", MARKER], ["--push_to_hub", "--hub_token", MARKER, "--report_to", "wandb"],
    ],
)  # fmt: skip
def test_no_token_in_an_error(mistake: list[str], run: Run, flags: list[str]) -> None:
    """Oracle: a search in what is printed; each mistake ends in one line."""
    code, printed = run(*flags, *mistake)
    assert code == 2 and MARKER not in printed and printed.count("error: ") == 1, printed


def test_one_line_is_one_line_anywhere() -> None:
    """Oracle: str.splitlines, UTF-8 and a terminal's escape character."""
    text = one_line("a\nb\r\x1b[31m\u2028c\udcff\x85d \u00e9\U0001f600")
    assert text == "a\\nb\\r\\x1b[31m\\u2028c\\udcff\\x85d \u00e9\U0001f600"
    assert len(text.splitlines()) == 1 and text.encode()
    assert without_tokens(f"no such flag --x {MARKER}; hf_hub") == "no such flag --x hf_***; hf_hub"
