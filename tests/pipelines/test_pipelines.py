"""Exchanging the VAE of real pipelines of every family."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionImg2ImgPipeline, UNet2DModel
from helpers.autoencoders import with_other_encoder
from helpers.small_pipelines import KINDS, build_pipeline, run_pipeline, small_vae
from torch import Tensor

from srl_utils.errors import UserError
from srl_utils.pipelines import robust_vae, robustify, swap_vae
from srl_utils.vae.loading import save_autoencoder, save_variant

EVERY_KIND = pytest.mark.parametrize("name", KINDS)
ONE_OF_EACH_FAMILY = pytest.mark.parametrize("name", ["sd img2img", "sdxl inpaint", "sd3 img2img", "flux img2img"])
PRECISIONS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
OFFLOADS = pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
EXCHANGES = pytest.mark.parametrize("exchange", [swap_vae, robustify])
Exchange = Callable[..., AutoencoderKL]
SMALL_UNET = {
    "block_out_channels": (8,), "norm_num_groups": 4, "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",),
}  # fmt: skip


def same_weights(vae: AutoencoderKL, other: AutoencoderKL, *, parts: tuple[str, ...] = ("",)) -> bool:
    expected = {name: tensor for name, tensor in other.state_dict().items() if name.startswith(parts)}
    assert expected
    return all(torch.equal(vae.state_dict()[name], tensor) for name, tensor in expected.items())


def decode(vae: AutoencoderKL) -> Tensor:
    shape = (1, vae.config.latent_channels, 8, 8)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        return vae.decode(latents.to(vae.dtype)).sample


def image_processor(pipe: DiffusionPipeline) -> dict[str, Any]:
    return {"vae_scale_factor": pipe.vae_scale_factor, **pipe.image_processor.config}


@EVERY_KIND
@PRECISIONS
def test_the_same_weights_change_no_bit(name: str, dtype: torch.dtype) -> None:
    """Oracle: the images, dtype and image processor from before."""
    pipe, original = build_pipeline(name, dtype=dtype), build_pipeline(name).vae
    own, before, processor = pipe.vae, run_pipeline(pipe, name), image_processor(pipe)
    assert swap_vae(pipe, original) is own
    assert pipe.vae is not own and pipe.vae.dtype == dtype
    assert torch.equal(run_pipeline(pipe, name), before)
    assert image_processor(pipe) == processor


@EVERY_KIND
@PRECISIONS
def test_only_encoding_differs(name: str, dtype: torch.dtype) -> None:
    """Oracle: the images from before; where they differ, the old encoder in the new VAE brings them back."""
    pipe = build_pipeline(name, dtype=dtype)
    before = run_pipeline(pipe, name)
    own = swap_vae(pipe, with_other_encoder(pipe.vae))
    assert torch.equal(decode(pipe.vae), decode(own))
    assert torch.equal(run_pipeline(pipe, name), before) is not KINDS[name].encodes
    pipe.vae.encoder, pipe.vae.quant_conv = own.encoder, own.quant_conv
    assert torch.equal(run_pipeline(pipe, name), before)


@EVERY_KIND
@PRECISIONS
def test_a_swapped_pipeline_survives_saving(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Oracle: the images before `save_pretrained`, made again by what `from_pretrained` loads.

    It maps the weights from the file, at whatever address; aligned in memory again, they give the same last bit.
    """
    pipe = build_pipeline(name, dtype=dtype)
    swap_vae(pipe, with_other_encoder(pipe.vae))
    pipe.save_pretrained(tmp_path)
    left_out = {part: None for part, component in pipe.components.items() if component is None}
    loaded = type(pipe).from_pretrained(tmp_path, **left_out).to(torch.float64).to(dtype)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(run_pipeline(loaded, name), run_pipeline(pipe, name))


@ONE_OF_EACH_FAMILY
def test_within_and_after_the_context(name: str) -> None:
    """Oracle: within, the images of a pipeline with the VAE swapped in; afterwards those from before."""
    pipe, swapped = build_pipeline(name), build_pipeline(name)
    own, before, robust = pipe.vae, run_pipeline(pipe, name), with_other_encoder(pipe.vae)
    swap_vae(swapped, robust)
    with robust_vae(pipe, robust) as inside:
        assert inside is pipe.vae is robust
        assert torch.equal(run_pipeline(pipe, name), run_pipeline(swapped, name))
    assert pipe.vae is own
    assert torch.equal(run_pipeline(pipe, name), before)


