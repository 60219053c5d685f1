"""VAEs as one file in the original layout: names, bits, precision, and what is recognised or refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from helpers.autoencoders import small_autoencoder
from helpers.original_layout import PUBLISHED_NAMES, digest_of_names, original_shapes, random_tensors
from helpers.runs import ROOT, build_tiny_vae
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from srl_utils.errors import MissingFile, UnusableFile, UserError
from srl_utils.evaluation.cli.loading import load_codecs, vae_sources
from srl_utils.hub.__main__ import main
from srl_utils.hub.converting import convert
from srl_utils.pipelines import sanitize
from srl_utils.vae.codec import Codec
from srl_utils.vae.loading import AutoencoderSource, load_autoencoder, read_config, save_autoencoder, save_variant
from srl_utils.vae.low_rank import add_low_rank_updates, updates_of
from srl_utils.vae.single_file import (
    CONFIG_KEY,
    MODELS,
    PROGRAMS,
    SingleFile,
    model_of,
    original_name,
    programs_for,
    refusal,
    save_single_file,
)

SMALL = {"channels": (32, 64), "blocks": 1}
"""A shape with the 32 groups of the original code."""
FACTORS = {"sd": (0.18215, None), "sdxl": (0.13025, None), "sd3": (1.5305, 0.0609), "flux": (0.3611, 0.1159)}
"""Scaling and shift in the config.json of each model's public VAE."""


def at(path: Path) -> AutoencoderSource:
    return AutoencoderSource(pretrained_model_name_or_path=str(path))


def assert_same(vae: torch.nn.Module, other: torch.nn.Module) -> None:
    one, two = vae.state_dict(), other.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) and one[name].dtype == two[name].dtype for name in one)


def public_vae(model: str) -> AutoencoderKL:
    """A network of the size and configuration of the model's public VAE, without weights."""
    quant_conv = MODELS[model].latent_channels == 4
    with torch.device("meta"):
        return AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=MODELS[model].latent_channels,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            use_quant_conv=quant_conv, use_post_quant_conv=quant_conv,
            scaling_factor=FACTORS[model][0], shift_factor=FACTORS[model][1],
        )  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
def test_names_are_those_of_the_public_files(model: str) -> None:
    """Oracle: the digest of the names that others published, which the hand-written layout of other tests has too."""
    names = {original_name(name, levels=4) for name in public_vae(model).state_dict()}
    assert digest_of_names(names) == PUBLISHED_NAMES[model]
    channels = MODELS[model].latent_channels
    assert original_shapes(latent_channels=channels, quant_conv=channels == 4).keys() == names


USERS = {
    "sd": {"ComfyUI", "A1111", "Forge"},
    "sdxl": {"ComfyUI", "A1111", "Forge"},
    "sd3": {"ComfyUI", "A1111", "Forge"},
    "flux": {"ComfyUI", "Forge"},
}
"""Programs with a loader of the model in their public code: `SDVAE` in modules/models/sd3 of A1111 1.10, which has none of
Flux (its issue 16311); `possible_models` in backend/loader.py of Forge; comfy/supported_models.py."""


@pytest.mark.parametrize("model", MODELS)
def test_a_family_tells_which_programs_read_it(model: str) -> None:
    """Oracle: the programs' public code; a VAE of another shape or with other latents belongs to no family."""
    config = dict(public_vae(model).config)
    assert model_of(config) == model
    assert {program.name for program in programs_for(model)} == USERS[model]
    told = {"flux": "A1111 cannot use this VAE: it is for Flux.1"}
    assert refusal(model) == told.get(model)
    for change in ({"scaling_factor": 0.5}, {"layers_per_block": 1}, {"use_quant_conv": not config["use_quant_conv"]}):
        assert model_of(config | change) is None
    assert programs_for(None) == []
    assert refusal(None).startswith("ComfyUI, A1111 and Forge cannot use this VAE")


