"""Hostile, broken and absurd files of a VAE: what is refused, in which words, and that nothing in them is run."""

from __future__ import annotations

import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLHunyuanImage
from helpers.runs import Run, build_tiny_vae
from safetensors.torch import load_file, save_file

from srl_utils.errors import UserError
from srl_utils.evaluation.__main__ import main as evaluate
from srl_utils.metrics.losses import LPIPS_TRUNKS, load_perceptual_distance
from srl_utils.pipelines.loading import load_pipeline
from srl_utils.vae.files import completed_config
from srl_utils.vae.loading import WEIGHTS_NAME, AutoencoderSource, load_autoencoder, read_config

PICKLE = "diffusion_pytorch_model.bin"
LONGEST = 10  # seconds, the promise


class Mark:
    """Unpickled, it writes a file: the proof that something was run."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.system, (f"touch {shlex.quote(str(self.proof))}",)


@pytest.fixture
def vae(tmp_path: Path) -> Path:
    """The folder of a sound VAE, to be damaged."""
    build_tiny_vae().save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    """Changes the tensors in the file."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS_NAME)
        change(tensors)
        save_file(tensors, folder / WEIGHTS_NAME)

    return damage


def file_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    """Changes the bytes of the weights' file."""
    return lambda folder: (folder / WEIGHTS_NAME).write_bytes(change((folder / WEIGHTS_NAME).read_bytes()))


def config(**entries: object) -> Callable[[Path], object]:
    """Changes entries of config.json; `...` removes one."""

    def damage(folder: Path) -> None:
        file = folder / "config.json"
        changed = json.loads(file.read_text()) | entries
        file.write_text(json.dumps({key: value for key, value in changed.items() if value is not ...}))

    return damage


def renamed(tensors: dict[str, torch.Tensor]) -> None:
    tensors["encoder.conv_first.weight"] = tensors.pop("encoder.conv_in.weight")


def extended(tensors: dict[str, torch.Tensor]) -> None:
    tensors["stowaway"] = torch.zeros(1)


def poisoned(tensors: dict[str, torch.Tensor]) -> None:
    tensors["decoder.conv_out.bias"][0] = float("nan")


def infinite(tensors: dict[str, torch.Tensor]) -> None:
    tensors["encoder.conv_in.bias"][3] = -float("inf")


def all_nan(tensors: dict[str, torch.Tensor]) -> None:
    for tensor in tensors.values():
        tensor.fill_(float("nan"))


def misshapen(tensors: dict[str, torch.Tensor]) -> None:
    tensors["encoder.conv_in.weight"] = tensors["encoder.conv_in.weight"][:, :2].contiguous()


