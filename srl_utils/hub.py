"""The card that tells what is known of a run, and the push that may fail without costing one."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData

from srl_utils.errors import UserError

TEMPLATE = Path(__file__).resolve().parents[1] / "model_card.md"
DROP_IN_FILES = [
    "config.json",
    "diffusion_pytorch_model.safetensors",
    "README.md",
    "training_args.json",
    "metrics.jsonl",
    "results.json",
    "samples/*.png",
]
"""What is uploaded: never `checkpoint-*`, whose optimizer states are no part of the model."""


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What the card says; `results` are rows in the project's format, empty before the first judgement."""

    model_id: str
    base_model: str
    data: str
    dataset: str | None
    resolution: int
    num_validation_images: int
    steps: int
    images_per_step: int
    arguments: str
    results: Sequence[dict[str, object]]
    results_table: str
    judged_vae: str


def render_card(facts: CardFacts) -> str:
    """The card as text: YAML metadata with a model-index of the judged VAE's results, then prose."""
    on_hub = not Path(facts.base_model).exists()
    base_name = facts.base_model if on_hub else Path(facts.base_model).resolve().name
    data = ModelCardData(
        library_name="diffusers",
        base_model=facts.base_model if on_hub else None,
        base_model_relation="finetune" if on_hub else None,
        datasets=[facts.dataset] if facts.dataset else None,
        tags=["srl-vae", "adversarial-robustness", "vae", "image-to-image"],
        model_name=Path(facts.model_id).name,
        eval_results=_eval_results(facts),
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        **{
            **asdict(facts),
            "title": f"{Path(facts.model_id).name}: a robust encoder for {Path(base_name).name}",
            "base_model": f"[{base_name}](https://huggingface.co/{base_name})" if on_hub else f"`{base_name}`",
        },
    )
    return str(card)


def _eval_results(facts: CardFacts) -> list[EvalResult] | None:
    return [
        EvalResult(
            task_type="image-to-image",
            task_name=f"Reconstruction, {row['attack']}",
            dataset_type=facts.dataset or "images",
            dataset_name=facts.data,
            metric_type=str(row["metric"]),
            metric_value=round(float(row["value"]), 4),
        )
        for row in facts.results
        if row["vae"] == facts.judged_vae
    ] or None


def create_repository(repo_id: str, token: str | None) -> str:
    """Creates the repository where it does not exist and returns its full id (`user/name`).

    Raises:
        UserError: if the Hub cannot be reached or refuses: better in the first seconds than at the end.
    """
    try:
        return HfApi(token=token).create_repo(repo_id, exist_ok=True).repo_id
    except Exception as error:  # the HTTP library behind huggingface_hub differs between its versions
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"cannot create or open '{repo_id}' on the Hub: {reason}; log in with `hf auth login` or drop --push_to_hub"
        ) from None


def push(output_dir: Path, repo_id: str, token: str | None) -> str | None:
    """Uploads the drop-in's files as one commit; returns None, or why that failed and how to finish it."""
    try:
        HfApi(token=token).upload_folder(
            repo_id=repo_id,
            folder_path=output_dir,
            allow_patterns=DROP_IN_FILES,
            commit_message="End of training",
        )
    except Exception as error:  # whatever it is, the weights are on the disk and the run must end well
        includes = " ".join(f"--include {shlex.quote(pattern)}" for pattern in DROP_IN_FILES)
        command = f"hf upload {repo_id} {shlex.quote(str(output_dir))} . {includes}"
        return f"the push failed ({error}); everything is saved in {output_dir}. To finish: {command}"
    return None
