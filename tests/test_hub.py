"""The model card and the push."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard

from srl_utils import hub
from srl_utils.errors import UserError

ROW = {
    "vae": "fine-tuned", "attack": "clean", "threat_model": "none", "epsilon": 0.0, "metric": "psnr",
    "value": 26.12346, "ci95": [25.0, 27.0], "n": 16,
}  # fmt: skip
FACTS = hub.CardFacts(
    model_id="someone/robust", base_model="stabilityai/sd-vae-ft-mse", data="photos: 9 images", dataset=None,
    resolution=64, num_validation_images=16, steps=100, images_per_step=8, arguments='{"epsilon": 0.03}',
    results=[ROW, {**ROW, "vae": "original", "value": 1.0}], results_table="| images |", judged_vae="fine-tuned",
)  # fmt: skip


def test_card_metadata() -> None:
    """Oracle: huggingface_hub, which reads the YAML back; the model-index holds the judged VAE's rows alone."""
    card = ModelCard(hub.render_card(FACTS))
    assert card.data.library_name == "diffusers"
    assert card.data.base_model == "stabilityai/sd-vae-ft-mse"
    assert card.data.to_dict()["base_model_relation"] == "finetune"
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("psnr", 26.1235)
    assert "| images |" in card.text
    assert 'from_pretrained("someone/robust")' in card.text


def test_card_before_any_result(tmp_path: Path) -> None:
    """Oracle: the same template with nothing known; a base that is a local folder is not named as a Hub id."""
    card = ModelCard(hub.render_card(replace(FACTS, results=[], results_table="", base_model=str(tmp_path))))
    assert card.data.base_model is None
    assert card.data.eval_results is None
    assert "None yet" in card.text


def test_push_uploads_the_drop_in_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Oracle: huggingface_hub's own filter, on a folder with checkpoints beside the drop-in."""
    from huggingface_hub.utils import filter_repo_objects

    names = ["config.json", "diffusion_pytorch_model.safetensors", "README.md", "samples/comparison.png"]
    others = ["checkpoint-5/optimizer.bin", "checkpoint-5/vae/config.json", "logs/x/events.out", ".x.partial"]
    seen = {}

    def upload(api: HfApi, **arguments: object) -> None:
        seen.update(arguments)

    monkeypatch.setattr(HfApi, "upload_folder", upload)
    assert hub.push(tmp_path, "someone/robust", None) is None
    kept = list(filter_repo_objects(names + others, allow_patterns=seen["allow_patterns"]))
    assert kept == names


def test_a_failed_push_says_how_to_finish(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Oracle: the message, which holds the reason and a complete command; nothing is raised."""

    def fail(api: HfApi, **arguments: object) -> None:
        raise ConnectionError("no route to the Hub")

    monkeypatch.setattr(HfApi, "upload_folder", fail)
    message = hub.push(tmp_path, "someone/robust", None)
    assert "no route to the Hub" in message
    assert f"hf upload someone/robust {tmp_path} . --include config.json" in message


def test_a_repository_that_cannot_be_had_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: one line, in the first seconds of a run, that names the way out."""

    def refuse(api: HfApi, *arguments: object, **keywords: object) -> None:
        raise PermissionError("401 Unauthorized\nlong explanation")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(UserError, match="401 Unauthorized; log in with `hf auth login`"):
        hub.create_repository("someone/robust", "hf_bad")
