"""A small CLIP (Radford et al., arXiv 2103.00020), trained on scenes and their captions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.models.clip.modeling_clip import CLIPOutput

from miniature.scene_set import SIZE, SceneSet
from miniature.tokens import special_tokens
from miniature.training import Settings, train
from srl_utils.evaluation.tasks.finetuning import draw_numbers

HALVES = [0.5, 0.5, 0.5]


def build_clip(vocabulary: int, tokens: int, special: dict[str, int]) -> CLIPModel:
    """Return the CLIP with random weights.

    Args:
        vocabulary: number of tokens that the tokenizer knows.
        tokens: length of the longest caption.
        special: numbers of the special tokens, by their names in the configuration.
    """
    shared = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4}
    return CLIPModel(
        CLIPConfig(
            text_config={
                **shared,
                "num_hidden_layers": 2,
                "vocab_size": vocabulary,
                "max_position_embeddings": tokens,
                **special,
            },
            vision_config={**shared, "num_hidden_layers": 3, "image_size": SIZE, "patch_size": 8},
            projection_dim=64,
        )
    )


def build_processor(tokenizer: CLIPTokenizer) -> CLIPProcessor:
    """Return the processor of the CLIP's images and captions."""
    size = {"height": SIZE, "width": SIZE}
    images = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=size, image_mean=HALVES, image_std=HALVES)
    return CLIPProcessor(images, tokenizer)


def train_clip(scenes: SceneSet, tokenizer: CLIPTokenizer, settings: Settings) -> CLIPModel:
    """Train the CLIP on captioned scenes. Training resumes from the state in `settings.work_dir`."""
    torch.manual_seed(settings.seed)
    network = build_clip(len(tokenizer), tokenizer.model_max_length, special_tokens(tokenizer)).to(settings.device)
    encoded = tokenizer(scenes.captions, padding=True, return_tensors="pt")
    loss = partial(
        contrastive_loss,
        predict=settings.compiled(CLIPModel.forward),
        scenes=scenes, tokens=encoded["input_ids"], mask=encoded["attention_mask"], settings=settings,
    )  # fmt: skip
    return train(network, loss, "clip.pt", settings)


def contrastive_loss(
    network: CLIPModel,
    step: int,
    *,
    predict: Callable[..., CLIPOutput],
    scenes: SceneSet,
    tokens: Tensor,
    mask: Tensor,
    settings: Settings,
) -> Tensor:
    """Return the cross entropy of finding each image's caption in a step's batch, and each caption's image."""
    numbers = draw_numbers(settings.seed, step, batch_size=settings.batch_size, out_of=len(scenes.captions))
    device = network.device
    return predict(
        network,
        input_ids=tokens[numbers].to(device),
        attention_mask=mask[numbers].to(device),
        pixel_values=scenes.pixels(numbers).to(device),
        return_loss=True,
    ).loss