def test_the_documents_have_the_same_programs() -> None:
    """Oracle: `PROGRAMS`, each a row of the table in docs/publishing.md."""
    rows = [
        f"| {program.name} | {', '.join(MODELS[model].title for model in program.models)} | `{program.folder}` | {program.choice} |"
        for program in PROGRAMS
    ]
    table = "\n".join(["| program | VAEs of | folder | choose it in |", "|---|---|---|---|", *rows])
    assert f"\n\n{table}\n\n" in (ROOT / "docs/publishing.md").read_text(encoding="utf-8")


def test_diffusers_reads_what_we_write(either_tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    """Oracle: `AutoencoderKL.from_single_file`, to the bit; and names and shapes of the original code."""
    save_autoencoder(either_tiny_vae, tmp_path / "folder")
    save_single_file(either_tiny_vae, tmp_path / "vae.safetensors")
    theirs = AutoencoderKL.from_single_file(str(tmp_path / "vae.safetensors"), config=str(tmp_path / "folder"))
    assert_same(theirs, either_tiny_vae)
    written = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "vae.safetensors").items()}
    quant_conv = either_tiny_vae.config.use_quant_conv
    assert written == original_shapes(latent_channels=4, quant_conv=quant_conv, channels=(8, 16), blocks=1)


@pytest.mark.parametrize("attention", ["convolutions of 2 sides", "convolutions of 1 side", "matrices"])
@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae."])
def test_we_read_what_others_write(prefix: str, attention: str, tmp_path: Path) -> None:
    """Oracle: diffusers' reading of the same hand-written tensors. A training's loss beside them is left out."""
    tensors = random_tensors(original_shapes(latent_channels=4, quant_conv=True, **SMALL))
    trailing = {"convolutions of 2 sides": 0, "convolutions of 1 side": 1, "matrices": 2}[attention]
    for name in tensors:
        for _ in range(trailing if "attn_1" in name and name.endswith("weight") and "norm" not in name else 0):
            tensors[name] = tensors[name][..., 0].contiguous()
    named = {prefix + name: tensor for name, tensor in tensors.items()} | {f"{prefix}loss.logvar": torch.zeros(1)}
    save_file(named, tmp_path / "vae.safetensors")
    folder = tmp_path / "folder"
    convert(at(tmp_path / "vae.safetensors"), folder, config="sd", precision="fp32")
    theirs = AutoencoderKL.from_single_file(str(tmp_path / "vae.safetensors"), config=str(folder))
    ours = load_autoencoder(at(folder))
    assert_same(ours, theirs)
    assert (ours.config.scaling_factor, ours.config.norm_num_groups, ours.config.block_out_channels) == (
        0.18215,
        32,
        [32, 64],
    )


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_a_round_trip_is_the_identity(precision: str, prefix: str, tmp_path: Path) -> None:
    """Oracle: the VAE, rounded as torch rounds; every entry of the configuration, though no weight tells it."""
    vae = build_tiny_vae()
    vae.register_to_config(scaling_factor=0.7, shift_factor=0.1, force_upcast=False)
    save_autoencoder(vae, tmp_path / "before")
    convert(at(tmp_path / "before"), tmp_path / "one.safetensors", config=None, precision=precision, prefix=prefix)
    convert(at(tmp_path / "one.safetensors"), tmp_path / "after", config=None, precision="fp32")
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    assert {tensor.dtype for tensor in load_file(tmp_path / "one.safetensors").values()} == {dtype}
    after = AutoencoderKL.from_pretrained(tmp_path / "after")
    for name, tensor in vae.state_dict().items():
        assert torch.equal(after.state_dict()[name], tensor.to(dtype).float())
    assert {key: value for key, value in after.config.items() if key[0] != "_"} == {
        key: list(value) if isinstance(value, tuple) else value for key, value in vae.config.items() if key[0] != "_"
    }
    stated = [json.loads((tmp_path / f"{folder}/config.json").read_text()) for folder in ("before", "after")]
    assert stated[1] == {**stated[0], "_name_or_path": "one.safetensors"}  # as docs/publishing.md says