def test_the_context_restores_after_an_exception() -> None:
    """Oracle: the VAE object from before; the exception comes through."""
    pipe = build_pipeline("sd")
    own = pipe.vae
    with pytest.raises(KeyboardInterrupt), robust_vae(pipe, with_other_encoder(own)):
        assert pipe.vae is not own
        raise KeyboardInterrupt
    assert pipe.vae is own


def test_the_context_ends_an_upcast_that_broke_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the image from before. SDXL in fp16 decodes in float32, and the decoder fails meanwhile."""
    pipe = build_pipeline("sdxl", dtype=torch.float16)
    own, before = pipe.vae, run_pipeline(pipe, "sdxl")
    robust = with_other_encoder(own)

    def fail(latents: Tensor, **settings: object) -> None:
        assert pipe.vae is robust and robust.dtype == torch.float32
        raise MemoryError

    monkeypatch.setattr(robust, "decode", fail)
    with pytest.raises(MemoryError), robust_vae(pipe, robust):
        run_pipeline(pipe, "sdxl")
    assert robust.dtype == torch.float16
    assert pipe.vae is own and own.dtype == torch.float16
    assert torch.equal(run_pipeline(pipe, "sdxl"), before)


def test_the_context_follows_a_pipeline_that_moves() -> None:
    """Oracle: a pipeline that was in bf16 from the beginning."""
    pipe = build_pipeline("sd img2img")
    own = pipe.vae
    with robust_vae(pipe, with_other_encoder(own)):
        pipe.to(torch.bfloat16)
    assert pipe.vae is own
    expected = build_pipeline("sd img2img", dtype=torch.bfloat16)
    assert torch.equal(run_pipeline(pipe, "sd img2img"), run_pipeline(expected, "sd img2img"))


@pytest.mark.parametrize("breaks_off", [False, True])
def test_the_context_follows_a_pipeline_that_moves_and_breaks_off(breaks_off: bool) -> None:
    """Oracle: specification, the VAE has the dtype of the pipeline's other networks."""
    pipe = build_pipeline("sd img2img")
    own = pipe.vae
    with contextlib.suppress(ZeroDivisionError), robust_vae(pipe, with_other_encoder(own)):
        pipe.to(torch.bfloat16)
        if breaks_off:
            raise ZeroDivisionError
    assert pipe.vae is own and own.dtype == pipe.unet.dtype == torch.bfloat16


@ONE_OF_EACH_FAMILY
@PRECISIONS
def test_robustify_takes_the_encoder_alone(name: str, dtype: torch.dtype) -> None:
    """Oracle: a VAE put together by hand from the one's encoder and the other's decoder."""
    pipe, expected = build_pipeline(name, dtype=dtype), build_pipeline(name, dtype=dtype)
    own, before = pipe.vae, run_pipeline(pipe, name)
    robust = with_other_encoder(small_vae(**own.config))
    robust.decoder.conv_out.bias.data += 1  # not to be seen in the pipeline
    together = copy.deepcopy(own)
    together.encoder = copy.deepcopy(robust.encoder).to(dtype)
    if together.quant_conv is not None:
        together.quant_conv = copy.deepcopy(robust.quant_conv).to(dtype)
    swap_vae(expected, together)

    previous = robustify(pipe, robust)
    assert previous is own and pipe.vae is not own and robust.dtype == torch.float32
    assert same_weights(pipe.vae, together) and same_weights(own, build_pipeline(name, dtype=dtype).vae)
    after = run_pipeline(pipe, name)
    assert torch.equal(after, run_pipeline(expected, name)) and not torch.equal(after, before)

    swap_vae(pipe, previous)
    assert torch.equal(run_pipeline(pipe, name), before)


