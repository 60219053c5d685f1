from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from srl_utils.errors import UserError
from srl_utils.vae.loading import WEIGHTS_NAME, AutoencoderSource, load_autoencoder, read_config, save_autoencoder
from srl_utils.vae.networks import (
    LatentDecoder,
    LatentEncoder,
    check_resolution,
    frozen,
    frozen_copy,
    latent_shape,
    split_moments,
)


def source(folder: Path, **rest: str) -> AutoencoderSource:
    return AutoencoderSource(pretrained_model_name_or_path=str(folder), **rest)


@pytest.fixture
def saved(tiny_vae, tmp_path) -> Path:
    tiny_vae.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


# --- modules --------------------------------------------------------------------------------------------


def test_encoder_equals_diffusers(either_tiny_vae, images) -> None:
    """Oracle: diffusers' own `encode`, exactly: the same operations on the same weights."""
    expected = either_tiny_vae.encode(images(2)).latent_dist
    moments = split_moments(LatentEncoder(either_tiny_vae)(images(2)))
    assert torch.equal(moments.mean, expected.mean)
    assert torch.equal(moments.variance, expected.var)
    assert moments.mean.shape == (2, *latent_shape(LatentEncoder(either_tiny_vae), images(2)))


def test_decoder_equals_diffusers(either_tiny_vae, images) -> None:
    """Oracle: diffusers' own `decode`, exactly."""
    latents = either_tiny_vae.encode(images(2)).latent_dist.mean
    assert torch.equal(LatentDecoder(either_tiny_vae)(latents), either_tiny_vae.decode(latents).sample)


def test_latent_is_the_mean_or_the_sample_of_diffusers(tiny_vae, images) -> None:
    """Oracle: diffusers' `mode` exactly and `sample` with the same noise; exp(logvar/2) against sqrt(exp(logvar))
    differs in the last bits."""
    posterior = tiny_vae.encode(images(2)).latent_dist
    moments = split_moments(LatentEncoder(tiny_vae)(images(2)))
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(3))
    expected = posterior.sample(generator=torch.Generator().manual_seed(3))
    assert torch.equal(moments.latent(None), posterior.mode())
    torch.testing.assert_close(moments.latent(noise), expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(moments.latent(noise), moments.mean)


@pytest.mark.parametrize("extreme", [-1000.0, 1000.0])
def test_extreme_log_variance_stays_finite(extreme) -> None:
    """Oracle: closed form, diffusers clips the log-variance to [-30, 20]; exp in float32."""
    variance = split_moments(torch.full((1, 8, 2, 2), extreme)).variance
    expected = torch.tensor(min(max(extreme, -30.0), 20.0)).exp()
    torch.testing.assert_close(variance, expected.expand_as(variance))


def test_modules_share_the_parameters_of_the_vae(tiny_vae) -> None:
    """Oracle: identity of objects; encoder and decoder side together are the whole VAE, each parameter once."""
    encoder, decoder = LatentEncoder(tiny_vae), LatentDecoder(tiny_vae)
    parts = [id(parameter) for module in (encoder, decoder) for parameter in module.parameters()]
    assert sorted(parts) == sorted(id(parameter) for parameter in tiny_vae.parameters())


def test_decoder_is_frozen_but_passes_gradient(either_tiny_vae, images) -> None:
    """Oracle: specification, the encoder gets a gradient through the decoder, the decoder itself gets none."""
    encoder, decoder = LatentEncoder(either_tiny_vae), frozen_copy(LatentDecoder(either_tiny_vae))
    decoder(split_moments(encoder(images(1))).mean).square().mean().backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in decoder.parameters())
    # Half of the last layer's outputs is the log-variance, which the mean does not depend on: the rest must move.
    assert all(parameter.grad.abs().max() > 0 for parameter in encoder.parameters() if parameter.grad.ndim == 4)


