"""Images through the robust VAE, from Python and from the command line."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.hooks import attach_align_device_hook
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline
from helpers.autoencoders import small_autoencoder
from helpers.objectives import pixel_distance
from helpers.purifying_pipelines import build_pixel_model, build_stable_diffusion, build_upscaler
from helpers.runs import ROOT
from helpers.small_pipelines import build_pipeline, small_vae
from PIL import Image
from torch import Tensor

from srl_utils.command_line import exit_code
from srl_utils.errors import UserError
from srl_utils.images.decoding import UnreadableImage
from srl_utils.pipelines import sanitize
from srl_utils.pipelines.__main__ import main
from srl_utils.pipelines.formats import writable_suffixes
from srl_utils.purifiers.autoencoding import IMPRESS
from srl_utils.vae.families import FAMILIES
from srl_utils.vae.loading import save_autoencoder

SIZES = [(1, 1), (3, 5), (16, 16), (17, 2), (9, 40)]
TILE = 16  # the tiny VAE's


def draw_pixels(height: int, width: int, *, seed: int = 0) -> np.ndarray:
    """`[H,W,3]` uint8 noise."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def draw_picture(height: int = 9, width: int = 7, *, seed: int = 0) -> Image.Image:
    return Image.fromarray(draw_pixels(height, width, seed=seed))


def draw_floats(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Noise in [0,1]."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def reconstruct(images: Tensor, vae: AutoencoderKL) -> Tensor:
    """Images `[N,3,H,W]` in [0,1] through encoder and decoder as diffusers documents them."""
    with torch.no_grad():
        latents = vae.encode((2 * images - 1).to(vae.dtype)).latent_dist.mode()
        return (vae.decode(latents).sample.float() / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_same_pixels_give_the_same_result(tiny_vae: AutoencoderKL, size: tuple[int, int]) -> None:
    """Oracle: invariance, bit for bit; PIL, arrays, tensors, alone or in a batch or list, 8 bits or floats."""
    pixels = draw_pixels(*size)
    expected = np.asarray(sanitize(Image.fromarray(pixels), tiny_vae))
    assert expected.shape == pixels.shape and not np.array_equal(expected, pixels)
    channels_first = torch.from_numpy(pixels).permute(2, 0, 1)
    arrays = [
        sanitize(pixels, tiny_vae),
        sanitize(pixels[None], tiny_vae)[0],
        sanitize([pixels], tiny_vae)[0],
        sanitize(channels_first, tiny_vae).permute(1, 2, 0).numpy(),
        sanitize(channels_first[None], tiny_vae)[0].permute(1, 2, 0).numpy(),
        (sanitize(pixels / np.float32(255), tiny_vae) * 255).round().astype(np.uint8),
    ]
    for array in arrays:
        assert array.dtype == np.uint8
        np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floats_keep_shape_and_dtype(tiny_vae: AutoencoderKL, size: tuple[int, int], dtype: torch.dtype) -> None:
    """Oracle: the float32 result rounded to the dtype; the input itself is left alone."""
    images = draw_floats(2, 3, *size, dtype=dtype)
    untouched = images.clone()
    cleaned = sanitize(images, tiny_vae)
    assert cleaned.dtype == dtype and cleaned.shape == images.shape
    assert torch.equal(cleaned, sanitize(images.float(), tiny_vae).to(dtype))
    assert torch.equal(images, untouched)
    if dtype != torch.bfloat16:  # which numpy lacks
        array = sanitize(images.movedim(1, -1).numpy(), tiny_vae)
        np.testing.assert_array_equal(array, cleaned.movedim(1, -1).numpy())


def test_multiples_of_the_factor_are_encoded_and_decoded_as_they_are(miniature_vae: AutoencoderKL) -> None:
    """Oracle: diffusers' own encode and decode."""
    images = draw_floats(2, 3, 16, 24)
    torch.testing.assert_close(sanitize(images, miniature_vae), reconstruct(images, miniature_vae), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(1, 1), (9, 6), (16, 7)], ids=str)
def test_other_sizes_are_padded_with_the_border_and_cropped(
    miniature_vae: AutoencoderKL, size: tuple[int, int]
) -> None:
    """Oracle: numpy's padding by the edge to multiples of 8, diffusers' encode and decode, and the crop by hand."""
    images = draw_floats(1, 3, *size)
    height, width = size
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (0, -height % 8), (0, -width % 8)), mode="edge")
    expected = reconstruct(torch.from_numpy(padded), miniature_vae)[..., :height, :width]
    torch.testing.assert_close(sanitize(images, miniature_vae), expected, rtol=0, atol=1e-6)