HOSTILE = {
    "truncated": (file_bytes(lambda data: data[:-100]), "cannot load.*incomplete"),
    "cut in its header": (file_bytes(lambda data: data[:50]), "cannot load.*header"),
    "empty": (file_bytes(lambda data: b""), "cannot load.*header"),
    "header of 2^64 bytes": (file_bytes(lambda data: b"\xff" * 8 + data[8:]), "cannot load.*header too large"),
    "flipped byte in its header": (file_bytes(lambda data: data[:40] + b"\x00" + data[41:]), "cannot load.*header"),
    "text": (file_bytes(lambda data: b"no weights at all, but long enough for a header"), "cannot load.*header"),
    "file renamed": (lambda folder: (folder / WEIGHTS_NAME).rename(folder / "m.safetensors"), "no file named diffusion"),
    "folder instead of file": (
        lambda folder: ((folder / WEIGHTS_NAME).unlink(), (folder / WEIGHTS_NAME).mkdir()), "no file named diffusion"
    ),
    "tensor renamed": (weights(renamed), "lack 1 tensors, such as encoder.conv_in.weight"),
    "tensor added": (weights(extended), "beyond what.*such as stowaway"),
    "tensor misshapen": (weights(misshapen), r"encoder.conv_in.weight expected shape.*8, 3, 3, 3.*8, 2, 3, 3"),
    "one NaN": (weights(poisoned), "decoder.conv_out.bias holds NaN"),
    "infinite": (weights(infinite), "encoder.conv_in.bias holds NaN or infinite"),
    "all NaN": (weights(all_nan), "holds NaN"),
    "no channels": (config(latent_channels=0), "latent_channels is 0"),
    "blocks of no channels": (config(block_out_channels=[0, 0]), r"block_out_channels is \[0, 0\]"),
    "no blocks": (config(block_out_channels=[]), r"block_out_channels is \[\]"),
    "negative channels": (config(block_out_channels=[-8, 16]), r"block_out_channels is \[-8, 16\]"),
    "a billion channels": (config(block_out_channels=[10**9, 10**9]), "block_out_channels is"),
    "channels beyond memory": (config(block_out_channels=[2**15, 2**15]), "a network of .* billion weights"),
    "a million blocks": (config(block_out_channels=[8] * 10**6), "block_out_channels is"),
    "a billion layers": (config(layers_per_block=10**9), "layers_per_block is 1000000000"),
    "no layers": (config(layers_per_block=0), "layers_per_block is 0"),
    "a billion pixels": (config(sample_size=10**9), "sample_size is 1000000000"),
    "no groups": (config(norm_num_groups=0), "norm_num_groups is 0"),
    "groups that do not fit": (config(norm_num_groups=7), "describes no AutoencoderKL.*divisible"),
    "channels as text": (config(block_out_channels="8,16"), "block_out_channels is '8,16'"),
    "channels as fractions": (config(block_out_channels=[8.5, 16]), "block_out_channels is"),
    "a truth as text": (config(force_upcast="no"), "force_upcast is 'no'"),
    "scaling of 0": (config(scaling_factor=0), "scaling_factor is 0"),
    "scaling of NaN": (config(scaling_factor=float("nan")), "scaling_factor is nan"),
    "no scaling": (config(scaling_factor=None), "scaling_factor is None"),
    "shift as text": (config(shift_factor="far"), "shift_factor is 'far'"),
    "infinite mean": (config(latents_mean=[0, 0, 0, float("inf")]), "latents_mean is"),
    "mean of one channel": (config(latents_mean=[0.0], latents_std=[1.0] * 4), r"latents_mean is \[0.0\]; give a list of 4"),
    "deviation as a number": (config(latents_mean=[0.0] * 4, latents_std=2.0), "latents_std is 2.0; give a list of 4"),
    "deviation of 0": (config(latents_mean=[0.0] * 4, latents_std=[1.0, 1.0, 0.0, 1.0]), r"latents_std is \[1.0, 1.0, 0"),
    "entry unknown": (config(run_this="rm -rf"), "says run_this, which AutoencoderKL does not know"),
    "activation unknown": (config(act_fn="os.system"), "describes no AutoencoderKL.*os.system not found"),
    "block unknown": (config(down_block_types=["Evil", "Evil"]), "describes no AutoencoderKL.*Evil"),
    "class unknown": (config(_class_name="os.system"), "is of the class os.system; the supported VAEs are AutoencoderKL"),
    "class as list": (config(_class_name=["AutoencoderKL"]), "the supported VAEs are AutoencoderKL"),
    "channels left out": (config(block_out_channels=...), "describes no AutoencoderKL.*leaves out block_out_channels"),
    "layers left out": (config(down_block_types=...), "beyond what its configuration describes"),
    "one output channel": (config(out_channels=1), "images of 1 channels"),
    "a list": (lambda folder: (folder / "config.json").write_text("[1]"), "is of the class list"),
    "bytes": (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe\x00"), "not a valid JSON"),
    "brackets without end": (lambda folder: (folder / "config.json").write_text("[" * 10**5), "recursion"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_broken_files_are_refused_by_the_command(case: str, run: Run, flags: list[str], vae: Path) -> None:
    """Oracle: the promise: one line that names the VAE and the fault, exit code 2, within seconds, nothing written."""
    damage, message = HOSTILE[case]
    damage(vae)
    started = time.monotonic()
    code, printed = run(*flags, "--pretrained_model_name_or_path", vae)
    assert time.monotonic() - started < LONGEST
    errors = [line for line in printed.splitlines() if line.startswith("error:")]
    assert code == 2 and len(errors) == 1, printed
    assert re.search(message, errors[0]) and str(vae) in errors[0], errors[0]
    assert "Traceback" not in printed and not (vae.parent / "out").exists()


@pytest.mark.parametrize("case", ["truncated", "all NaN", "no channels", "a billion channels", "entry unknown"])
def test_broken_files_are_refused_by_the_evaluation(case: str, vae: Path, tmp_path: Path) -> None:
    """Oracle: as for the training; the evaluation loads by the same functions."""
    damage, message = HOSTILE[case]
    damage(vae)
    sound = tmp_path / "sound"
    build_tiny_vae().save_pretrained(sound)
    with pytest.raises(UserError, match=message):
        evaluate([
            "reconstruction", "--baseline", str(sound), "--vae", str(vae), "--dataset_name", "scikit-image",
            "--resolution", "16", "--num_images", "1", "--output_dir", str(tmp_path / "out"),
        ])  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_what_a_configuration_leaves_out_is_diffusers_default(vae: Path) -> None:
    """Oracle: the configuration of the loaded VAE, which diffusers has completed."""
    config(latent_channels=..., scaling_factor=..., force_upcast=...)(vae)
    source = AutoencoderSource(pretrained_model_name_or_path=str(vae))
    ours, theirs = read_config(source), load_autoencoder(source).config
    for key in ("latent_channels", "scaling_factor", "force_upcast", "block_out_channels"):
        assert ours[key] == theirs[key]


def test_the_embedded_configuration_is_possible(miniature_vae: AutoencoderKL) -> None:
    """Oracle: invariance: a complete, sound configuration comes back as it was."""
    settings = dict(miniature_vae.config)
    assert completed_config(settings, AutoencoderKL, "miniature") == settings


SOUND = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": [32, 32], "layers_per_block": 1,
    "spatial_compression_ratio": 2, "sample_size": 64, "scaling_factor": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"latent_channels": ...}, "leaves out latent_channels, which AutoencoderKLHunyuanImage needs"),
        ({"layers_per_block": 10**9}, "layers_per_block is 1000000000"),
        ({"block_out_channels": [10**9, 10**9]}, "block_out_channels is"),
        ({"block_out_channels": "32,32"}, "block_out_channels is '32,32'"),
        ({"in_channels": 2.5}, "in_channels is 2.5"),
        ({"scaling_factor": 0.0}, "scaling_factor is 0.0"),
    ],
)
def test_entries_without_a_default_are_checked(entries: dict[str, object], message: str) -> None:
    """Oracle: a sound configuration comes back whole; one that lacks an entry, or has an impossible one, is refused."""
    complete = completed_config(SOUND, AutoencoderKLHunyuanImage, "it")
    assert SOUND.items() <= complete.items()
    broken = {key: value for key, value in {**SOUND, **entries}.items() if value is not ...}
    with pytest.raises(UserError, match=message):
        completed_config(broken, AutoencoderKLHunyuanImage, "it")


