"""The model card: what is known of a run, and nothing else."""

from __future__ import annotations

import inspect
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from diffusers import AutoencoderKL, DiffusionPipeline
from helpers.cards import ATTACKS, COMMAND, FINE_TUNED, FULL, HEADINGS, MINIMAL, ORIGINAL, RESULTS, rows, with_results
from helpers.hub_server import HubServer
from huggingface_hub import ModelCard
from PIL import Image

from srl_utils.hub.card import CardFacts, base_license, recorded_weights, render_card

EARLY = with_results(FULL, [*rows(ORIGINAL), *rows(FINE_TUNED, ("clean", "pgd-10"), shift=1.2345)])


@pytest.fixture
def minimal(vae_folder: Path) -> CardFacts:
    """Before the first judgement, with a base in a folder that says nothing of itself."""
    return replace(MINIMAL, base_model=str(vae_folder))


def prose(card: str) -> str:
    """The card without metadata and code."""
    return re.sub(r"```.*?```", "", ModelCard(card).text, flags=re.DOTALL)


def sections(card: str) -> dict[str, str]:
    """What stands under each heading, code included."""
    text = re.sub(r"(```.*?```)", lambda code: code[1].replace("\n#", "\n "), ModelCard(card).text, flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return dict(zip(titles, re.split(r"^#+ .+$", text, flags=re.MULTILINE)[1:], strict=True))


def code(card: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", card, flags=re.DOTALL)


# --- files for other programs -----------------------------------------------------------------------------


def test_a_card_says_where_a_single_file_goes() -> None:
    """Oracle: the folders that ComfyUI, A1111 and Forge read VAEs from. A1111 has no Flux; no program reads other shapes,
    and a card without such a file names none.
    """
    weights = {"diffusion_pytorch_model.safetensors": "0" * 64, "srl_vae.safetensors": "1" * 64}
    folders = {"ComfyUI": "models/vae", "A1111": "models/VAE", "Forge": "models/VAE"}
    for family, unread in (("sd", []), ("flux", ["A1111"]), (None, [*folders])):
        card = render_card(replace(FULL, weights=weights, family=family))
        rows = dict(re.findall(r"^\| (\w+) \| `(\S+)` \| \S.* \|$", card, flags=re.MULTILINE))
        assert rows == {name: folder for name, folder in folders.items() if name not in unread}
        told = re.search(r"^(.*) cannot use this VAE: .*\.$", card, flags=re.MULTILINE)
        assert re.findall(r"\w+(?=,| and|$)", told[1] if told else "") == unread
        assert recorded_weights(card) == weights and list(sections(card)) == ["robust", *HEADINGS]
    assert "ComfyUI" not in render_card(FULL)


# --- the text ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("facts", [FULL, EARLY], ids=["all results", "after the first validation"])
def test_sections_of_a_judged_card(facts: CardFacts) -> None:
    """Oracle: specification, the list of sections; each has words of its own."""
    parts = sections(render_card(facts))
    assert list(parts) == ["robust", *HEADINGS]
    assert all(re.search(r"\w{2}", body) for body in parts.values())


def test_sections_of_a_minimal_card(minimal: CardFacts) -> None:
    """Oracle: specification; what is not known has no section, and what remains is not empty."""
    parts = sections(render_card(minimal))
    assert list(parts) == ["robust", *(heading for heading in HEADINGS if "protects" not in heading)]
    assert all(re.search(r"\w{2}", body) for body in parts.values())
    assert "None yet" in parts["Results"]
    assert "minutes" not in parts["Training"]
    assert "![" not in parts["robust"]
    assert 'variant="' not in parts["How to use it"]


@pytest.mark.parametrize("which", ["full", "early", "minimal", "with weights"])
def test_the_markdown_is_well_formed(which: str, minimal: CardFacts) -> None:
    """Oracle: the rules of Markdown: blank lines around every block, fences in pairs; and nothing is left unfilled."""
    saved = replace(FULL, weights={"a.safetensors": "0" * 64})
    card = render_card({"full": FULL, "early": EARLY, "minimal": minimal, "with weights": saved}[which])
    assert not re.search(r"\{\{|\}\}|\{%|%\}|\bNone\b(?! yet)|\n\n\n", card)
    assert card.count("```") % 2 == 0
    lines = prose(card).splitlines()
    for before, line in pairwise(lines):
        assert not before.startswith("#") or not line, line
        for start in ("#", "|", "- ", "!["):
            if line.startswith(start):
                assert not before or before.startswith((start, "  ")), line


def test_what_a_full_card_says() -> None:
    """Oracle: the facts, each in its section; the arguments and the command can be read back."""
    parts = sections(render_card(FULL))
    assert "[stabilityai/stable-diffusion-2](https://huggingface.co/stabilityai/stable-diffusion-2)" in parts["robust"]
    assert "(`vae`)" in parts["robust"]
    assert "](samples/comparison.png)" in parts["robust"]
    assert FULL.results_table in parts["Results"]
    assert "16 held-out images at 64 px" in parts["Results"]
    for fact in ("100 steps of 8 images", "12.3 minutes", "1 x CPU, 2 threads", "Data: COCO", "torch 2.15.0"):
        assert fact in parts["Training"]
    (arguments,), (command,) = code(parts["Training"], "json"), code(parts["Training"], "bash")
    assert json.loads(arguments) == {"epsilon": 0.03}
    assert shlex.split(command) == shlex.split(COMMAND)
    assert "2504.17219" in parts["Citation"]


def test_a_local_base_is_not_named_as_one_of_the_hub(minimal: CardFacts) -> None:
    """Oracle: the path, of which a card tells the last part alone, and without a link."""
    card = render_card(minimal)
    folder = Path(minimal.base_model)
    assert f"`{folder.name}`" in sections(card)["robust"]
    assert str(folder.parent) not in card
    assert "huggingface.co" not in card
    assert ModelCard(card).data.base_model is None
    assert "base_model_relation" not in ModelCard(card).data.to_dict()


def test_the_snippets_run(vae_folder: Path, tiny_vae: AutoencoderKL) -> None:
    """Oracle: Python itself, with the drop-in in a folder and a pipeline that only hands on the image."""

    class Echo(DiffusionPipeline):
        def __init__(self, vae: AutoencoderKL) -> None:
            super().__init__()
            self.register_modules(vae=vae)

        def __call__(self, prompt: str, image: Image.Image) -> SimpleNamespace:
            return SimpleNamespace(images=[image, self.vae.config["scaling_factor"]])

    snippets = code(render_card(replace(FULL, model_id=str(vae_folder))), "python")
    assert len(snippets) == 3
    photograph, pipe = Image.new("RGB", (17, 16)), Echo(AutoencoderKL.from_pretrained(vae_folder))
    names: dict[str, Any] = {"pipe": pipe, "photograph": photograph}
    for snippet in snippets:
        exec("\n".join(line for line in snippet.splitlines() if '"PIPELINE"' not in line), names)
    assert names["vae"].config.scaling_factor == 0.7
    assert names["edited"] is photograph
    assert names["clean"].size == photograph.size


@pytest.mark.parametrize(
    "weights", [{}, {"a.safetensors": "0" * 64}, {"a.safetensors": "0" * 64, "a.fp16.safetensors": "1" * 64}]
)
def test_the_weights_of_a_card_can_be_read_back(weights: dict[str, str]) -> None:
    """Oracle: the same files and checksums; a card by hand records none, and text beside the list is no record."""
    card = render_card(replace(FULL, weights=weights))
    assert recorded_weights(card) == weights
    assert recorded_weights(f"{card}\n- `note`: `by hand`\n") == weights
    assert recorded_weights("# Mine\n\n- `a.safetensors`: `" + "0" * 64 + "`\n") is None
    assert all(checksum in sections(card)["Training"] for checksum in weights.values())


# --- what is claimed --------------------------------------------------------------------------------------


def claims(results: list[dict[str, Any]]) -> set[str]:
    """Every number that these rows entitle a card to: values, bounds, and changes against the original."""
    bounds = [value for row in results for value in (row.value, *row.ci95)]
    psnr = {(row.vae, row.attack): row.value for row in results if row.metric == "psnr"}
    pairs = [(ORIGINAL, FINE_TUNED, attack) for attack in ATTACKS] + [(FINE_TUNED, "fine-tuned-fp16", "clean")]
    changes = [
        psnr[new, attack] - psnr[old, attack]
        for old, new, attack in pairs
        if {(old, attack), (new, attack)} <= psnr.keys()
    ]
    return {f"{abs(value):.{decimals}f}" for value in bounds + changes for decimals in (2, 3, 4)}


@pytest.mark.parametrize("missing", [None, *((vae, attack) for vae in (ORIGINAL, FINE_TUNED) for attack in ATTACKS)])
def test_every_number_has_its_row(missing: tuple[str, str] | None) -> None:
    """Oracle: the rows. Without those of a VAE under one attack, nothing that rests on them is said."""
    results = [row for row in RESULTS if (row.vae, row.attack) != missing]
    if missing == (FINE_TUNED, "clean"):
        results = [row for row in results if row.vae != "fine-tuned-fp16"]  # always measured after the full weights
    parts = sections(render_card(with_results(FULL, results)))
    said = set(
        re.findall(r"\d+\.\d{2,}", prose("".join(body for title, body in parts.items() if title in HEADINGS[:3])))
    )
    assert said <= claims(results)
    findings = parts["What it protects against, and what not"]
    complete = 4 if missing is None else 3
    assert len(re.findall(r"^- .* dB \(", findings, flags=re.MULTILINE)) == complete
    if missing is not None:
        assert not re.search(rf"^- {missing[1]}[,:]", findings, flags=re.MULTILINE)


@pytest.mark.parametrize(("shift", "verb"), [(1.2345, "gains 1.65 dB"), (-0.6, "loses 0.80 dB")])
def test_a_finding_is_the_difference_of_two_rows(shift: float, verb: str) -> None:
    """Oracle: closed form; a loss is called one, and the attack's budget is told in 255ths."""
    card = render_card(with_results(FULL, [*rows(ORIGINAL), *rows(FINE_TUNED, shift=shift)]))
    value = 30.123456 - 3.3
    assert f"- pgd-10, epsilon 8/255: {verb} ({value:.2f} to {value + shift * 4 / 3:.2f} dB)" in card


def test_a_variant_is_mentioned_with_its_measurement() -> None:
    """Oracle: the difference of the rows, 1.2221 - 1.2345 dB; without a row there is no mention."""
    usage = sections(render_card(FULL))["How to use it"]
    assert "- `fp16`: -0.012 dB PSNR" in usage
    assert "bf16" not in usage
    assert "fp16" not in render_card(EARLY)


# --- the metadata -----------------------------------------------------------------------------------------


def test_metadata_of_a_full_card() -> None:
    """Oracle: huggingface_hub, which reads the YAML back."""
    data = ModelCard(render_card(FULL)).data
    assert (data.library_name, data.base_model) == ("diffusers", "stabilityai/stable-diffusion-2")
    assert data.to_dict()["base_model_relation"] == "finetune"
    assert (data.license, data.license_name, data.license_link) == ("other", "some-licence", "LICENSE.md")
    assert data.datasets == ["detection-datasets/coco"]
    assert "srl-vae" in data.tags
    assert data.pipeline_tag is None  # it serves any pipeline


def test_the_model_index_is_the_rows() -> None:
    """Oracle: huggingface_hub, which reads it back: the judged VAE's rows and no others, an entry for each attack."""
    data = ModelCard(render_card(FULL)).data
    read = {(one.dataset_config, one.metric_type, one.metric_value) for one in data.eval_results}
    configurations = {name: f"{name}, epsilon 8/255" if epsilon else name for name, epsilon in ATTACKS.items()}
    expected = {(configurations[row.attack], row.metric, round(row.value, 4)) for row in rows(FINE_TUNED, shift=1.2345)}
    assert read == expected
    assert len(data.eval_results) == len(expected)
    (model,) = data.to_dict()["model-index"]
    assert model["name"] == "robust"
    assert [entry["dataset"]["config"] for entry in model["results"]] == list(configurations.values())
    assert {(one.dataset_type, one.dataset_name) for one in data.eval_results} == {("detection-datasets/coco", "COCO")}


def test_metadata_of_a_minimal_card(minimal: CardFacts) -> None:
    """Oracle: huggingface_hub; nothing is invented for what is not known."""
    data = ModelCard(render_card(minimal)).data.to_dict()
    assert set(data) == {"library_name", "tags"}


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: mit\ntags: [vae]\n---\n# Base", {"license": "mit"}),
        (
            "---\nlicense: other\nlicense_name: x\nlicense_link: L\n---\n",
            {"license": "other", "license_name": "x", "license_link": "L"},
        ),
        ("---\ntags: [vae]\n---\n", {}),
        ("# no metadata", {}),
        ("---\nlicense: [unclosed\n---\n", {}),
        (None, {}),
    ],
    ids=["short", "long", "no licence", "no metadata", "broken", "no card"],
)  # fmt: skip
def test_the_base_speaks_for_its_licence(tmp_path: Path, card: str | None, expected: dict[str, str]) -> None:
    """Oracle: the base's own README.md; where it says nothing, neither does the card."""
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    found = base_license(str(tmp_path))
    assert found == expected
    data = ModelCard(render_card(replace(FULL, base_license=found))).data.to_dict()
    assert {name: value for name, value in data.items() if name.startswith("license")} == expected


def test_an_unreachable_base_has_no_known_licence() -> None:
    """Oracle: the tests' environment, which is offline; the run goes on."""
    assert base_license("nobody/knows-this-model") == {}


@pytest.fixture
def validator(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A server that `ModelCard.validate` asks."""
    if "https://huggingface.co" in inspect.getsource(huggingface_hub.RepoCard.validate):
        pytest.skip(f"huggingface_hub {huggingface_hub.__version__} validates cards at huggingface.co alone")
    with HubServer() as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        yield server


def test_the_hub_takes_the_card(validator: HubServer, minimal: CardFacts) -> None:
    """Oracle: `ModelCard.validate` against the test server, which refuses a card whose base is no repository."""
    for facts in (FULL, EARLY, minimal):
        ModelCard(render_card(facts)).validate()
    assert validator.stages == ["validate-yaml"] * 3
    with pytest.raises(ValueError, match="base_model"):
        ModelCard(render_card(replace(FULL, base_model="no repository at all"))).validate()