def test_a_list_may_mix_kinds_and_sizes(tiny_vae: AutoencoderKL) -> None:
    """Oracle: each of them alone."""
    images = [draw_picture(), draw_pixels(5, 4), draw_floats(3, 2, 6)]
    picture, array, tensor = sanitize(images, tiny_vae)
    assert picture.tobytes() == sanitize(images[0], tiny_vae).tobytes()
    np.testing.assert_array_equal(array, sanitize(images[1], tiny_vae))
    assert torch.equal(tensor, sanitize(images[2], tiny_vae))
    assert sanitize([], tiny_vae) == []


@pytest.mark.parametrize("mode", ["L", "P", "I;16", "CMYK"])
def test_opaque_pictures_become_rgb(tiny_vae: AutoencoderKL, mode: str) -> None:
    """Oracle: the result for the picture as Pillow converts it, for 16 bits the one of the same grays in 8."""
    picture = draw_picture().convert("L" if mode == "I;16" else mode)
    flat = picture.convert("RGB")
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(picture).astype(np.uint16) * 257)
    cleaned = sanitize(picture, tiny_vae)
    assert cleaned.mode == "RGB"
    assert cleaned.tobytes() == sanitize(flat, tiny_vae).tobytes()


def test_half_precision_vaes_compute_in_it(tiny_vae: AutoencoderKL) -> None:
    """Oracle: diffusers' own encode and decode in bf16; the image keeps its float32."""
    images = draw_floats(1, 3, 8, 8)
    vae = tiny_vae.bfloat16()
    cleaned = sanitize(images, vae)
    assert torch.equal(cleaned, reconstruct(images, vae))
    assert cleaned.dtype == torch.float32 and vae.dtype == torch.bfloat16


@pytest.mark.parametrize("force_upcast", [True, False])
def test_fp16_is_upcast_where_the_config_asks(force_upcast: bool) -> None:
    """Oracle: the same weights in float32 if `force_upcast`, else diffusers in fp16; afterwards it is fp16 again."""
    images, vae = draw_floats(1, 3, 8, 8), small_vae(force_upcast=force_upcast).half()
    reference = copy.deepcopy(vae).float() if force_upcast else vae
    torch.testing.assert_close(sanitize(images, vae), reconstruct(images, reference), rtol=0, atol=1e-6)
    assert vae.dtype == torch.float16


@pytest.mark.parametrize("longer", [2 * TILE, 2 * TILE + 1])
def test_only_larger_images_are_tiled(tiny_vae: AutoencoderKL, longer: int) -> None:
    """Oracle: diffusers with `enable_tiling` for a side of 33, without for 32, where tiles would show."""
    images = draw_floats(1, 3, longer, TILE)
    tiled = copy.deepcopy(tiny_vae)
    tiled.enable_tiling()
    padded = torch.nn.functional.pad(images, (0, 0, 0, longer % 2), mode="replicate")
    plain, in_tiles = (reconstruct(padded, vae)[..., :longer, :] for vae in (tiny_vae, tiled))
    assert not torch.allclose(plain, in_tiles, atol=1e-3)
    cleaned = sanitize(images, tiny_vae, tile_above=2 * TILE)
    torch.testing.assert_close(cleaned, in_tiles if longer > 2 * TILE else plain, rtol=0, atol=1e-6)


