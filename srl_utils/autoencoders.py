"""An `AutoencoderKL` as the method sees it: a trainable encoder, a frozen decoder, a frozen reference."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from diffusers import AutoencoderKL, ModelMixin
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import save_file
from torch import Tensor, nn

from srl_utils.autoencoder_files import check_parameters, completed_config, first_line, refuse_pickles
from srl_utils.errors import MissingFile, UnusableFile, UserError
from srl_utils.precision import full_precision

VAE = TypeVar("VAE", bound=ModelMixin)
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True, kw_only=True)
class AutoencoderSource:
    """Where a VAE comes from; the arguments of `AutoencoderKL.from_pretrained`."""

    pretrained_model_name_or_path: str
    subfolder: str | None = None
    revision: str | None = None
    variant: str | None = None
    cache_dir: str | None = None


def read_config(
    source: AutoencoderSource, kinds: Sequence[type[ModelMixin]] = (AutoencoderKL,)
) -> dict[str, Any]:
    """The VAE's configuration with diffusers' defaults for what it leaves out, without loading its weights.

    Raises:
        MissingFile: a FileNotFoundError, if there is none.
        UnusableFile: an OSError, if there is no reading it, or if the weights are pickles or a single file.
        UserError: a ValueError and the base of both, if it is of none of the `kinds`, if it cannot be, or if it does
            not take RGB images.
    """
    arguments = asdict(source)
    arguments.pop("variant")
    name = source.pretrained_model_name_or_path
    refuse_pickles(name, source.subfolder, kinds[0])
    try:
        config = AutoencoderKL.load_config(**arguments)
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error).strip().splitlines()[0]
        hint = "" if source.subfolder else " (for the VAE of a whole pipeline add --subfolder vae)"
        kind = UnusableFile if Path(name, source.subfolder or "", CONFIG_NAME).exists() else MissingFile
        if not Path(name).exists():
            hint += "; there is no such folder here, and no such model was read from the Hub"
        raise kind(f"no VAE configuration at '{name}': {reason}{hint}") from None
    said = config.get("_class_name", "configuration of no known class") if isinstance(config, dict) else "list"
    kind = next((known for known in kinds if known.__name__ == said), None)
    if kind is None:
        raise UserError(f"'{name}' is a {said}, not an {' or '.join(known.__name__ for known in kinds)}")
    config = completed_config(config, kind, name)
    for channels in (config["in_channels"], config["out_channels"]):
        if channels != 3:
            raise UserError(f"'{name}' takes or makes images of {channels} channels; only RGB is supported")
    return config


def load_autoencoder(source: AutoencoderSource, kind: type[VAE] = AutoencoderKL) -> VAE:
    """The VAE in float32, whatever the precision of the stored weights.

    Raises:
        MissingFile: a FileNotFoundError, if there are no weights as safetensors.
        UnusableFile: an OSError, if their file is damaged.
        UserError: a ValueError and the base of both, if they do not fit the configuration or are not all finite.
    """
    name = source.pretrained_model_name_or_path
    try:
        vae, loading = kind.from_pretrained(
            **asdict(source), use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise _loading_error(error, source)(f"cannot load the VAE '{name}': {first_line(error)}") from None
    for keys, fault in (("missing_keys", "lack"), ("unexpected_keys", "hold beyond what its configuration describes")):
        if found := sorted(loading[keys]):
            raise UserError(f"cannot load the VAE '{name}': its weights {fault} {len(found)} tensors, such as {found[0]}")
    check_parameters(vae, name)
    return vae.float()


def _loading_error(error: Exception, source: AutoencoderSource) -> type[UserError]:
    """The kind of what diffusers raises: an OSError for weights that are missing and for those that are damaged."""
    if not isinstance(error, OSError):
        return UserError
    place = Path(source.pretrained_model_name_or_path, source.subfolder or "")
    return UnusableFile if (place / variant_name(source.variant)).exists() else MissingFile


HALF_PRECISION = {"fp16": torch.float16, "bf16": torch.bfloat16}


def save_variant(vae: AutoencoderKL, folder: Path, variant: str) -> None:
    """Writes the weights at half precision beside the full ones, where `from_pretrained(variant=...)` finds them."""
    weights = {name: tensor.to(HALF_PRECISION[variant]).contiguous() for name, tensor in vae.state_dict().items()}
    save_file(weights, folder / variant_name(variant), metadata={"format": "pt"})


def variant_name(variant: str | None) -> str:
    """Return the file name of the weights of `variant`, None for the full ones."""
    return WEIGHTS_NAME if variant is None else WEIGHTS_NAME.replace(".", f".{variant}.", 1)


def is_weights_file(name: str, variants: str = r"[\w-]+") -> bool:
    """Return whether diffusers looks for weights under this file name: whole or in shards, safetensors or a pickle.

    `variants` is a pattern of the variants that count beside the full weights; by default all of them do.
    """
    variant, shard = rf"(\.({variants}))?", r"(-\d+-of-\d+)?"
    stem = WEIGHTS_NAME.partition(".")[0]
    kind = r"\.(safetensors|bin)"
    return bool(re.fullmatch(rf"{stem}{shard}{variant}{shard}{kind}({variant}\.index{variant}\.json)?", name))


def inference_dtype(config: dict[str, Any], variant: str) -> torch.dtype | None:
    """What diffusers computes in with weights of this variant; None for float32, which `force_upcast` asks for."""
    return None if variant == "fp16" and config["force_upcast"] else HALF_PRECISION[variant]


def save_autoencoder(vae: AutoencoderKL, folder: Path) -> None:
    """Writes config and weights as `from_pretrained` reads them, in the one layout that safetensors takes.

    `save_pretrained` refuses channels-last weights, and converting the VAE itself would move the parameters
    that an optimizer and DistributedDataParallel hold. The config names the VAE that it was loaded from; of a folder of
    this machine it names the last part alone, as the config is published.
    """
    folder.mkdir(parents=True, exist_ok=True)
    origin = vae.config.get("_name_or_path")
    if origin and Path(origin).exists():
        vae.register_to_config(_name_or_path=Path(origin).resolve().name)
    vae.save_config(folder)
    weights = {name: tensor.contiguous() for name, tensor in vae.state_dict().items()}
    save_file(weights, folder / WEIGHTS_NAME, metadata={"format": "pt"})


def downsampling_factor(config: dict[str, Any]) -> int:
    """Image pixels per latent pixel along a side: every level but the last halves the image."""
    return 2 ** (len(config["block_out_channels"]) - 1)


def check_resolution(resolution: int, config: dict[str, Any]) -> None:
    """Raises a UserError unless `resolution` is a positive multiple of the down-sampling factor."""
    factor = downsampling_factor(config)
    if resolution < factor or resolution % factor:
        nearest = max(factor, round(resolution / factor) * factor)
        raise UserError(
            f"--resolution {resolution} does not suit this VAE, which divides sides by {factor}; try {nearest}"
        )


class Moments(NamedTuple):
    """Mean and variance of the posterior N(mean, variance), each `[N,C,h,w]` float32, raw (unscaled)."""

    mean: Tensor
    variance: Tensor

    def latent(self, noise: Tensor | None) -> Tensor:
        """The mean, or the sample that `noise` `[N,C,h,w]` selects."""
        return self.mean if noise is None else self.mean + self.variance.sqrt() * noise


class LatentEncoder(nn.Module):
    """E_theta: `encoder` and `quant_conv` of a VAE, sharing its parameters.

    `forward` maps images `[N,3,H,W]` in [-1,1] to the raw moments `[N,2C,h,w]`, in `full_precision`. It is the module
    that DistributedDataParallel wraps: calling `vae.encode` past the wrapper would leave the gradients of the
    processes apart. The network runs in `autocast_dtype` where one is given.
    """

    def __init__(self, vae: AutoencoderKL, *, autocast_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.encoder = vae.encoder
        self.quant_conv = vae.quant_conv
        self.autocast_dtype = autocast_dtype

    def forward(self, images: Tensor) -> Tensor:
        with autocast(images, self.autocast_dtype):
            moments = self.encoder(images)
            if self.quant_conv is not None:
                moments = self.quant_conv(moments)
        return full_precision(moments)


class LatentDecoder(nn.Module):
    """D_phi: `post_quant_conv` and `decoder` of a VAE, frozen. Gradients pass through to the latents.

    `forward` maps raw latents `[N,C,h,w]` to images `[N,3,H,W]`, in `full_precision`, about [-1,1].
    """

    def __init__(self, vae: AutoencoderKL, *, autocast_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.post_quant_conv = vae.post_quant_conv
        self.decoder = vae.decoder
        self.autocast_dtype = autocast_dtype
        self.requires_grad_(False)

    def forward(self, latents: Tensor) -> Tensor:
        with autocast(latents, self.autocast_dtype):
            if self.post_quant_conv is not None:
                latents = self.post_quant_conv(latents)
            images = self.decoder(latents)
        return full_precision(images)


def split_moments(moments: Tensor) -> Moments:
    """Raw moments `[N,2C,h,w]` as mean and variance, the log-variance clipped as diffusers does."""
    posterior = DiagonalGaussianDistribution(moments)
    return Moments(posterior.mean, posterior.var)


NETWORK = TypeVar("NETWORK", LatentEncoder, LatentDecoder)


def frozen_copy(network: NETWORK, rebuild: Callable[[NETWORK], NETWORK] = lambda network: network) -> NETWORK:
    """The network as it is now, never to change, such as E_theta0.

    What autocast would cast at every call, the weights of convolutions and linear layers, is held in its precision;
    `rebuild` is given the copy before they are cast.
    """
    twin = rebuild(copy.deepcopy(network).requires_grad_(False).eval())
    if twin.autocast_dtype is not None:
        for layer in twin.modules():
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
                layer.to(twin.autocast_dtype)
    return twin


class EncoderMirror:
    """A frozen twin of the encoder that is being trained, for attacks on it.

    Autograd and compiled backward passes then compute no weight gradients, and no weight is cast more than once a
    step. Weights held in the same precision share their memory; `refresh` brings the others up to date.
    """

    def __init__(self, original: LatentEncoder) -> None:
        self.encoder = frozen_copy(original)
        self._copied: list[tuple[nn.Parameter, nn.Parameter]] = []
        for own, trained in zip(self.encoder.parameters(), original.parameters(), strict=True):
            if own.dtype == trained.dtype:
                own.data = trained.data
            else:
                self._copied.append((own, trained))

    @torch.no_grad()
    def refresh(self) -> None:
        """After the original's weights have changed, be it by a step of the optimizer or from a checkpoint."""
        for own, trained in self._copied:
            own.copy_(trained)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No parameter of `module` requires gradient within; what did before does again afterwards.

    During an attack only the image's gradient is wanted. Autograd would skip the parameters' by itself, but
    would keep the activations they need, and a compiled backward pass would compute them all the same.
    """
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def latent_shape(config: dict[str, Any], resolution: int) -> tuple[int, int, int]:
    """Shape (C, h, w) of the latent of a square image."""
    side = resolution // downsampling_factor(config)
    return (config["latent_channels"], side, side)


def autocast(tensor: Tensor, dtype: torch.dtype | None) -> AbstractContextManager:
    return nullcontext() if dtype is None else torch.autocast(tensor.device.type, dtype)