def sibling_of(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Another pipeline of the same networks, the VAE among them, as diffusers makes it."""
    sibling = StableDiffusionImg2ImgPipeline.from_pipe(pipe, safety_checker=None, requires_safety_checker=False)
    sibling.set_progress_bar_config(disable=True)
    assert sibling.vae is pipe.vae
    return sibling


@EXCHANGES
def test_siblings_keep_their_vae(exchange: Exchange) -> None:
    """Oracle: the images from before, of a pipeline that `from_pipe` made, during the exchange and after undoing it."""
    pipe, name = build_pipeline("sd"), "sd img2img"
    sibling, own = sibling_of(pipe), pipe.vae
    before = run_pipeline(sibling, name)
    previous = exchange(pipe, with_other_encoder(own))
    assert sibling.vae is own is previous and torch.equal(run_pipeline(sibling, name), before)
    robust = sibling_of(pipe)
    assert not torch.equal(run_pipeline(robust, name), before)
    swap_vae(pipe, previous)
    assert torch.equal(run_pipeline(sibling_of(pipe), name), before)
    assert torch.equal(run_pipeline(sibling, name), before)
    swap_vae(robust, previous)
    assert torch.equal(run_pipeline(robust, name), before)


def test_robustify_shares_no_weight() -> None:
    """Oracle: the addresses of all weights. A pipeline that is moved or fine-tuned later must not take half of its
    sibling's VAE with it."""
    pipe = build_pipeline("sd")
    previous = robustify(pipe, with_other_encoder(pipe.vae))
    addresses = [{tensor.data_ptr() for tensor in vae.state_dict().values()} for vae in (pipe.vae, previous)]
    assert not addresses[0] & addresses[1]
    pipe.to(torch.bfloat16)
    assert {tensor.dtype for tensor in previous.state_dict().values()} == {torch.float32}


def test_exchanges_are_undone_in_any_order_and_twice() -> None:
    """Oracle: the images of each VAE, known from before."""
    pipe, name = build_pipeline("sd img2img"), "sd img2img"
    first = pipe.vae
    images = {first: run_pipeline(pipe, name)}
    for exchange in (robustify, swap_vae, robustify):
        exchange(pipe, with_other_encoder(pipe.vae))
        images[pipe.vae] = run_pipeline(pipe, name)
    vaes = list(images)
    assert len(vaes) == 4
    for vae in (vaes[1], vaes[3], vaes[0], vaes[0], vaes[2], vaes[0]):
        swap_vae(pipe, vae)
        assert pipe.vae is vae and torch.equal(run_pipeline(pipe, name), images[vae])


def test_contexts_can_be_nested() -> None:
    """Oracle: the VAE object of each level."""
    pipe = build_pipeline("sd")
    own, outer, inner = pipe.vae, with_other_encoder(pipe.vae), small_vae()
    with robust_vae(pipe, outer):
        with robust_vae(pipe, inner):
            robustify(pipe, outer)
            assert pipe.vae not in (own, outer, inner)
        assert pipe.vae is outer
    assert pipe.vae is own and same_weights(inner, small_vae())


def compiled_method(vae: AutoencoderKL) -> None:
    vae.encode, vae.decoder.forward = torch.compile(vae.encode), torch.compile(vae.decoder.forward)


def compiled_parts(vae: AutoencoderKL) -> None:
    vae.encoder, vae.decoder = torch.compile(vae.encoder), torch.compile(vae.decoder)


def compiled_in_place(vae: AutoencoderKL) -> None:
    vae.encoder.compile()


@pytest.mark.parametrize("compiled", [compiled_method, compiled_parts, compiled_in_place])
def test_robustify_reaches_a_compiled_encoder(compiled: Callable[[AutoencoderKL], None]) -> None:
    """Oracle: the images of `swap_vae` without a compiler. Nothing compiled runs here, as it would use old weights."""
    pipe, expected, name = build_pipeline("sd img2img"), build_pipeline("sd img2img"), "sd img2img"
    robust = with_other_encoder(pipe.vae)
    swap_vae(expected, robust)
    compiled(pipe.vae)
    previous = robustify(pipe, robust)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(run_pipeline(pipe, name), run_pipeline(expected, name))
    swap_vae(pipe, previous)
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(run_pipeline(pipe, name), run_pipeline(build_pipeline(name), name))


@pytest.mark.parametrize("own, new", [(False, True), (True, False), (False, False)])
def test_robustify_upcasts_if_either_needs_it(own: bool, new: bool) -> None:
    """Oracle: an fp16 overflow in the encoder or the decoder needs `force_upcast`; the old VAE's stays as it was."""
    pipe = build_pipeline("sd")
    pipe.register_modules(vae=small_vae(force_upcast=own))
    previous = robustify(pipe, small_vae(force_upcast=new))
    assert pipe.vae.config.force_upcast == (own or new)
    assert previous.config.force_upcast == own


THREE_LEVELS = {
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
}
FACTORS = {
    "scaling factor": ({"scaling_factor": 0.5}, "scaling_factor 0.5 instead of 0.18215"),
    "shift factor": ({"shift_factor": 0.25}, "shift_factor 0.25 instead of None"),
    "latent statistics": ({"latents_mean": [1, 2, 3, 4]}, r"latents_mean \[1, 2, 3, 4\] instead of None"),
}
STRUCTURES = {
    "latent channels": ({"latent_channels": 3}, "latent_channels 3 instead of 4"),
    "down-sampling": (THREE_LEVELS, "down-sampling 4 instead of 2"),
    "input channels": ({"in_channels": 1}, "in_channels 1 instead of 3"),
    "output channels": ({"out_channels": 4}, "out_channels 4 instead of 3"),
}


@EXCHANGES
@pytest.mark.parametrize(("config", "message"), [*FACTORS.values(), *STRUCTURES.values()], ids=[*FACTORS, *STRUCTURES])
def test_what_does_not_fit_is_refused(exchange: Exchange, config: dict[str, Any], message: str) -> None:
    """Oracle: the two values in the message, and a pipeline that still has its VAE, bit for bit."""
    pipe = build_pipeline("sd")
    own = pipe.vae
    with pytest.raises(UserError, match=message):
        exchange(pipe, small_vae(**config))
    assert pipe.vae is own and same_weights(own, small_vae())


def test_everything_that_differs_is_named() -> None:
    """Oracle: two differences, of which the structural one is no matter of `allow_mismatch`."""
    misfit = small_vae(latent_channels=3, scaling_factor=0.5)
    with pytest.raises(UserError, match=r"latent_channels 3 instead of 4, scaling_factor 0\.5[^,(]*$"):
        swap_vae(build_pipeline("sd"), misfit)
    with pytest.raises(UserError, match=r"latent_channels 3 instead of 4$"):
        swap_vae(build_pipeline("sd"), misfit, allow_mismatch=True)


@pytest.mark.parametrize("config", [config for config, _ in FACTORS.values()], ids=FACTORS)
def test_other_factors_can_be_allowed(config: dict[str, Any]) -> None:
    """Oracle: the newcomer's config in the pipeline, and the old one after the context; `robustify` keeps its own."""
    pipe = build_pipeline("sd")
    own, (factor, value) = pipe.vae, *config.items()
    with robust_vae(pipe, small_vae(**config), allow_mismatch=True):
        assert pipe.vae.config[factor] == value
    assert pipe.vae is own
    robustify(pipe, with_other_encoder(small_vae(**config)), allow_mismatch=True)
    assert pipe.vae.config[factor] == small_vae().config[factor]


@pytest.mark.parametrize("config", [config for config, _ in FACTORS.values()], ids=FACTORS)
def test_other_factors_are_undone_without_leave(config: dict[str, Any]) -> None:
    """Oracle: the VAE objects from before. What this pipeline never had is refused still."""
    pipe = build_pipeline("sd")
    other = small_vae(**config)
    own = swap_vae(pipe, other, allow_mismatch=True)
    assert swap_vae(pipe, own) is other and pipe.vae is own
    assert swap_vae(pipe, other) is own and swap_vae(pipe, other) is other
    swap_vae(pipe, own)
    with pytest.raises(UserError, match="does not fit"):
        swap_vae(pipe, small_vae(**config))


def test_a_shift_of_0_is_none() -> None:
    """Oracle: diffusers' formula, in which both are the same."""
    pipe = build_pipeline("sd")
    swap_vae(pipe, small_vae(shift_factor=0.0))
    assert pipe.vae.config.shift_factor == 0.0


@pytest.mark.parametrize("config", [config for config, _ in STRUCTURES.values()], ids=STRUCTURES)
@EXCHANGES
def test_another_structure_cannot_be_allowed(exchange: Exchange, config: dict[str, Any]) -> None:
    """Oracle: specification, `allow_mismatch` is for the factors only."""
    with pytest.raises(UserError, match="does not fit"):
        exchange(build_pipeline("sd"), small_vae(**config), allow_mismatch=True)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"layers_per_block": 2}, r"encoder\.down_blocks\.0\.resnets\.1\..* instead of absent"),
        ({"block_out_channels": (8, 12)}, r"\(12,.* instead of \(16,"),
        ({"use_quant_conv": False}, r"quant_conv.bias is absent instead of \(8,\)"),
        ({"norm_num_groups": 2}, "norm_num_groups is 2 instead of 4"),
        ({"act_fn": "relu"}, "act_fn is relu instead of silu"),
    ],
    ids=["depth", "width", "quant_conv", "groups", "activation"],
)
def test_robustify_needs_the_same_architecture(config: dict[str, Any], message: str) -> None:
    """Oracle: both values in the message. The last two share every shape; `swap_vae` takes them all."""
    pipe = build_pipeline("sd")
    with pytest.raises(UserError, match=message):
        robustify(pipe, small_vae(**config))
    assert same_weights(pipe.vae, small_vae())
    newcomer = small_vae(**config)
    swap_vae(pipe, newcomer)
    assert pipe.vae is newcomer