def test_latents_of_any_number_of_channels_are_sanitized_at_any_size() -> None:
    """Oracle: the same image in one piece; diffusers' tiles of this class take four channels alone."""
    torch.manual_seed(0)
    channels = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    vae = AutoencoderTiny(**channels, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), latent_channels=16).eval()
    image = torch.rand(1, 3, 40, 24, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sanitize(image, vae, tile_above=16), sanitize(image, vae, tile_above=64))


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if not family.tiling])
def test_classes_whose_tiles_are_wrong_take_an_image_in_one_piece(name: str) -> None:
    """Oracle: the same image below the size from which tiles, of 16 pixels here, are used; they fail or change it."""
    vae = small_autoencoder(name)
    for entry in ("tile_sample_min_size", "tile_sample_min_height", "tile_sample_min_width"):
        setattr(vae, entry, 16)
    image = draw_floats(1, 3, 40, 40)
    assert torch.equal(sanitize(image, vae, tile_above=16), sanitize(image, vae, tile_above=64))


@pytest.mark.parametrize("tiling", [True, False])
@pytest.mark.parametrize("size", [TILE, 3 * TILE])
def test_the_vae_is_never_changed(monkeypatch: pytest.MonkeyPatch, tiling: bool, size: int) -> None:
    """Oracle: tiling and dtype from before, in the middle of the work too, where other threads would see them."""
    vae = small_vae(force_upcast=True).half()
    vae.use_tiling = tiling
    seen = []
    decode = AutoencoderKL.decode

    def look(model: AutoencoderKL, latents: Tensor, **settings: Any) -> Any:
        seen.append((model.use_tiling, model.dtype, vae.use_tiling, vae.dtype))
        return decode(model, latents, **settings)

    monkeypatch.setattr(AutoencoderKL, "decode", look)
    sanitize(draw_floats(1, 3, size, size), vae, tile_above=TILE)
    assert seen == [(tiling or size > TILE, torch.float32, tiling, torch.float16)]
    assert (vae.use_tiling, vae.dtype) == (tiling, torch.float16)


def test_a_vae_from_a_folder(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    """Oracle: the VAE object that was saved there."""
    save_autoencoder(tiny_vae, tmp_path / "vae")
    images = draw_floats(1, 3, 8, 8)
    cleaned = sanitize(images, tmp_path, subfolder="vae")
    torch.testing.assert_close(cleaned, sanitize(images, tiny_vae), rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="missing"):
        sanitize(images, tmp_path / "missing")


def test_the_vae_of_an_offloading_pipeline() -> None:
    """Oracle: the result without offloading, by models and by modules, whose weights wait on the meta device."""
    pipe, images = build_pipeline("sd"), draw_floats(1, 3, 8, 8)
    expected = sanitize(images, pipe.vae)
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(sanitize(images, pipe.vae), expected)
    pipe.remove_all_hooks()
    weights = dict(pipe.vae.state_dict())
    attach_align_device_hook(pipe.vae, execution_device=torch.device("cpu"), offload=True, weights_map=weights)
    assert pipe.vae.device.type == "meta"
    assert torch.equal(sanitize(images, pipe.vae), expected)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (draw_floats(3, 8, 8) - 0.5, r"floats in \[0,1\] or uint8, got values from -0.49"),
        (draw_floats(3, 8, 8) * 255, r"floats in \[0,1\] or uint8, got values from .* to 25"),
        (torch.full((3, 8, 8), torch.nan), "got values from nan to nan"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "or uint8, got torch.int64"),
        (np.zeros((8, 8, 3), dtype=bool), "or uint8, got torch.bool"),
        (torch.zeros(4, 8, 8), r"\(1, 4, 8, 8\)"),
        (np.zeros((8, 8, 4), dtype=np.uint8), r"\(1, 4, 8, 8\)"),
        (np.zeros((8, 8)), r"\(8, 8\)"),
        (torch.zeros(0, 3, 8, 8), r"\(0, 3, 8, 8\)"),
        ("picture.png", "got str"),
    ],
    ids=["negative", "255", "nan", "int64", "bool", "4 channels", "alpha", "gray", "empty", "path"],
)
def test_what_is_no_image_is_refused(tiny_vae: AutoencoderKL, images: Any, message: str) -> None:
    """Oracle: the documented ValueError, which names what was given."""
    with pytest.raises(ValueError, match=message):
        sanitize(images, tiny_vae)