@pytest.mark.parametrize("module", [LatentEncoder, LatentDecoder])
def test_autocast_gives_float32_near_the_exact_result(module, tiny_vae, images) -> None:
    """Oracle: the float32 pass; bfloat16 carries 8 bits through about ten layers: 5% of the output's scale."""
    inputs = images(1) if module is LatentEncoder else torch.randn(1, 4, 8, 8, generator=torch.manual_seed(0))
    exact = module(tiny_vae)(inputs)
    lowered = module(tiny_vae, autocast_dtype=torch.bfloat16)(inputs)
    assert lowered.dtype == torch.float32
    assert 0 < (lowered - exact).abs().max() < 0.05 * exact.abs().max()


def test_frozen_copy_never_changes(tiny_vae, images) -> None:
    """Oracle: invariance, its output is exactly what the encoder's was before every weight was moved."""
    encoder = LatentEncoder(tiny_vae).train()
    before = encoder(images(1)).detach()
    reference = frozen_copy(encoder)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1)
    assert torch.equal(reference(images(1)), before)
    assert not torch.equal(encoder(images(1)), before)
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    assert not any(module.training for module in reference.modules())
    assert encoder.training and all(parameter.requires_grad for parameter in encoder.parameters())


@pytest.mark.parametrize("fails", [False, True])
def test_frozen_restores_what_was_trainable(fails, tiny_vae) -> None:
    """Oracle: invariance, also for a parameter that was frozen before and where an exception ends the block."""
    encoder = LatentEncoder(tiny_vae)
    encoder.encoder.conv_in.weight.requires_grad_(False)
    before = [parameter.requires_grad for parameter in encoder.parameters()]
    with pytest.raises(KeyboardInterrupt) if fails else nullcontext(), frozen(encoder):
        assert not any(parameter.requires_grad for parameter in encoder.parameters())
        if fails:
            raise KeyboardInterrupt
    assert [parameter.requires_grad for parameter in encoder.parameters()] == before
    assert sum(before) == len(before) - 1


SD_LEVELS = {"_class_name": "AutoencoderKL", "block_out_channels": (8,) * 4}

# --- resolution -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("levels", "factor"), [(1, 1), (2, 2), (3, 4), (4, 8)])
def test_suitable_resolutions_are_multiples_of_the_factor(levels, factor) -> None:
    """Oracle: closed form, 2^(levels-1); SD's four levels divide by 8."""
    config = {"_class_name": "AutoencoderKL", "block_out_channels": (8,) * levels}
    assert check_resolution(3 * factor, config) is None
    if factor > 1:
        with pytest.raises(UserError, match=f"multiple of {factor}"):
            check_resolution(3 * factor + 1, config)


@pytest.mark.parametrize("resolution", [8, 256, 520])
def test_suitable_resolution_is_accepted(resolution) -> None:
    """Oracle: specification, multiples of 8 for a VAE of four levels."""
    assert check_resolution(resolution, SD_LEVELS) is None


@pytest.mark.parametrize(("resolution", "nearest"), [(250, 248), (254, 256), (3, 8), (0, 8), (-8, 8)])
def test_unsuitable_resolution_is_refused_with_a_better_one(resolution, nearest) -> None:
    """Oracle: golden message, with the nearest positive multiple of 8."""
    with pytest.raises(UserError) as caught:
        check_resolution(resolution, SD_LEVELS)
    assert str(caught.value) == (
        f"resolution: {resolution} is not a multiple of 8, by which this VAE divides the sides of an image; try {nearest}"
    )


# --- files ----------------------------------------------------------------------------------------------


def test_config_is_read_without_weights(saved, tiny_vae) -> None:
    """Oracle: the configuration that was saved; the weights are gone when it is read."""
    (saved / WEIGHTS_NAME).unlink()
    config = read_config(source(saved))
    assert config["latent_channels"] == 4 and tuple(config["block_out_channels"]) == (8, 16)


def test_missing_path_is_a_user_error(tmp_path) -> None:
    """Oracle: specification, one line that names the path."""
    with pytest.raises(UserError, match="no VAE configuration at") as caught:
        read_config(source(tmp_path / "missing"))
    assert str(tmp_path / "missing") in str(caught.value) and "\n" not in str(caught.value)