@EXCHANGES
@pytest.mark.parametrize("vae", [3, UNet2DModel(**SMALL_UNET)], ids=["number", "other class"])
def test_only_a_vae_goes_in(exchange: Exchange, vae: object) -> None:
    """Oracle: the message names what was given."""
    with pytest.raises(UserError, match=f"expected a VAE, a folder or a Hub id, got {type(vae).__name__}; the classes"):
        exchange(build_pipeline("sd"), vae)


@EXCHANGES
def test_only_a_vae_comes_out(exchange: Exchange) -> None:
    """Oracle: the message names what the pipeline has."""
    pipe = build_pipeline("sd")
    pipe.register_modules(vae=UNet2DModel(**SMALL_UNET))
    with pytest.raises(UserError, match="StableDiffusionPipeline is UNet2DModel; supported are AutoencoderKL"):
        exchange(pipe, small_vae())


def test_folders_are_loaded(tmp_path: Path) -> None:
    """Oracle: the weights that were saved; the variant's are others. A missing or wrong folder is named."""
    pipe = build_pipeline("sd")
    robust = with_other_encoder(pipe.vae)
    save_autoencoder(robust, tmp_path / "pipeline" / "vae")
    save_variant(small_vae(), tmp_path / "pipeline" / "vae", "bf16")
    swap_vae(pipe, tmp_path / "pipeline", subfolder="vae")
    assert same_weights(pipe.vae, robust)
    swap_vae(pipe, str(tmp_path / "pipeline" / "vae"), variant="bf16")
    assert same_weights(pipe.vae, small_vae().bfloat16())
    build_pipeline("sd").unet.save_config(tmp_path / "unet")
    for folder in ("missing", "unet"):
        with pytest.raises(UserError, match=folder):
            swap_vae(pipe, tmp_path / folder)


