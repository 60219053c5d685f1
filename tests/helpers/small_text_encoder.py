"""Text encoders for the pipelines of `small_pipelines.py`: real CLIP, of random weights and one layer."""

from __future__ import annotations

import json
import string
from pathlib import Path

from diffusers import DiffusionPipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from helpers.small_pipelines import TOKENS, WIDTH, seeded

SPECIAL = ["<|startoftext|>", "<|endoftext|>"]
VOCABULARY = [*SPECIAL, *(letter + end for letter in string.ascii_lowercase for end in ("", "</w>"))]


def add_text_encoders(pipe: DiffusionPipeline, folder: Path) -> DiffusionPipeline:
    """`pipe` with what it needs to understand prompts of letters; `folder` takes the tokenizer's files."""
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(VOCABULARY)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=2 * TOKENS)
    if not hasattr(pipe, "text_encoder_2"):
        pipe.register_modules(tokenizer=tokenizer, text_encoder=seeded(lambda: CLIPTextModel(_config(WIDTH))))
        return pipe
    pipe.register_modules(
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        text_encoder=seeded(lambda: CLIPTextModel(_config(WIDTH // 2))),
        text_encoder_2=seeded(lambda: CLIPTextModelWithProjection(_config(WIDTH // 2))),
    )
    return pipe


def _config(hidden_size: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=hidden_size,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=WIDTH,
        max_position_embeddings=2 * TOKENS,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