def test_pipeline_folder_hints_at_its_subfolder(saved, tmp_path) -> None:
    """Oracle: specification. The hint is followed: with it the configuration is found, and no longer hinted at."""
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    saved.rename(tmp_path / "vae")
    with pytest.raises(UserError, match="subfolder vae"):
        read_config(source(tmp_path))
    assert read_config(source(tmp_path, subfolder="vae"))["in_channels"] == 3
    with pytest.raises(UserError) as caught:
        read_config(source(tmp_path, subfolder="unet"))
    assert "subfolder vae" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            {"_class_name": "AutoencoderOobleck"},
            "is of the class AutoencoderOobleck; the supported VAEs are AutoencoderKL, ",
        ),
        ({"in_channels": 1}, "1 channels; only RGB"),
    ],
)
def test_other_autoencoders_are_refused(change, complaint, saved) -> None:
    """Oracle: specification; a changed configuration on disk."""
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=complaint):
        read_config(source(saved))


def test_broken_config_is_a_user_error(saved) -> None:
    """Oracle: specification, one line."""
    (saved / "config.json").write_text('{"in_channels": 3,')
    with pytest.raises(UserError, match="not a valid JSON") as caught:
        read_config(source(saved))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_half_precision_weights_are_loaded_in_float32(variant, tiny_vae, tmp_path) -> None:
    """Oracle: the weights rounded to float16 and back, exactly."""
    tiny_vae.half().save_pretrained(tmp_path, variant=variant)
    loaded = load_autoencoder(source(tmp_path, variant=variant))
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, tiny_vae.get_parameter(name).float())


def cut(folder: Path) -> None:
    weights = folder / WEIGHTS_NAME
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def empty(folder: Path) -> None:
    (folder / WEIGHTS_NAME).write_bytes(b"")


def remove(folder: Path) -> None:
    (folder / WEIGHTS_NAME).unlink()


def pointer_of_git_lfs(folder: Path) -> None:
    (folder / WEIGHTS_NAME).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")


def misfit(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"latent_channels": 8}))


def forget(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS_NAME)
    weights.pop("encoder.conv_in.weight")
    save_file(weights, folder / WEIGHTS_NAME)


@pytest.mark.parametrize("damage", [cut, empty, remove, pointer_of_git_lfs, misfit, forget])
def test_weights_that_cannot_be_loaded_are_a_user_error(damage, saved) -> None:
    """Oracle: specification, one line that names the VAE, instead of a traceback."""
    damage(saved)
    with pytest.raises(UserError) as caught:
        load_autoencoder(source(saved))
    message = str(caught.value)
    assert message.startswith(f"cannot load the VAE '{saved}': ") and "\n" not in message


@pytest.mark.parametrize(("method", "act"), [("from_pretrained", load_autoencoder), ("load_config", read_config)])
def test_long_reasons_are_cut_to_one_line(method, act, saved, monkeypatch) -> None:
    """Oracle: specification, of diffusers' explanation the first line."""

    def refuse(*_, **__):
        raise OSError("the disk is full\nSee https://example.org/ for details")

    monkeypatch.setattr(AutoencoderKL, method, refuse)
    with pytest.raises(UserError, match="the disk is full") as caught:
        act(source(saved))
    assert "\n" not in str(caught.value)
    assert "details" not in str(caught.value)


def settings(vae: AutoencoderKL) -> dict:
    """The configuration as a file holds it: lists for tuples, without diffusers' own notes."""
    return {key: value for key, value in json.loads(vae.to_json_string()).items() if not key.startswith("_")}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_saved_autoencoder_comes_back(layout, either_tiny_vae, images, tmp_path) -> None:
    """Oracle: diffusers' `from_pretrained`; same weights and configuration exactly, and saving moves no parameter."""
    vae = either_tiny_vae.to(memory_format=layout)
    places = [parameter.data_ptr() for parameter in vae.parameters()]
    save_autoencoder(vae, tmp_path / "new" / "folder")
    loaded = AutoencoderKL.from_pretrained(tmp_path / "new" / "folder")
    assert [parameter.data_ptr() for parameter in vae.parameters()] == places
    assert settings(loaded) == settings(vae)
    expected = vae.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