# --- pickles --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [PICKLE, "vae.pt", "model.ckpt", "pytorch_model.pth"])
def test_pickles_are_refused_and_not_run(name: str, run: Run, flags: list[str], vae: Path, tmp_path: Path) -> None:
    """Oracle: the file that unpickling would have written is not there, and the line names the pickle."""
    (vae / WEIGHTS_NAME).unlink()
    torch.save({"weight": Mark(tmp_path / "proof")}, vae / name)
    code, printed = run(*flags, "--pretrained_model_name_or_path", vae)
    assert code == 2 and f"pickle ({name})" in printed and "To convert it: python -c" in printed
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize(
    ("name", "message"), [("model.ckpt", "not of safetensors.*from_single_file"), ("model.safetensors", "header")]
)
def test_pickles_as_single_files_are_refused_and_not_run(
    name: str, message: str, run: Run, flags: list[str], tmp_path: Path
) -> None:
    """Oracle: as above, for the file named instead of a folder."""
    (tmp_path / name).write_bytes(pickle.dumps(Mark(tmp_path / "proof")))
    code, printed = run(*flags, "--pretrained_model_name_or_path", tmp_path / name)
    assert code == 2 and re.search(message, printed)
    assert not (tmp_path / "proof").exists()


def test_a_pickle_under_the_name_of_safetensors_is_not_run(
    run: Run, flags: list[str], vae: Path, tmp_path: Path
) -> None:
    """Oracle: the proof of its having been run is not there."""
    (vae / WEIGHTS_NAME).write_bytes(pickle.dumps(Mark(tmp_path / "proof")))
    assert run(*flags, "--pretrained_model_name_or_path", vae)[0] == 2
    assert not (tmp_path / "proof").exists()