def test_a_broken_picture_is_unreadable(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    """Oracle: half a JPEG holds no whole picture; Pillow finds out when the pixels are asked for."""
    draw_picture(64, 64).save(tmp_path / "whole.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-800])
    with pytest.raises(UnreadableImage), Image.open(tmp_path / "half.jpg") as picture:
        sanitize(picture, tiny_vae)


@pytest.fixture
def vae_at(tiny_vae: AutoencoderKL, tmp_path: Path) -> Path:
    """The folder of `tiny_vae`."""
    save_autoencoder(tiny_vae, tmp_path / "vae")
    return tmp_path / "vae"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four pictures at three depths, one of them no more than a name, and a text."""
    folder = tmp_path / "pictures"
    (folder / "a" / "b").mkdir(parents=True)
    draw_picture(9, 7).save(folder / "0.png")
    draw_picture(4, 5, seed=1).save(folder / "a" / "1.JPG", format="JPEG")
    draw_picture(6, 6, seed=2).save(folder / "a" / "b" / "2.ppm")
    (folder / "a" / "0-broken.png").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("no picture")
    return folder


def sanitize_command(*arguments: object) -> int:
    """The exit code of `python -m srl_utils.pipelines sanitize`, in this process."""
    return exit_code(lambda: main(["sanitize", "--device", "cpu", *map(str, arguments)]))


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_command_end_to_end(vae_at: Path, tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    """Oracle: the real command; the file it leaves is what `sanitize` makes of the picture, the bar reaches 100%."""
    picture = draw_picture()
    picture.save(tmp_path / "in.png")
    command = [sys.executable, "-m", "srl_utils.pipelines", "sanitize", tmp_path / "in.png", tmp_path / "out.png"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    outcome = subprocess.run(
        [*command, "--vae", vae_at, "--device", "cpu"], cwd=tmp_path, env=environment, timeout=120, capture_output=True,
        text=True,
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stderr
    assert "sanitize: 100%" in outcome.stderr
    assert f"1 images written to {tmp_path / 'out.png'}" in outcome.stdout
    with Image.open(tmp_path / "out.png") as cleaned:
        assert cleaned.tobytes() == sanitize(picture, tiny_vae).tobytes()


@pytest.mark.parametrize("place", ["outside", "pictures/inside"])
def test_a_folder_keeps_its_order(
    vae_at: Path, tiny_vae: AutoencoderKL, folder: Path, place: str, capsys: pytest.CaptureFixture
) -> None:
    """Oracle: the names put there, each with `sanitize`'s pixels; a second run finds the same work, not its results."""
    output = folder.parent / place
    expected = {"0.png": "0.png", "a/1.JPG": "a/1.JPG", "a/b/2.ppm": "a/b/2.ppm.png"}
    for _ in range(2):
        assert sanitize_command(folder, output, "--vae", vae_at) == 0
        assert files_in(output) == set(expected.values())
        printed = capsys.readouterr()
        assert "3 images written" in printed.out
        assert "1 images cannot be read" in printed.err and str(folder / "a" / "0-broken.png") in printed.err
    for source in ("0.png", "a/b/2.ppm"):
        with Image.open(folder / source) as picture, Image.open(output / expected[source]) as cleaned:
            assert cleaned.tobytes() == sanitize(picture, tiny_vae).tobytes()


@pytest.mark.parametrize("suffix", writable_suffixes())
def test_every_format_can_be_written(vae_at: Path, tiny_vae: AutoencoderKL, tmp_path: Path, suffix: str) -> None:
    """Oracle: Pillow's own file of the same pixels, at quality 95 where the format loses any; a GIF's 256 colours."""
    picture = draw_picture(24, 16)
    picture.save(tmp_path / "in.png")
    output, expected = tmp_path / f"out{suffix.upper()}", tmp_path / f"expected{suffix}"
    assert sanitize_command(tmp_path / "in.png", output, "--vae", vae_at) == 0
    cleaned = sanitize(picture, tiny_vae)
    cleaned = cleaned.quantize(255) if suffix == ".gif" else cleaned
    cleaned.save(expected, **({"quality": 95} if suffix.startswith((".j", ".webp")) else {}))
    with Image.open(output) as written, Image.open(expected) as reference:
        assert written.format == reference.format
        assert written.convert("RGB").tobytes() == reference.convert("RGB").tobytes()


def test_a_file_may_go_into_a_folder(vae_at: Path, folder: Path, tmp_path: Path) -> None:
    """Oracle: the source's name in that folder, with another suffix where the format can only be read."""
    (tmp_path / "out").mkdir()
    for source in ("0.png", "a/b/2.ppm"):
        assert sanitize_command(folder / source, tmp_path / "out", "--vae", vae_at) == 0
    assert files_in(tmp_path / "out") == {"0.png", "2.ppm.png"}


def test_tile_above_reaches_the_vae(vae_at: Path, tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    """Oracle: `sanitize` with the same setting, which changes the pixels."""
    picture = draw_picture(3 * TILE, TILE)
    picture.save(tmp_path / "in.png")
    assert sanitize_command(tmp_path / "in.png", tmp_path / "out.png", "--vae", vae_at, "--tile_above", TILE) == 0
    with Image.open(tmp_path / "out.png") as cleaned:
        assert cleaned.tobytes() == sanitize(picture, tiny_vae, tile_above=TILE).tobytes()
        assert cleaned.tobytes() != sanitize(picture, tiny_vae).tobytes()


REFUSED: dict[str, tuple[Callable[[Path], list[Any]], str]] = {
    "missing input": (lambda at: [at / "nothing", at / "out.png"], "nothing does not exist"),
    "wrong suffix": (lambda at: [at / "0.png", at / "out.pdf"], "out.pdf must end in one of .apng, .bmp"),
    "same file": (lambda at: [at / "0.png", at / "0.png"], "0.png is the input"),
    "same file by its folder": (lambda at: [at / "0.png", at], "0.png is the input"),
    "same file by a detour": (lambda at: [at / "0.png", at / "a" / ".." / "0.png"], "0.png is the input"),
    "same folder": (lambda at: [at, at], "pictures is the input"),
    "folder to file": (lambda at: [at, at / "0.png"], "0.png is a file"),
    "no images": (lambda at: [at.parent / "vae", at / "out"], "vae holds no images"),
    "nothing readable": (lambda at: [at / "a" / "0-broken.png", at / "out.png"], "nothing was written: none of 1"),
    "no place to write": (lambda at: [at / "0.png", at / "notes.txt" / "out.png"], "cannot write"),
    "no VAE": (lambda at: [at / "0.png", at / "out.png", "--vae", at], "no VAE configuration"),
    "no tile": (lambda at: [at / "0.png", at / "out.png", "--tile_above", "0"], "0 is less than 1"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input_ends_in_one_line(
    vae_at: Path, folder: Path, arguments: Callable[[Path], list[Any]], message: str, capsys: pytest.CaptureFixture
) -> None:
    """Oracle: exit code 2 and a last line with the reason; no file is written or changed."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert sanitize_command("--vae", vae_at, *arguments(folder)) == UserError.exit_code
    *bar, line = capsys.readouterr().err.strip().split("\n")
    assert line.startswith("error: ") and message in line
    assert all(part.lstrip("\r").startswith("sanitize: ") for part in bar)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_the_vae_has_to_be_named(folder: Path, capsys: pytest.CaptureFixture) -> None:
    """Oracle: exit code 2 and the reason in one line."""
    assert sanitize_command(folder, folder.parent / "out") == UserError.exit_code
    assert capsys.readouterr().err == "error: vae-loop needs a VAE; give --vae\n"


def test_other_purifiers_need_no_vae(folder: Path, capsys: pytest.CaptureFixture) -> None:
    """Oracle: Pillow's own JPEG file; a VAE beside it would have no effect, and it is said."""
    out = folder.parent / "out.png"
    assert sanitize_command(folder / "0.png", out, "--purifier", "jpeg-30") == 0
    file = io.BytesIO()
    Image.open(folder / "0.png").convert("RGB").save(file, "JPEG", quality=30)
    np.testing.assert_array_equal(np.asarray(Image.open(out)), np.asarray(Image.open(file)))
    for flags, message in (
        (("--vae", folder), "--vae has no effect without a purifier that uses a VAE"),
        (("--purifier", "jpg"), "no purifier 'jpg'; choose from jpeg-QUALITY"),
    ):
        assert sanitize_command(folder / "0.png", out, "--purifier", "jpeg-30", *flags) == UserError.exit_code
        assert message in capsys.readouterr().err


def test_chains_pass_the_vae_in_their_place(tiny_vae) -> None:
    """Oracle: the two steps one after the other, also of a size that the VAE does not take."""
    images = draw_floats(2, 3, 17, 22)
    filed = sanitize(images, purifier="jpeg-60")
    torch.testing.assert_close(sanitize(images, tiny_vae, purifier="jpeg-60+vae-loop"), sanitize(filed, tiny_vae))


@pytest.fixture
def short_impress(monkeypatch: pytest.MonkeyPatch) -> None:
    """IMPRESS in three steps, with a perceptual distance that needs no weights."""
    monkeypatch.setitem(IMPRESS, "impress", replace(IMPRESS["impress"], num_steps=3))
    monkeypatch.setattr("srl_utils.pipelines.sanitizing.load_perceptual_distance", lambda net: pixel_distance())


@pytest.mark.usefixtures("short_impress")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_impress_computes_in_float32_and_leaves_the_vae_alone(tiny_vae: AutoencoderKL, dtype: torch.dtype) -> None:
    """Oracle: the same weights in float32; what autograd knows of the VAE's own weights, some of them frozen, stays."""
    vae, images = tiny_vae.to(dtype), draw_floats(2, 3, 9, 12)
    vae.decoder.requires_grad_(False)
    before = {name: (weight.requires_grad, weight.dtype) for name, weight in vae.named_parameters()}
    found = sanitize(images, vae, purifier="impress")
    assert {name: (weight.requires_grad, weight.dtype) for name, weight in vae.named_parameters()} == before
    assert all(weight.grad is None for weight in vae.parameters())
    assert torch.equal(found, sanitize(images, copy.deepcopy(vae).float(), purifier="impress"))
    assert 0 < (found - images).abs().max() < 0.3


@pytest.mark.usefixtures("short_impress")
@pytest.mark.parametrize("purifier", ["noise-0.05", "noise-0.05+vae-loop", "impress"])
def test_what_an_image_draws_depends_on_the_seed_alone(tiny_vae: AutoencoderKL, purifier: str) -> None:
    """Oracle: invariance: the image alone, in a batch and in a list; another seed gives another result."""
    images, settings = draw_floats(2, 3, 8, 8), {"vae": tiny_vae, "purifier": purifier}
    alone = sanitize(images[1], **settings, seed=3)
    torch.testing.assert_close(sanitize(images, **settings, seed=3)[1], alone, atol=1e-4, rtol=0)
    assert torch.equal(sanitize([images[0], images[1]], **settings, seed=3)[1], alone)
    assert not torch.allclose(sanitize(images[1], **settings), alone, atol=1e-3)


def test_a_file_does_not_depend_on_the_others(folder: Path) -> None:
    """Oracle: the real command on one file, and on its folder; another seed gives other pixels."""
    out, noisy = folder.parent / "out", ("--purifier", "noise-0.1")
    assert sanitize_command(folder, out, *noisy) == 0
    pixels = {}
    for seed in (0, 1):
        assert sanitize_command(folder / "a/b/2.ppm", folder.parent / f"{seed}.png", *noisy, "--seed", seed) == 0
        pixels[seed] = Image.open(folder.parent / f"{seed}.png").tobytes()
    assert Image.open(out / "a/b/2.ppm.png").tobytes() == pixels[0] != pixels[1]


@pytest.fixture
def pipelines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, DiffusionPipeline]:
    """Small pipelines by the names of their folders in `tmp_path`, with two denoising steps."""
    monkeypatch.setattr("srl_utils.purifiers.diffusing.STEPS", 2)
    text_to_image = build_stable_diffusion(tmp_path)
    built = {"sd": text_to_image, "upscaler": build_upscaler(text_to_image), "pixels": build_pixel_model()}
    for name, pipeline in built.items():
        pipeline.save_pretrained(tmp_path / name)
    return built


@pytest.mark.parametrize(
    ("purifier", "kind"),
    [
        ("img2img-0.5", "sd"), ("noisy-upscaling-0.1", "upscaler"), ("diffpure-3", "pixels"),
        ("jpeg-75+diffpure-2+vae-loop", "pixels"),
    ],
)  # fmt: skip
def test_purifiers_by_pipelines(purifier: str, kind: str, vae_at: Path, folder: Path, pipelines, tiny_vae) -> None:
    """Oracle: the real command with saved pipelines, and the function with the pipelines themselves."""
    needed = ["--vae", vae_at] if "vae-loop" in purifier else []
    source, target = folder / "0.png", folder.parent / "out.png"
    places = [folder.parent / name for name in pipelines]
    command = (source, target, "--purifier", purifier, *needed, "--seed", 5)
    assert sanitize_command(*command, "--purifier_pipelines", *places) == 0
    picture, vae = Image.open(source), tiny_vae if needed else None
    expected = sanitize(picture, vae, purifier=purifier, purifier_pipelines=[pipelines[kind]], seed=5)
    assert Image.open(target).tobytes() == expected.tobytes() != picture.tobytes()


def test_what_pipelines_lack_is_told(folder: Path, pipelines, capsys: pytest.CaptureFixture) -> None:
    """Oracle: exit code 2 and one line that names the command's own flags."""
    at, out = folder.parent, folder.parent / "out.png"
    for flags, message in (
        (("--purifier", "diffpure-3"), "diffpure-3 needs a diffusion pipeline; give --purifier_pipelines"),
        (
            ("--purifier", "diffpure-3", "--purifier_pipelines", at / "sd"),
            "--purifier: diffpure-3 needs a pipeline of an unconditional model of pixels; give --purifier_pipelines",
        ),
        (("--purifier", "diffpure-3", "--purifier_pipelines", at / "nothing"), "--purifier_pipelines: "),
        (
            ("--purifier", "jpeg-75", "--purifier_pipelines", at / "sd"),
            "--purifier_pipelines has no effect without a purifier that uses a pipeline",
        ),
        (("--purifier", "jpeg-75", "--seed", 1), "--seed has no effect without a purifier that draws noise"),
    ):
        assert sanitize_command(folder / "0.png", out, *flags) == UserError.exit_code
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {message}")
    with pytest.raises(TypeError, match="purifier_pipelines: expected pipelines of diffusers, got str"):
        sanitize(draw_floats(3, 8, 8), purifier="diffpure-3", purifier_pipelines=["pixels"])
