"""Write the model card from the facts of a run."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download, metadata_load

from srl_utils.images.pixels import format_pixel_distance
from srl_utils.markdown import as_code, as_text
from srl_utils.vae.loading import SINGLE_FILE_NAME, UPDATES_NAME
from srl_utils.vae.single_file import programs_for, refusal

if TYPE_CHECKING:
    from srl_utils.evaluation.results import Row

TEMPLATE = "model_card.md"  # beside this file; in the repository, a link to the file at the top level
WEIGHTS_HEADING = "SHA-256 of the weights that this card describes"
LICENSE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """The facts on the card. Empty facts and None are left out.

    Attributes:
        vae_class: name of the class in diffusers.
        family: name in `MODELS` of the model whose VAE this is; it tells which programs read the single file.
        images: training images in all, if some steps had more or fewer than others.
        lora_rank: of the low-rank updates that were trained; None if all of the encoder's weights were.
        changes: a line for each change of flags when the training was resumed.
        command: the published command, without secrets and without paths of this machine.
        arguments: the published arguments, likewise.
        results: rows in the project's format.
        weights: SHA-256 of each weights file that the card describes; empty before any is saved.
    """

    model_id: str
    base_model: str
    vae_class: str
    family: str | None = None
    base_license: Mapping[str, str] = field(default_factory=dict)
    subfolder: str | None = None
    data: str
    dataset: str | None = None
    resolution: int
    num_frames: int = 1
    objective: str = "srl"
    lora_rank: int | None = None
    num_validation_images: int
    steps: int
    images_per_step: int
    images: int | None = None
    changes: Sequence[str] = ()
    hardware: str
    minutes: float
    command: str
    arguments: str
    versions: Mapping[str, str]
    original_vae: str
    judged_vae: str
    results: Sequence[Row] = ()
    results_table: str = ""
    picture: str | None = None
    weights: Mapping[str, str] = field(default_factory=dict)


def render_card(facts: CardFacts) -> str:
    """Return the card as text: YAML metadata with a model-index of the judged VAE's results, then prose."""
    on_hub = not Path(facts.base_model).exists()
    base_name = as_text(facts.base_model) if on_hub else as_code(Path(facts.base_model).resolve().name)
    judged = [row for row in facts.results if row.vae == facts.judged_vae]
    licence: dict[str, Any] = dict(facts.base_license)
    data = ModelCardData(
        library_name="diffusers",
        base_model=facts.base_model if on_hub else None,
        base_model_relation="finetune" if on_hub else None,
        datasets=[facts.dataset] if facts.dataset else None,
        tags=[*(["srl-vae"] if facts.objective == "srl" else []), "autoencoder", "vae", "adversarial-robustness"],
        model_name=Path(facts.model_id).name if judged else None,  # of the model-index
        eval_results=[_eval_result(row, facts) for row in judged] or None,
        **licence,
    )
    card = ModelCard.from_template(
        data,
        template_str=files("srl_utils.hub").joinpath(TEMPLATE).read_text(encoding="utf-8"),
        **{
            **asdict(facts),
            "name": as_text(Path(facts.model_id).name),
            "base": f"[{base_name}](https://huggingface.co/{base_name})" if on_hub else base_name,
            "data": as_text(facts.data),
            "subfolder": as_code(facts.subfolder) if facts.subfolder else None,
            "vae_class": facts.vae_class,
            "model_literal": json.dumps(facts.model_id),  # a string literal in the card's Python code
            "weights_heading": WEIGHTS_HEADING,
            "updates": UPDATES_NAME,
            "single_file": SINGLE_FILE_NAME if SINGLE_FILE_NAME in facts.weights else None,
            "programs": programs_for(facts.family),
            "refusal": refusal(facts.family),
            "clips": facts.num_frames > 1,
            "samples": "images" if facts.num_frames == 1 else f"clips of {facts.num_frames} frames",
            "judged": bool(judged),
            "uneven": facts.images is not None and facts.images != facts.steps * facts.images_per_step,
            "changes": [as_code(change) for change in facts.changes],
            "findings": [line for row in judged if (line := _finding(row, facts))],
            "halves": _halves(facts),
        },
    )
    return str(card)


def recorded_weights(card: str) -> dict[str, str] | None:
    """Return the SHA-256 of each weights file that a card describes; None if the card does not name any.

    The card of a training that has not ended gives an empty dictionary.
    """
    if WEIGHTS_HEADING not in card:
        return None
    return dict(re.findall(r"^- `([^`/]+)`: `([0-9a-f]{64})`$", card, flags=re.MULTILINE))


@lru_cache(maxsize=1)  # a run asks several times, and may have no network
def base_license(base_model: str) -> dict[str, str]:
    """Return the licence from the base model's card; empty if it names none or cannot be read."""
    folder = Path(base_model)
    try:
        card = folder / "README.md" if folder.exists() else hf_hub_download(base_model, "README.md")
        data = metadata_load(card) or {}
    except Exception:  # no card, no network or a damaged card: the licence is unknown
        return {}
    return {key: data[key] for key in LICENSE_KEYS if data.get(key)}


def _eval_result(row: Row, facts: CardFacts) -> EvalResult:
    return EvalResult(
        task_type="image-to-image",
        task_name="Reconstruction",
        dataset_type=facts.dataset or "images",
        dataset_name=facts.data,
        # huggingface_hub merges the results of one configuration, so each attack needs its own.
        dataset_config=_conditions(row),
        metric_type=row.metric,
        metric_name=f"{row.metric}, {_conditions(row)}",
        metric_value=round(row.value, 4),
    )


def _finding(row: Row, facts: CardFacts) -> str | None:
    """Return one sentence on how the PSNR under one attack has changed."""
    if row.metric != "psnr":
        return None
    for other in facts.results:
        if other.vae == facts.original_vae and other.setting == row.setting:
            change = row.value - other.value
            verb = "gains" if change >= 0 else "loses"
            return f"{_conditions(row)}: {verb} {abs(change):.2f} dB ({other.value:.2f} to {row.value:.2f} dB)"
    return None


def _halves(facts: CardFacts) -> list[tuple[str, float]]:
    """Return each half-precision variant, and by how many dB its clean reconstruction differs."""
    clean = {row.vae: row.value for row in facts.results if (row.attack, row.metric) == ("clean", "psnr")}
    prefix = f"{facts.judged_vae}-"
    return [
        (vae.removeprefix(prefix), value - clean[facts.judged_vae])
        for vae, value in clean.items()
        if vae.startswith(prefix)
    ]


def _conditions(row: Row) -> str:
    return f"{row.attack}, epsilon {format_pixel_distance(row.epsilon)}" if row.epsilon else row.attack