def test_hub_ids_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a cache in huggingface_hub's documented layout, whose two branches hold different weights."""
    pipe = build_pipeline("sd")
    branches = {"main": pipe.vae, "robust": with_other_encoder(pipe.vae)}
    for commit, (branch, vae) in zip(("a" * 40, "b" * 40), branches.items(), strict=True):
        save_autoencoder(vae, tmp_path / "models--user--vae" / "snapshots" / commit)
        reference = tmp_path / "models--user--vae" / "refs" / branch
        reference.parent.mkdir(exist_ok=True)
        reference.write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with robust_vae(pipe, "user/vae", revision="robust"):
        assert same_weights(pipe.vae, branches["robust"])
    robustify(pipe, "user/vae", revision="robust")
    assert same_weights(pipe.vae, branches["robust"])
    swap_vae(pipe, "user/vae")
    assert same_weights(pipe.vae, small_vae())


@PRECISIONS
def test_a_vae_object_keeps_its_precision(dtype: torch.dtype) -> None:
    """Oracle: the caller's float32 weights; only where the pipeline's dtype is another, a copy is put in."""
    pipe, vae = build_pipeline("sd", dtype=dtype), with_other_encoder(small_vae())
    swap_vae(pipe, vae)
    assert vae.dtype == torch.float32 and pipe.vae.dtype == dtype
    assert (pipe.vae is vae) == (dtype == torch.float32)
    assert same_weights(vae, with_other_encoder(small_vae()))


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("new", [True, False])
def test_force_upcast_is_the_newcomers(own: bool, new: bool) -> None:
    """Oracle: specification of diffusers; in an fp16 SDXL the decoder sees float32 if its config asks for it."""
    pipe = build_pipeline("sdxl", dtype=torch.float16)
    pipe.register_modules(vae=small_vae(force_upcast=own).half())
    swap_vae(pipe, small_vae(force_upcast=new))
    seen = []
    pipe.vae.decoder.conv_in.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    assert run_pipeline(pipe, "sdxl").isfinite().all()
    assert seen == [torch.float32 if new else torch.float16]
    assert pipe.vae.dtype == torch.float16