def test_low_rank_updates_are_merged(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    """Oracle: the same VAE saved as a folder."""
    add_low_rank_updates(tiny_vae.encoder, 2, seed=0)
    for _, _, update in updates_of(tiny_vae):
        torch.nn.init.normal_(update.lora_B)
    save_autoencoder(tiny_vae, tmp_path)
    save_variant(tiny_vae, tmp_path, "single_file")
    assert_same(load_autoencoder(at(tmp_path / "srl_vae.safetensors")), load_autoencoder(at(tmp_path)))


def header(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """Write a file with these tensors whose bytes take no room on the disk."""
    described, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * torch.Size(shape).numel()
        described[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(described).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


COMPANIONS = {
    "sd": "cond_stage_model.transformer.text_model.embeddings.position_ids",
    "sdxl": "conditioner.embedders.1.model.logit_scale",
    "sd3": "model.diffusion_model.joint_blocks.0.x_block.attn.proj.bias",
    "flux": "model.diffusion_model.double_blocks.0.img_attn.proj.bias",
}


@pytest.mark.parametrize("model", MODELS)
def test_a_whole_checkpoint_tells_its_model(model: str, tmp_path: Path) -> None:
    """Oracle: the factors and the structure that the model's VAE has in diffusers."""
    channels = MODELS[model].latent_channels
    shapes = original_shapes(latent_channels=channels, quant_conv=channels == 4)
    named = {f"first_stage_model.{name}": shape for name, shape in shapes.items()} | {COMPANIONS[model]: (1,)}
    config = read_config(at(header(tmp_path / "whole.safetensors", named)))
    assert (config["scaling_factor"], config["shift_factor"]) == FACTORS[model]
    structure = ("block_out_channels", "layers_per_block", "latent_channels", "use_quant_conv", "use_post_quant_conv")
    for entry in (*structure, "mid_block_add_attention", "norm_num_groups", "in_channels", "out_channels", "act_fn"):
        stated = public_vae(model).config[entry]
        assert config[entry] == (list(stated) if isinstance(stated, tuple) else stated)


def test_a_public_file_is_recognised_by_its_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the published SHA-256 of sdxl_vae.safetensors, which no shape tells from that of Stable Diffusion 1."""
    path = header(tmp_path / "any name.safetensors", original_shapes(latent_channels=4, quant_conv=True, **SMALL))
    with pytest.raises(
        UserError, match=r"does not say which model.*'.*any name.safetensors' '.*any name-vae' --config MODEL"
    ):
        read_config(at(path))
    digest = "63aeecb90ff7bc1c115395962d3e803571385b61938377bc7089b36e81e92e2e"
    monkeypatch.setattr("srl_utils.vae.single_file.checksum", lambda path: digest)
    assert read_config(at(path))["scaling_factor"] == 0.13025


def changed(tensors: dict[str, Tensor], **changes: Tensor | None) -> dict[str, Tensor]:
    named = {name.replace("__", "."): tensor for name, tensor in changes.items()}
    return {name: tensor for name, tensor in {**tensors, **named}.items() if tensor is not None}


REFUSED = {
    "lacks a tensor": ({"encoder__conv_in__bias": None}, "lack 1 tensors, such as encoder.conv_in.bias"),
    "holds another": ({"quantize__embedding__weight": torch.zeros(1)}, "beyond.*such as quantize.embedding.weight"),
    "misshapen": (
        {"encoder__conv_in__bias": torch.zeros(5)},
        r"encoder.conv_in.bias expected shape \(32,\), got \(5,\)",
    ),
    "NaN": ({"encoder__conv_in__bias": torch.full((32,), torch.nan)}, "encoder.conv_in.bias holds NaN"),
    "no VAE": ({"encoder__conv_in__weight": None}, "holds no AutoencoderKL in the original layout"),
    "layout of diffusers": (
        {"encoder__down_blocks__0": torch.zeros(1)},
        "has the layout of diffusers: give its folder",
    ),
    "no blocks": (
        {"encoder__down__0__block__0__conv1__weight": None},
        "encoder.down.0.block.0.conv1.weight is missing",
    ),
    "other latents": ({"decoder__conv_in__weight": torch.zeros(64, 7, 3, 3)}, "has 7 latent channels, and.*has 4"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_broken_files_are_refused(case: str, tmp_path: Path) -> None:
    """Oracle: one line that names the file and the fault; nothing is written."""
    changes, message = REFUSED[case]
    tensors = random_tensors(original_shapes(latent_channels=4, quant_conv=True, **SMALL))
    save_file(changed(tensors, **changes), tmp_path / "vae.safetensors")
    with pytest.raises(UserError, match=message) as caught:
        convert(at(tmp_path / "vae.safetensors"), tmp_path / "out", config="sd", precision="fp32")
    assert "vae.safetensors" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["AutoencoderKL", "VQModel"])
def test_a_folder_gives_the_configuration(name: str, tmp_path: Path) -> None:
    """Oracle: the tensors of the folder's own VAE, whose 4 groups no weight tells; a VAE of another class is refused."""
    small_autoencoder(name).save_pretrained(tmp_path / "stated")
    vae = small_autoencoder("AutoencoderKL")
    save_single_file(vae, tmp_path / "vae.safetensors")
    save_file(load_file(tmp_path / "vae.safetensors"), tmp_path / "vae.safetensors")  # without the metadata
    settings = {"config": str(tmp_path / "stated"), "precision": "fp32"}
    if name != "AutoencoderKL":
        with pytest.raises(UserError, match="holds an AutoencoderKL, and the configuration is of a VQModel"):
            convert(at(tmp_path / "vae.safetensors"), tmp_path / "out", **settings)
        return
    convert(at(tmp_path / "vae.safetensors"), tmp_path / "out", **settings)
    assert_same(load_autoencoder(at(tmp_path / "out")), vae)
    assert read_config(at(tmp_path / "out"))["norm_num_groups"] == 4


@pytest.mark.parametrize("config", ["{", "[" * 10**5, "[1]", '{"_class_name": "VQModel"}', '{"_class_name": 5}'])
def test_a_damaged_configuration_is_refused(config: str, tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    """Oracle: one line that says so."""
    save_single_file(tiny_vae, tmp_path / "vae.safetensors")
    weights = load_file(tmp_path / "vae.safetensors")
    save_file(weights, tmp_path / "vae.safetensors", metadata={CONFIG_KEY: config})
    with pytest.raises(UnusableFile, match=r"diffusers_config.*is damaged"):
        read_config(at(tmp_path / "vae.safetensors"))


@pytest.mark.parametrize("name", ["VQModel", "AsymmetricAutoencoderKL", "AutoencoderKLFlux2"])
def test_other_classes_are_refused(name: str, tmp_path: Path) -> None:
    """Oracle: one line with the class, and no file."""
    with pytest.raises(UserError, match=f"holds an AutoencoderKL, and this VAE is of the class {name}"):
        save_single_file(small_autoencoder(name), tmp_path / "vae.safetensors")
    assert not any(tmp_path.iterdir())


def test_the_command(tiny_vae: AutoencoderKL, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the file loads; one that other programs cannot use is told; nothing that exists is replaced."""
    save_autoencoder(tiny_vae, tmp_path / "vae")
    target = tmp_path / "one.safetensors"
    assert main(["convert", str(tmp_path / "vae"), str(target)]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"converted to {target}\n"
    assert "ComfyUI, A1111 and Forge cannot use this VAE" in printed.err
    assert_same(load_autoencoder(at(target)), tiny_vae)
    for arguments, message in (
        ([str(tmp_path / "vae"), str(target)], "exists; remove it"),
        ([str(target), str(tmp_path / "new"), "--prefix", "vae."], "prefix: names begin with it only in a file"),
        ([str(tmp_path / "vae"), str(tmp_path / "new"), "--config", "sd"], "config: it is for a single file"),
        ([str(target), str(tmp_path / "new"), "--subfolder", "vae"], "is one file and has no subfolders"),
        ([str(target), str(tmp_path / "new"), "--config", str(tmp_path / "absent")], "config: no VAE configuration at"),
    ):
        with pytest.raises(UserError, match=message):
            main(["convert", *arguments])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("further", [(), ("--config", "sd"), ("--config", "absent.safetensors")])
def test_a_file_that_is_not_there(
    further: tuple[str, ...], tiny_vae: AutoencoderKL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the same line for SOURCE, with and without --config, and for a --config, of a file that was mistyped."""
    monkeypatch.chdir(tmp_path)
    save_single_file(tiny_vae, tmp_path / "there.safetensors")
    source = "there.safetensors" if "absent.safetensors" in further else "absent.safetensors"
    with pytest.raises(
        MissingFile, match=r"^(config: )?there is no file 'absent\.safetensors'; give the path of a file"
    ):
        main(["convert", source, "new", *further])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "name", ["a.ckpt", "a.pt", "a.pth", "a.bin", "v1.BIN", "a.safetensor", "a.SAFETENSORS", "a.sft", "new/.safetensors"]
)
def test_a_target_with_the_suffix_of_another_file(name: str, tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    """Oracle: one line with the suffix that a file has to have, and no folder of that name."""
    save_autoencoder(tiny_vae, tmp_path / "vae")
    with pytest.raises(UserError, match=r"name has to end in \.safetensors, such as [^ ]*\.safetensors;"):
        main(["convert", str(tmp_path / "vae"), str(tmp_path / name)])
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]


@pytest.mark.parametrize("name", ["sd-v1.5", "vae.old", "new/vae", "bin", "my.safetensors.d"])
def test_a_target_that_is_a_folder(name: str, tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    """Oracle: the folder loads, whatever dots are in its name."""
    save_autoencoder(tiny_vae, tmp_path / "vae")
    assert main(["convert", str(tmp_path / "vae"), str(tmp_path / name)]) == 0
    assert_same(load_autoencoder(at(tmp_path / name)), tiny_vae)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("dangling", "dangling is a link to nothing; remove it"),
        ("dangling.safetensors", "dangling.safetensors is a link to nothing; remove it"),
        ("dangling/vae", "cannot write .*dangling/vae: No such file or directory"),
        ("file/vae", "cannot write .*file/vae: Not a directory"),
        ("file/new/vae.safetensors", "cannot write .*file/new/vae.safetensors: Not a directory"),
        ("x" * 300, "cannot write .*: File name too long"),
        ("/proc/vae", "cannot write /proc/vae: "),
        ("/proc/vae.safetensors", "cannot write /proc/vae.safetensors: "),
    ],
)
def test_a_target_that_cannot_be_written(
    target: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the system's own reason in one line, before anything is loaded; nothing is left behind."""
    if target.startswith("/proc") and sys.platform != "linux":
        pytest.skip("there is no /proc")
    (tmp_path / "file").write_text("")
    for link in ("dangling", "dangling.safetensors"):
        (tmp_path / link).symlink_to("nowhere")
    monkeypatch.setattr("srl_utils.hub.converting.load_autoencoder", lambda source: pytest.fail("the VAE was loaded"))
    with pytest.raises(UserError, match=message):
        main(["convert", str(tmp_path / "vae"), str(tmp_path / target)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "dangling.safetensors", "file"]


def test_the_command_reads_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the weights that were saved as the variant; two subfolders are one too many, unless they are the same."""
    vae = build_tiny_vae(seed=3)
    vae.save_pretrained(tmp_path / "pipe/vae", variant="fp16")
    monkeypatch.chdir(tmp_path)
    for number, words in enumerate((
        ["pipe:vae,variant=fp16"], ["pipe,variant=fp16", "--subfolder", "vae"], ["pipe:vae,variant=fp16", "--subfolder", "vae"]
    )):  # fmt: skip
        assert main(["convert", words[0], f"{number}.safetensors", *words[1:]]) == 0
        assert_same(load_autoencoder(at(tmp_path / f"{number}.safetensors")), vae)
    with pytest.raises(UserError, match="subfolder: pipe:vae names the subfolder vae already"):
        main(["convert", "pipe:vae", "new", "--subfolder", "unet"])
    with pytest.raises(UserError, match="is a file on this machine and has no revisions"):
        main(["convert", "0.safetensors@main", "new"])
    for further in ([], ["--config", "pipe:vae"]):
        with pytest.raises(UserError, match="is one file and has no variants; leave out the variant fp16"):
            main(["convert", "0.safetensors,variant=fp16", "new", *further])
    save_file(load_file("0.safetensors"), "bare.safetensors")  # without the metadata
    assert main(["convert", "bare.safetensors", "new", "--config", "pipe:vae"]) == 0
    assert_same(load_autoencoder(at(tmp_path / "new")), vae)


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float64])
def test_every_floating_point_is_read_as_float32(kind: torch.dtype, prefix: str, tmp_path: Path) -> None:
    """Oracle: torch's own conversion of each stored number, by `convert` and wherever a VAE is loaded."""
    path = tmp_path / "vae.safetensors"
    shapes = original_shapes(latent_channels=4, quant_conv=True, **SMALL)
    tensors = {name: tensor.to(kind) for name, tensor in random_tensors(shapes).items()}
    named = {prefix + name: tensor for name, tensor in tensors.items()}
    save_file(named, path)
    convert(at(path), tmp_path / "out", config="sd", precision="fp32")
    config = json.dumps(SingleFile.read(path).config_of(MODELS["sd"]))
    save_file(named, path, metadata={CONFIG_KEY: config})
    for vae in (load_autoencoder(at(path)), load_autoencoder(at(tmp_path / "out"))):
        weights = {original_name(name, levels=2): tensor for name, tensor in vae.state_dict().items()}
        assert weights.keys() == tensors.keys()
        for name, tensor in weights.items():
            assert tensor.dtype == torch.float32 and torch.equal(tensor, tensors[name].float().reshape(tensor.shape))


@pytest.mark.parametrize(("kind", "name"), [(torch.int8, "I8"), (torch.uint8, "U8"), (torch.bool, "BOOL")])
def test_integers_are_refused(kind: torch.dtype, name: str, tmp_path: Path) -> None:
    """Oracle: one line with the tensor and its type, by `convert` and wherever a configuration is read; nothing is written."""
    tensors = random_tensors(original_shapes(latent_channels=4, quant_conv=True, **SMALL))
    save_file(changed(tensors, quant_conv__weight=tensors["quant_conv.weight"].to(kind)), tmp_path / "vae.safetensors")
    for read in (
        lambda: convert(at(tmp_path / "vae.safetensors"), tmp_path / "out", config="sd", precision="fp32"),
        lambda: read_config(at(tmp_path / "vae.safetensors")),
    ):
        with pytest.raises(UserError, match=f"vae.safetensors': its quant_conv.weight is of the type {name}") as caught:
            read()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_single_file_has_no_variants(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    """Oracle: one line that says so, instead of a flag without effect."""
    save_single_file(tiny_vae, tmp_path / "vae.safetensors")
    with pytest.raises(UserError, match="is one file and has no variants"):
        read_config(AutoencoderSource(pretrained_model_name_or_path=str(tmp_path / "vae.safetensors"), variant="fp16"))


def test_sanitize_takes_a_single_file(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    """Oracle: the same VAE as an object; pipelines resolve their VAEs by the same function."""
    save_single_file(tiny_vae, tmp_path / "vae.safetensors")
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sanitize(images, tmp_path / "vae.safetensors"), sanitize(images, tiny_vae))


def test_the_evaluation_takes_a_single_file(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    """Oracle: the digest of the VAE's weights; the flags `--baseline` and `--vae` go through these functions."""
    save_single_file(tiny_vae, tmp_path / "vae.safetensors")
    sources = vae_sources(str(tmp_path / "vae.safetensors"), [f"robust={tmp_path / 'vae.safetensors'}"])
    assert list(sources) == ["original", "robust"]
    codecs = load_codecs(sources, device=torch.device("cpu"), dtype=None)
    assert {codec.digest for codec in codecs} == {Codec.of(tiny_vae, "expected").digest}


def test_the_metadata_name_no_folder(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    """Oracle: a search for the folder in the file."""
    save_autoencoder(tiny_vae, tmp_path / "private")
    save_single_file(load_autoencoder(at(tmp_path / "private")), tmp_path / "vae.safetensors")
    assert b"private" not in (tmp_path / "vae.safetensors").read_bytes()
    with safe_open(tmp_path / "vae.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
    assert SingleFile.read(tmp_path / "vae.safetensors").others == frozenset()
