"""Which built-in kinds of error the Python interface raises."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny
from helpers.runs import build_tiny_vae
from helpers.small_pipelines import build_pipeline, small_vae
from torch.utils.data import DataLoader, IterableDataset

import srl_utils.errors
from srl_utils.attacks.denoiser import Denoiser, PromptEmbeddings
from srl_utils.attacks.protections import PROTECTIONS, Victim, protect
from srl_utils.command_line import exit_code
from srl_utils.errors import MissingFile, ResourceError, UserError
from srl_utils.files import read_json
from srl_utils.hub.publishing import PushError
from srl_utils.images.loading import _without_worker_traceback
from srl_utils.images.sources import DataSource
from srl_utils.metrics.features import load_clip_similarity, load_image_classifier, load_inception_features
from srl_utils.metrics.losses import load_perceptual_distance
from srl_utils.pipelines import robust_vae, robustify, sanitize, swap_vae
from srl_utils.training.checkpoints import Checkpoints
from srl_utils.vae.codec import load_codec
from srl_utils.vae.loading import AutoencoderSource, load_autoencoder, read_config
from srl_utils.vae.networks import Moments

EVERY_KIND = [
    kind
    for kind in (*vars(srl_utils.errors).values(), PushError)
    if isinstance(kind, type) and issubclass(kind, UserError)
]
EMBEDDINGS = PromptEmbeddings(torch.zeros(1, 4, 8), torch.zeros(1, 4, 8))


def source(place: Path, **settings: Any) -> AutoencoderSource:
    return AutoencoderSource(pretrained_model_name_or_path=str(place), **settings)


def within(folder: Path) -> None:
    with robust_vae(build_pipeline("sd"), folder / "missing"):
        pass


def protected() -> torch.Tensor:
    victim = Victim(
        encode=lambda images: Moments(images, images), decode=lambda latents: latents, scale=lambda latents: latents
    )
    return protect(PROTECTIONS["advdm"], victim, torch.zeros(1, 3, 16, 16), generators=[torch.Generator()])


def damaged(folder: Path) -> Path:
    build_tiny_vae().save_pretrained(folder / "damaged")
    (folder / "damaged" / "diffusion_pytorch_model.safetensors").write_bytes(b"no tensors")
    return folder / "damaged"


def without_weights(folder: Path) -> Path:
    build_tiny_vae().save_config(folder / "empty")
    return folder / "empty"


def unreadable(folder: Path) -> Path:
    (folder / "config.json").write_text("{")
    return folder


def of_a_classifier(folder: Path) -> Path:
    (folder / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    return folder


def pickled(folder: Path) -> Path:
    build_tiny_vae().save_pretrained(folder, safe_serialization=False)
    return folder


def with_shapes_unlike_its_configuration(folder: Path) -> Path:
    build_tiny_vae().save_pretrained(folder)
    small_vae(block_out_channels=(8, 12)).save_config(folder)
    return folder


def written(folder: Path) -> Path:
    (folder / "some.json").write_text("{")
    return folder / "some.json"


CALLS: dict[str, tuple[Callable[[Path], object], type[Exception]]] = {
    "swap: no folder": (lambda folder: swap_vae(build_pipeline("sd"), folder / "missing"), FileNotFoundError),
    "swap: no such subfolder": (lambda folder: swap_vae(build_pipeline("sd"), folder, subfolder="vae"), FileNotFoundError),
    "swap: no Hub id": (lambda folder: swap_vae(build_pipeline("sd"), "nobody/nothing"), FileNotFoundError),
    "swap: a number": (lambda folder: swap_vae(build_pipeline("sd"), 3), TypeError),
    "swap: another network": (lambda folder: swap_vae(build_pipeline("sd"), torch.nn.Identity()), TypeError),
    "swap: another VAE": (lambda folder: swap_vae(build_pipeline("sd"), AutoencoderTiny()), ValueError),
    "swap: no pipeline": (lambda folder: swap_vae(SimpleNamespace(), small_vae()), TypeError),
    "swap: misfit": (lambda folder: swap_vae(build_pipeline("sd"), small_vae(scaling_factor=3.0)), ValueError),
    "swap: another class": (lambda folder: swap_vae(build_pipeline("sd"), of_a_classifier(folder)), ValueError),
    "swap: damaged": (lambda folder: swap_vae(build_pipeline("sd"), damaged(folder)), OSError),
    "swap: a pickle": (lambda folder: swap_vae(build_pipeline("sd"), pickled(folder)), OSError),
    "robustify: no folder": (lambda folder: robustify(build_pipeline("sd"), folder / "missing"), FileNotFoundError),
    "robustify: misfit": (lambda folder: robustify(build_pipeline("sd"), small_vae(act_fn="relu")), ValueError),
    "context: no folder": (within, FileNotFoundError),
    "sanitize: no folder": (lambda folder: sanitize(torch.zeros(3, 8, 8), folder / "missing"), FileNotFoundError),
    "sanitize: a number for a VAE": (lambda folder: sanitize(torch.zeros(3, 8, 8), 3), TypeError),
    "sanitize: the name of a file": (lambda folder: sanitize("picture.png", small_vae()), TypeError),
    "config: no JSON": (lambda folder: read_config(source(unreadable(folder))), OSError),
    "config: none": (lambda folder: read_config(source(folder)), FileNotFoundError),
    "weights: none": (lambda folder: load_autoencoder(source(without_weights(folder))), FileNotFoundError),
    "weights: no variant": (lambda folder: load_autoencoder(source(without_weights(folder), variant="fp16")), FileNotFoundError),
    "weights: misfit": (lambda folder: load_autoencoder(source(with_shapes_unlike_its_configuration(folder))), ValueError),
    "codec: no folder": (
        lambda folder: load_codec("a", source(folder / "missing"), device=torch.device("cpu")), FileNotFoundError
    ),
    "denoiser: a transformer": (lambda folder: Denoiser.from_pipeline(build_pipeline("flux"), EMBEDDINGS), TypeError),
    "denoiser: instructions": (
        lambda folder: Denoiser.from_pipeline(build_pipeline("sd instruct"), EMBEDDINGS), ValueError
    ),
    "protect: no denoiser": (lambda folder: protected(), ValueError),
    "LPIPS: none": (lambda folder: load_perceptual_distance("vgg"), FileNotFoundError),
    "Inception: none": (lambda folder: load_inception_features(folder / "missing.pth"), FileNotFoundError),
    "Inception: damaged": (lambda folder: load_inception_features(written(folder)), OSError),
    "classifier: none": (lambda folder: load_image_classifier(str(folder / "missing")), FileNotFoundError),
    "CLIP: none": (lambda folder: load_clip_similarity(str(folder)), FileNotFoundError),
    "data: no folder": (lambda folder: DataSource(train_data_dir=str(folder / "missing")).check(), FileNotFoundError),
    "data: conflict": (lambda folder: DataSource().check(), ValueError),
    "checkpoint: none": (lambda folder: Checkpoints(folder).resolve("checkpoint-3"), FileNotFoundError),
    "JSON: damaged": (lambda folder: read_json(written(folder)), OSError),
}  # fmt: skip


@pytest.mark.parametrize("case", CALLS)
def test_the_interface_raises_built_in_kinds(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: specification, the kind that Python and its libraries raise in such a case; each is a UserError of one
    line, and nothing is a FileNotFoundError that is there."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    call, kind = CALLS[case]
    with pytest.raises(kind) as caught:
        call(tmp_path)
    assert isinstance(caught.value, UserError) and "\n" not in str(caught.value)
    if kind in (OSError, ValueError):
        assert not isinstance(caught.value, FileNotFoundError)


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_every_kind_keeps_its_line(kind: type[UserError]) -> None:
    """Oracle: the line given. Python's own OSError and ImportError print their arguments in ways of their own."""
    error = kind("no such thing: give another")
    for each in (error, pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(each) is kind and str(each) == "no such thing: give another" and isinstance(each, ValueError)


class Failing(IterableDataset):
    def __init__(self, kind: type[Exception]) -> None:
        self.kind = kind

    def __iter__(self) -> Any:
        raise self.kind("no such thing: give another")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", [UserError, MissingFile, ResourceError])
def test_a_worker_sends_the_kind_and_the_line(kind: type[UserError], workers: int) -> None:
    """Oracle: the error raised in the worker, for which a lost worker must not be taken though it is an OSError."""
    with pytest.raises(kind) as caught:
        list(_without_worker_traceback(DataLoader(Failing(kind), num_workers=workers)))
    assert type(caught.value) is kind and str(caught.value) == "no such thing: give another"


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_exit_codes(kind: type[UserError], capsys: pytest.CaptureFixture) -> None:
    """Oracle: the documented codes, 2 for what the user can put right and 5 for what the machine lacks."""

    def fail() -> int:
        raise kind("no such thing")

    assert exit_code(fail) == (5 if kind is ResourceError else 2)
    assert capsys.readouterr().err == "error: no such thing\n"


def test_a_command_names_the_flag_of_a_parameter(capsys):
    """Oracle: specification, the flag in place of the parameter's name."""

    def command() -> int:
        raise UserError("no such split; name one, or leave out `streaming`", parameter="train_split")

    assert exit_code(command) == 2
    assert capsys.readouterr().err == "error: --train_split: no such split; name one, or leave out --streaming\n"


def test_a_caller_with_other_names_renames_parameters():
    """Oracle: specification; in the message and in front of it, other words stay."""
    error = UserError(
        "data_dir is `validation_data_dir`, with `seed`; run `hf auth login`", parameter="validation_data_dir"
    )
    error.rename({"validation_data_dir": "data_dir"})
    assert str(error) == "data_dir: data_dir is `data_dir`, with `seed`; run `hf auth login`"


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_errors_about_a_parameter_travel_between_processes(kind):
    """Oracle: invariance under pickling."""
    error = pickle.loads(pickle.dumps(kind("must be positive, got -1", parameter="epsilon")))
    assert (str(error), error.parameter) == ("epsilon: must be positive, got -1", "epsilon")
