"""The README's Python, executed as a reader would."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.hub_server import HubServer
from helpers.small_pipelines import build_pipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

README = Path(__file__).parents[1] / "README.md"
PREFACE = """
from PIL import Image
photograph = Image.effect_noise((40, 40), 64).convert("RGB")
"""
EPILOGUE = """
assert clean.size == photograph.size and clean.tobytes() != photograph.tobytes()
assert edited.size == photograph.size
assert pipe.vae.config.scaling_factor == vae.config.scaling_factor
"""


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def save_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's own, of single characters."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8)


@pytest.fixture
def pipeline_folder(tmp_path: Path) -> Path:
    """A whole img2img pipeline, text encoder and all, as `save_pretrained` leaves it."""
    pipe = build_pipeline("sd img2img")
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    torch.manual_seed(0)
    width = pipe.unet.config.cross_attention_dim
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=width, num_attention_heads=2,
        num_hidden_layers=1, max_position_embeddings=8, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    pipe.register_modules(text_encoder=CLIPTextModel(config).eval(), tokenizer=tokenizer)
    pipe.save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def test_every_python_block_runs(tmp_path: Path, pipeline_folder: Path, other_tiny_vae) -> None:
    """Oracle: the README itself, run block after block in an empty folder, its pipeline a small one on a local Hub."""
    other_tiny_vae.save_pretrained(tmp_path / "work/outputs/my-robust-vae")
    blocks = python_blocks()
    assert len(blocks) >= 3
    script = tmp_path / "snippets.py"
    script.write_text("\n".join([PREFACE, *blocks, EPILOGUE]))
    with HubServer() as hub:
        hub.add_repository("stable-diffusion-v1-5/stable-diffusion-v1-5", pipeline_folder)
        environment = {**os.environ, **hub.environment(tmp_path / "home"), "PYTHONPATH": str(README.parent)}
        done = subprocess.run(
            [sys.executable, str(script)], cwd=tmp_path / "work", env=environment, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