@pytest.mark.faults
@pytest.mark.parametrize(("name", "alone"), [(PICKLE, False), ("vae.pt", False), ("model.ckpt", True)])
@pytest.mark.parametrize("hostile", [False, True], ids=["honest", "hostile"])
def test_the_command_that_converts(hostile: bool, name: str, alone: bool, vae: Path, tmp_path: Path) -> None:
    """Oracle: the command as printed, run by a shell: the same tensors as safetensors, or a failure that runs nothing."""
    before = load_file(vae / WEIGHTS_NAME)
    place = shutil.move(vae, tmp_path / "it's a VAE")
    (place / WEIGHTS_NAME).unlink()
    torch.save({"weight": Mark(tmp_path / "proof")} if hostile else before, place / name)
    given = place / name if alone else place
    with pytest.raises(UserError, match="To convert it") as caught:
        read_config(AutoencoderSource(pretrained_model_name_or_path=str(given)))
    command = str(caught.value).split("To convert it: ")[1].replace("python", shlex.quote(sys.executable), 1)
    ended = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert not (tmp_path / "proof").exists()
    if hostile:
        assert ended.returncode != 0
        return
    assert ended.returncode == 0, ended.stderr
    after = load_file(Path(f"{given.with_suffix('')}-safetensors", WEIGHTS_NAME))
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_a_pickle_in_a_pipeline_is_not_run(tmp_path: Path) -> None:
    """Oracle: as above; the pipeline's network comes as a pickle, of which nothing but a refusal is made."""
    torch.save({"weight": Mark(tmp_path / "proof")}, (tmp_path / "unet").mkdir() or tmp_path / "unet" / PICKLE)
    (tmp_path / "unet/config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    index = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"^pipeline: "):
        load_pipeline(AutoencoderSource(pretrained_model_name_or_path=str(tmp_path)))
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("net", ["alex", "squeeze"])  # the one of vgg is half a gigabyte
@pytest.mark.parametrize(
    "save", [torch.save, lambda mark, path: path.write_bytes(pickle.dumps(mark))], ids=["zip", "raw"]
)
def test_a_pickle_in_place_of_a_trunk_of_lpips_is_not_run(
    save: Callable[[object, Path], object], net: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: as above. torchvision, which loads it, would unpickle anything."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    save(Mark(tmp_path / "proof"), tmp_path / "hub/checkpoints" / LPIPS_TRUNKS[net])
    with pytest.raises(UserError, match=f"cannot load the LPIPS trunk '{net}'"):
        load_perceptual_distance(net)
    assert not (tmp_path / "proof").exists()


def test_code_in_the_folder_of_a_pipeline_is_not_run(tmp_path: Path) -> None:
    """Oracle: the proof that a pipeline's own module would have written on being imported is not there."""
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'proof')!r}, 'w')\nclass Evil: pass\n")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": ["evil", "Evil"]}))
    with pytest.raises(UserError, match=r"^pipeline: "):
        load_pipeline(AutoencoderSource(pretrained_model_name_or_path=str(tmp_path)))
    assert not (tmp_path / "proof").exists()