def test_tiling_and_slicing_survive() -> None:
    """Oracle: the tiled images from before, which the tile settings have an influence on, and slices of one image."""
    name = "sd img2img"
    pipe = build_pipeline(name)
    images = [run_pipeline(pipe, name)]
    pipe.vae.enable_tiling()
    images.append(run_pipeline(pipe, name))
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size, pipe.vae.tile_overlap_factor = 24, 12, 0.5
    pipe.vae.enable_slicing()
    images.append(run_pipeline(pipe, name))
    assert not any(torch.equal(images[2], other) for other in images[:2])
    swap_vae(pipe, small_vae())
    assert torch.equal(run_pipeline(pipe, name), images[2])
    sizes = []
    pipe.vae.encoder.conv_in.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    pipe.vae.encode(torch.zeros(3, 3, 16, 16))
    assert sizes == [1, 1, 1]


def offloaded(pipe: DiffusionPipeline, offload: str) -> bool:
    """Whether the VAE takes turns with the other models, or waits on the meta device."""
    if offload == "enable_model_cpu_offload":
        return any(hook.model is pipe.vae for hook in pipe._all_hooks)
    return pipe.vae.device.type == "meta"


def run_offloaded(pipe: DiffusionPipeline, name: str) -> Tensor:
    """As `run_pipeline`; what offloading by modules has put aside is taken back first.

    With a CPU for the accelerator, accelerate cannot run that.
    """
    if pipe.vae.device.type != "meta":
        return run_pipeline(pipe, name)
    pipe.remove_all_hooks()
    images = run_pipeline(pipe, name)
    pipe.enable_sequential_cpu_offload(device="cpu")
    return images


@OFFLOADS
@ONE_OF_EACH_FAMILY
def test_offloading_survives(offload: str, name: str) -> None:
    """Oracle: the images without offloading; the newcomer carries the hooks, the old VAE none."""
    pipe = build_pipeline(name)
    before, robust = run_pipeline(pipe, name), with_other_encoder(pipe.vae)
    swap_vae(pipe, copy.deepcopy(robust))
    swapped = run_pipeline(pipe, name)

    pipe = build_pipeline(name)
    getattr(pipe, offload)(device="cpu")
    device = pipe._offload_device
    own = swap_vae(pipe, robust)
    assert pipe.vae is robust and offloaded(pipe, offload) and pipe._offload_device == device
    assert own.device.type == "cpu" and not any(hasattr(module, "_hf_hook") for module in own.modules())
    assert torch.equal(run_offloaded(pipe, name), swapped)
    with pytest.raises(ZeroDivisionError), robust_vae(pipe, own):
        assert pipe.vae is own and offloaded(pipe, offload)
        assert torch.equal(run_offloaded(pipe, name), before)
        raise ZeroDivisionError
    assert pipe.vae is robust and offloaded(pipe, offload)
    assert torch.equal(run_offloaded(pipe, name), swapped)


