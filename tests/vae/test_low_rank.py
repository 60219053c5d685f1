"""Low-rank updates of every supported class of autoencoder."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ModelMixin
from helpers.autoencoders import small_autoencoder
from helpers.runs import build_tiny_vae
from safetensors.torch import load_file, save_file
from torch import nn

from srl_utils.errors import MissingFile, UnusableFile, UserError
from srl_utils.vae.families import FAMILIES
from srl_utils.vae.loading import UPDATES_NAME, WEIGHTS_NAME, merge_updates, restore_autoencoder, save_autoencoder
from srl_utils.vae.low_rank import add_low_rank_updates, merged_state, updates_of, updates_state
from srl_utils.vae.networks import EncoderMirror, LatentEncoder

RANK = 3


def updated(vae: ModelMixin, *, moved: bool = True, autocast_dtype: torch.dtype | None = None) -> LatentEncoder:
    """Return the encoder of `vae` with updates, as a training leaves them or as it finds them."""
    encoder = LatentEncoder(vae, autocast_dtype=autocast_dtype)
    add_low_rank_updates(encoder, RANK, seed=0)
    for _, _, update in updates_of(encoder):
        if moved:
            nn.init.normal_(update.lora_B, std=0.1, generator=torch.Generator().manual_seed(1))
    return encoder


@pytest.mark.parametrize("name", FAMILIES)
def test_every_class(name: str, images) -> None:
    """Oracle: the VAE without updates: the same bits at the start, and with merged weights afterwards; a mirror has them too."""
    vae, plain = small_autoencoder(name), small_autoencoder(name)
    encoder = updated(vae, moved=False)
    before = copy.deepcopy(plain.state_dict())
    assert all(torch.equal(tensor, before[key]) for key, tensor in merged_state(vae).items())
    assert merged_state(vae).keys() == before.keys()
    batch = images(1, 32)
    with torch.no_grad():
        assert torch.equal(encoder(batch), LatentEncoder(plain)(batch))
        mirror = EncoderMirror(encoder)
        for _, _, update in updates_of(encoder):
            nn.init.normal_(update.lora_B, std=0.1, generator=torch.Generator().manual_seed(1))
        mirror.refresh()
        merged = small_autoencoder(name)
        merged.load_state_dict(merged_state(vae))
        changed = {key for key, tensor in merged.state_dict().items() if not torch.equal(tensor, before[key])}
        assert {key.partition(".")[0] for key in changed} <= set(FAMILIES[name].trained)
        expected = LatentEncoder(merged)(batch)
        assert torch.equal(encoder(batch), expected) and torch.equal(mirror.encoder(batch), expected)
        assert not torch.equal(expected, LatentEncoder(plain)(batch))
    trained = {key for key, parameter in encoder.named_parameters() if parameter.requires_grad}
    assert trained == {key for key, _ in encoder.named_parameters() if "lora_" in key}
    assert not any("lora_" in key for key, _ in mirror.encoder.named_parameters())


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3, padding=1), nn.Conv3d(4, 6, 3, padding=1), nn.Linear(4, 6)])
def test_an_update_is_two_layers(layer: nn.Module) -> None:
    """Oracle: peft's formula, the layer's output plus that of A followed by B."""
    network = nn.Sequential(copy.deepcopy(layer))
    add_low_rank_updates(network, RANK, seed=0)
    ((_, _, update),) = updates_of(network)
    nn.init.normal_(update.lora_B)
    if isinstance(layer, nn.Linear):
        inputs = torch.rand(2, 4)
        added = F.linear(F.linear(inputs, update.lora_A), update.lora_B)
    else:
        convolve = F.conv2d if isinstance(layer, nn.Conv2d) else F.conv3d
        inputs = torch.rand(2, 4, *[5] * (layer.weight.ndim - 2))
        added = convolve(convolve(inputs, update.lora_A, padding=1), update.lora_B)
    torch.testing.assert_close(network(inputs), layer(inputs) + added)


def test_grouped_convolutions_stay() -> None:
    """Oracle: specification."""
    network = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 1))
    add_low_rank_updates(network, RANK, seed=0)
    assert [name for name, _, _ in updates_of(network)] == ["1"]


def test_a_mirror_in_half_precision_follows(tiny_vae, images) -> None:
    """Oracle: autocast of the encoder itself, to the bit, before and after the updates move."""
    encoder = updated(tiny_vae, moved=False, autocast_dtype=torch.bfloat16)
    mirror = EncoderMirror(encoder)
    with torch.no_grad():
        assert torch.equal(mirror.encoder(images(1)), encoder(images(1)))
        for _, _, update in updates_of(encoder):
            update.lora_B.add_(0.1)
        assert not torch.equal(mirror.encoder(images(1)), encoder(images(1)))
        mirror.refresh()
        assert torch.equal(mirror.encoder(images(1)), encoder(images(1)))


def test_saving_and_restoring(tiny_vae, tmp_path: Path, images) -> None:
    """Oracle: the VAE that was saved: its outputs from the merged weights, and to the bit where the updates are restored."""
    base = copy.deepcopy(tiny_vae)
    encoder = updated(tiny_vae)
    save_autoencoder(tiny_vae, tmp_path)
    merged = AutoencoderKL.from_pretrained(tmp_path)
    restored = copy.deepcopy(base)
    other = updated(restored, moved=False)
    restore_autoencoder(restored, tmp_path)
    with torch.no_grad():
        expected = encoder(images(1))
        assert torch.equal(LatentEncoder(merged)(images(1)), expected) and torch.equal(other(images(1)), expected)
    for key, tensor in updates_state(tiny_vae).items():
        assert torch.equal(tensor, updates_state(restored)[key])
    save_autoencoder(base, tmp_path / "plain")
    assert not (tmp_path / "plain" / UPDATES_NAME).exists()


@pytest.mark.parametrize("quant_conv", [True, False])
def test_diffusers_loads_the_updates(quant_conv: bool, tmp_path: Path, images) -> None:
    """Oracle: `load_lora_adapter` of diffusers, which adds the layers of peft to the original VAE."""
    pytest.importorskip("peft")
    vae, original = build_tiny_vae(quant_conv=quant_conv), build_tiny_vae(quant_conv=quant_conv)
    updated(vae)
    save_autoencoder(vae, tmp_path)
    merged, batch = AutoencoderKL.from_pretrained(tmp_path), images(2)
    with torch.no_grad():
        before = original(batch).sample
        original.load_lora_adapter(tmp_path, prefix=None, weight_name=UPDATES_NAME)
        torch.testing.assert_close(original(batch).sample, merged(batch).sample, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(before, merged(batch).sample, atol=1e-3)
    # Convolutions and linear layers of the encoder: every weight of two dimensions or more.
    wide = {
        key for key, tensor in load_file(tmp_path / "diffusion_pytorch_model.safetensors").items() if tensor.ndim > 1
    }
    trained = {key.removesuffix(".weight") for key in wide if key.startswith(("encoder.", "quant_conv."))}
    assert {key.rpartition(".lora_")[0] for key in load_file(tmp_path / UPDATES_NAME)} == trained


def test_merged_updates_are_those_of_the_training(tmp_path: Path) -> None:
    """Oracle: the whole VAE that the training saves beside the updates; other files and VAEs are refused."""
    tuned = build_tiny_vae()
    add_low_rank_updates(tuned.encoder, 2, seed=0)
    for _, _, update in updates_of(tuned):
        torch.nn.init.normal_(update.lora_B, generator=torch.Generator().manual_seed(1))
    save_autoencoder(tuned, tmp_path)
    merged = build_tiny_vae()
    merge_updates(merged, tmp_path / UPDATES_NAME)
    for name, tensor in load_file(tmp_path / WEIGHTS_NAME).items():
        torch.testing.assert_close(merged.state_dict()[name], tensor)
    with pytest.raises(MissingFile, match="there are no low-rank updates"):
        merge_updates(merged, tmp_path / "none.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"damaged")
    with pytest.raises(UnusableFile, match="is damaged"):
        merge_updates(merged, tmp_path / "damaged.safetensors")
    for name in ("encoder.conv_9", "encoder.conv_in"):  # no such layer; another shape
        matrices = {"A": torch.ones(2, 3, 3, 3), "B": torch.ones(5, 2, 1, 1)}
        others = {f"{name}.lora_{matrix}.weight": values for matrix, values in matrices.items()}
        save_file(others, tmp_path / "other.safetensors")
        with pytest.raises(UserError, match="do not fit this VAE"):
            merge_updates(merged, tmp_path / "other.safetensors")