@OFFLOADS
def test_robustify_under_offloading(offload: str) -> None:
    """Oracle: the images of `swap_vae` without offloading, and after undoing those from before; refusals keep it."""
    name = "sd img2img"
    expected = build_pipeline(name)
    before, robust = run_pipeline(expected, name), with_other_encoder(expected.vae)
    swap_vae(expected, copy.deepcopy(robust))
    pipe = build_pipeline(name)
    getattr(pipe, offload)(device="cpu")
    with pytest.raises(UserError, match="norm_num_groups"):
        robustify(pipe, small_vae(norm_num_groups=2))
    assert offloaded(pipe, offload)
    previous = robustify(pipe, robust)
    assert offloaded(pipe, offload)
    assert torch.equal(run_offloaded(pipe, name), run_pipeline(expected, name))
    swap_vae(pipe, previous)
    assert offloaded(pipe, offload)
    assert torch.equal(run_offloaded(pipe, name), before)


@OFFLOADS
def test_hooks_of_another_pipeline_are_refused(offload: str) -> None:
    """Oracle: the VAE and images from before. Only the pipeline that put the hooks on can put them on again."""
    name = "sd img2img"
    owner = build_pipeline(name)
    own, before = owner.vae, run_pipeline(owner, name)
    sharing = type(owner)(**owner.components, requires_safety_checker=False)
    getattr(owner, offload)(device="cpu")
    with pytest.raises(UserError, match="another pipeline"):
        swap_vae(sharing, small_vae())
    assert sharing.vae is owner.vae is own and offloaded(owner, offload)
    assert torch.equal(run_offloaded(owner, name), before)


@EXCHANGES
@OFFLOADS
def test_a_vae_that_another_pipeline_offloads_is_refused(offload: str, exchange: Exchange) -> None:
    """Oracle: specification. Its weights are on their way elsewhere; after the message's advice it works."""
    owner, pipe = build_pipeline("sd img2img"), build_pipeline("sd")
    own, robust = pipe.vae, owner.vae
    getattr(owner, offload)(device="cpu")
    with pytest.raises(UserError, match="offloaded by another pipeline"):
        exchange(pipe, robust)
    assert pipe.vae is own
    owner.remove_all_hooks()
    assert exchange(pipe, robust) is own


@OFFLOADS
def test_the_context_ends_where_a_sibling_offloads_meanwhile(offload: str) -> None:
    """Oracle: the VAE object from before, with the hooks that its other pipeline has put on."""
    pipe = build_pipeline("sd")
    sibling, own = sibling_of(pipe), pipe.vae
    with robust_vae(pipe, with_other_encoder(own)):
        getattr(sibling, offload)(device="cpu")
    assert pipe.vae is own and offloaded(sibling, offload)


def test_a_device_map_is_refused(tmp_path: Path) -> None:
    """Oracle: the message's own advice, after which it works; before that nothing is exchanged."""
    build_pipeline("sdxl").save_pretrained(tmp_path)
    pipe = type(build_pipeline("sdxl")).from_pretrained(tmp_path, device_map="cpu")
    own = pipe.vae
    with pytest.raises(UserError, match="reset_device_map"):
        swap_vae(pipe, small_vae())
    assert pipe.vae is own
    pipe.reset_device_map()
    assert swap_vae(pipe, small_vae()) is own


def test_group_offloading_is_refused() -> None:
    """Oracle: specification of diffusers, which cannot take these hooks off; nothing is exchanged."""
    pipe = build_pipeline("sd")
    own = pipe.vae
    pipe.vae.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(UserError, match="enable_group_offload"):
        swap_vae(pipe, small_vae())
    assert pipe.vae is own


def test_a_vae_that_another_pipeline_uses_keeps_its_slicing_and_tiling() -> None:
    """Oracle: the settings from before; within the context they are those of the pipeline that uses the VAE."""
    owner, borrower = build_pipeline("sd"), build_pipeline("sd")
    owner.vae.enable_slicing()
    owner.vae.enable_tiling()
    with robust_vae(borrower, owner.vae) as borrowed:
        assert borrowed is owner.vae
        assert (borrowed.use_slicing, borrowed.use_tiling) == (False, False)
    assert (owner.vae.use_slicing, owner.vae.use_tiling) == (True, True)
    assert (borrower.vae.use_slicing, borrower.vae.use_tiling) == (False, False)
