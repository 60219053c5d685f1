"""Read and write VAEs as one file, in the layout of the original latent-diffusion code (Rombach et al., arXiv 2112.10752).

ComfyUI, A1111 and Forge read this layout. Its names differ from those of diffusers, its attention is made of 1x1
convolutions, and it holds no configuration. `save_single_file` therefore adds the configuration to the metadata of the
file, which other programs ignore.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ModelMixin
from safetensors import SafetensorError, safe_open
from torch import Tensor

from srl_utils.errors import UnusableFile, UserError
from srl_utils.files import checksum, save_tensors
from srl_utils.vae.files import check_keys, first_line
from srl_utils.vae.low_rank import merged_state

SUFFIX = ".safetensors"
CONFIG_KEY = "diffusers_config"
"""Where the metadata hold the configuration, as JSON."""
PREFIXES = ("", "first_stage_model.", "vae.")
"""What the names begin with: in a file of the VAE alone, in a whole checkpoint, in a whole checkpoint of ComfyUI."""
READABLE = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ"})
"""The types, as safetensors call them, of which torch makes float32; integers mean nothing without their scale."""
TRAINING = re.compile(r"loss\.|model_ema\.")
"""Tensors of the VAE's own training, which some public files hold."""
RENAMES = (
    (r"\bmid_block\.resnets\.0\.", "mid.block_1."),
    (r"\bmid_block\.resnets\.1\.", "mid.block_2."),
    (r"\bmid_block\.attentions\.0\.", "mid.attn_1."),
    (r"\bdown_blocks\.", "down."),
    (r"\bresnets\.", "block."),
    (r"\b(down|up)samplers\.0\.", r"\1sample."),
    (r"\bconv_norm_out\.", "norm_out."),
    (r"\bconv_shortcut\.", "nin_shortcut."),
    (r"\bgroup_norm\.", "norm."),
    (r"\bto_([qkv])\.", r"\1."),
    (r"\bto_out\.0\.", "proj_out."),
)
"""Patterns of diffusers' names and what the original code has in their place, all but the numbers of the decoder's levels."""
LEVEL = re.compile(r"\bup_blocks\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class Model:
    """What the weights of a VAE do not tell of its configuration: the diffusion model that it belongs to.

    Attributes:
        title: its name, for readers.
        latent_channels: of its latents.
        scaling_factor: of its latents.
        shift_factor: of its latents; None if they are not shifted.
        sample_size: side of its images, in pixels.
        companions: what names of its other networks begin with, in a whole checkpoint.
        digests: SHA-256 of public files that hold its VAE alone.
    """

    title: str
    latent_channels: int
    scaling_factor: float
    shift_factor: float | None = None
    sample_size: int
    companions: str
    digests: frozenset[str] = frozenset()

    def has(self, config: Mapping[str, Any]) -> bool:
        """Return whether a configuration has the structure and the latents of this model's VAE."""
        quantized = self.latent_channels == MODELS["sd"].latent_channels
        return (
            tuple(config["block_out_channels"]) == (128, 256, 512, 512)
            and (config["layers_per_block"], config["norm_num_groups"], config["act_fn"]) == (2, 32, "silu")
            and config["use_quant_conv"] == config["use_post_quant_conv"] == quantized
            and config["mid_block_add_attention"]
            and (config["latent_channels"], config["scaling_factor"], config["shift_factor"])
            == (self.latent_channels, self.scaling_factor, self.shift_factor)
        )


MODELS = {
    "sd": Model(
        title="Stable Diffusion 1 and 2",
        latent_channels=4, scaling_factor=0.18215, sample_size=512, companions="cond_stage_model.",
        digests=frozenset({  # vae-ft-mse-840000-ema-pruned.safetensors
            "735e4c3a447a3255760d7f86845f09f937809baa529c17370d83e4c3758f3c75",
        }),
    ),
    "sdxl": Model(
        title="Stable Diffusion XL",
        latent_channels=4, scaling_factor=0.13025, sample_size=1024, companions="conditioner.embedders.",
        digests=frozenset({  # sdxl_vae.safetensors of stabilityai/sdxl-vae, and of madebyollin/sdxl-vae-fp16-fix
            "63aeecb90ff7bc1c115395962d3e803571385b61938377bc7089b36e81e92e2e",
            "235745af8d86bf4a4c1b5b4f529868b37019a10f7c0b2e79ad0abca3a22bc6e1",
        }),
    ),
    "sd3": Model(
        title="Stable Diffusion 3",
        latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609, sample_size=1024,
        companions="model.diffusion_model.joint_blocks.",
    ),
    "flux": Model(
        title="Flux.1",
        latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, sample_size=1024,
        companions="model.diffusion_model.double_blocks.",
        digests=frozenset({  # ae.safetensors
            "afc8e28272cd15db3919bacdb6918ce9c1ed22e96cb12c4d5ed0fba823529e38",
        }),
    ),
}  # fmt: skip
"""The models whose VAEs other programs read. The factors are those of their configurations in diffusers."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """Another program that reads single files.

    Attributes:
        name: of the program.
        models: names in `MODELS` of those whose VAEs it reads.
        folder: where it looks for VAEs.
        choice: where its user chooses one, in Markdown.
    """

    name: str
    models: tuple[str, ...]
    folder: str
    choice: str


PROGRAMS = (
    Program(name="ComfyUI", models=("sd", "sdxl", "sd3", "flux"), folder="models/vae", choice="the node *Load VAE*"),
    Program(  # of version 1.10; none before has Flux either
        name="A1111", models=("sd", "sdxl", "sd3"), folder="models/VAE", choice="*Settings*, *VAE*, *SD VAE*",
    ),
    Program(
        name="Forge", models=("sd", "sdxl", "sd3", "flux"), folder="models/VAE",
        choice="*VAE / Text Encoder*, at the top of the page",
    ),
)  # fmt: skip
"""The model card has them as a table, and so has docs/publishing.md."""


def original_name(name: str, levels: int) -> str:
    """Return the original code's name of a tensor that diffusers calls `name`, in a VAE of so many levels."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return LEVEL.sub(lambda match: f"up.{levels - 1 - int(match[1])}.", name)  # diffusers counts from the latents


def check_single_file(vae: ModelMixin) -> None:
    """Raise a UserError unless the original layout has a place for every weight of `vae`."""
    if not isinstance(vae, AutoencoderKL):
        raise UserError(f"a single file holds an AutoencoderKL, and this VAE is of the class {type(vae).__name__}")
    blocks = {*vae.config["down_block_types"], *vae.config["up_block_types"]} - {
        "DownEncoderBlock2D",
        "UpDecoderBlock2D",
    }
    if blocks:
        raise UserError(f"a single file holds no {min(blocks)}, of which this VAE is made")


def model_of(config: Mapping[str, Any]) -> str | None:
    """Return the name in `MODELS` of the model whose VAE has this configuration; None if it is another VAE."""
    return next((name for name, model in MODELS.items() if model.has(config)), None)


def programs_for(model: str | None) -> list[Program]:
    """Return the programs that read the VAE of a model, which `model_of` names."""
    return [program for program in PROGRAMS if model in program.models]


def refusal(model: str | None) -> str | None:
    """Return which programs cannot use the VAE of a model, and why; None if all can."""
    names = [program.name for program in PROGRAMS if model not in program.models]
    if not names:
        return None
    listed = " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
    reason = "its shape or its scaling is none that they know" if model is None else f"it is for {MODELS[model].title}"
    return f"{listed} cannot use this VAE: {reason}"


def save_single_file(vae: ModelMixin, path: Path, *, prefix: str = "") -> None:
    """Write a VAE as one file, in the precision of its weights, with its configuration in the metadata.

    Args:
        vae: an AutoencoderKL, with or without low-rank updates.
        path: the file.
        prefix: one of `PREFIXES`.

    Raises:
        UserError: as `check_single_file`.
    """
    check_single_file(vae)
    levels = len(vae.config["block_out_channels"])
    weights = {
        prefix + original_name(name, levels): _as_convolution(tensor).contiguous()
        for name, tensor in merged_state(vae).items()
    }
    stated = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    config = json.dumps({"_class_name": AutoencoderKL.__name__, **stated})
    save_tensors(weights, path, metadata={"format": "pt", CONFIG_KEY: config})


def _as_convolution(tensor: Tensor) -> Tensor:
    """Return the matrix `[O,I]` of an attention layer as the weight `[O,I,1,1]` of a convolution; all else as it is."""
    return tensor[..., None, None] if tensor.ndim == 2 else tensor


@dataclass(frozen=True)
class SingleFile:
    """What a file says of the VAE in it, without its weights.

    Attributes:
        path: the file.
        prefix: what the names of the VAE's tensors begin with.
        shapes: the shape of each tensor of the VAE, by its original name without the prefix.
        others: names of all other tensors in the file.
        recorded: the configuration in the metadata; None if there is none.
    """

    path: Path
    prefix: str
    shapes: Mapping[str, tuple[int, ...]]
    others: frozenset[str]
    recorded: Mapping[str, Any] | None

    @classmethod
    def read(cls, path: Path) -> SingleFile:
        """Read the names, shapes and types of a file.

        Raises:
            UnusableFile: an OSError, if it is damaged or no safetensors.
            UserError: a ValueError and the base of both, if it holds no VAE in the original layout, or one of integers.
        """
        try:
            with safe_open(path, "pt") as file:
                names, metadata = set(file.keys()), file.metadata() or {}
                prefix = _prefix(names, path)
                own = {name for name in names if name.startswith(prefix)}
                own -= {name for name in own if TRAINING.match(name.removeprefix(prefix))}
                slices = {name.removeprefix(prefix): file.get_slice(name) for name in own}
                shapes = {name: tuple(described.get_shape()) for name, described in slices.items()}
                _check_types({name: described.get_dtype() for name, described in slices.items()}, path)
        except (SafetensorError, OSError) as error:
            raise UnusableFile(f"cannot load the VAE '{path}': {first_line(error)}") from None
        return cls(path, prefix, shapes, frozenset(names - own), _recorded(metadata, path))

    def config(self) -> dict[str, Any]:
        """Return the configuration: that in the metadata, or else the one of the model that is recognised.

        Raises:
            UserError: if there is none and the model is not recognised. Its message says what to do.
        """
        if self.recorded is not None:
            return dict(self.recorded)
        model = self._model()
        if model is None:
            folder = f"{self.path.with_suffix('')}-vae"  # a name that no file of weights has, even of x.pt.safetensors
            raise UserError(
                f"'{self.path}' does not say which model its VAE is of, and several have VAEs of this shape. Name it: "
                f"python -m srl_utils.hub convert {shlex.quote(str(self.path))} {shlex.quote(folder)} "
                f"--config MODEL, where MODEL is {', '.join(MODELS)} or a folder with its config.json; then give that folder"
            )
        return self.config_of(model)

    def _model(self) -> Model | None:
        """Return the model that the file's other networks, or its digest, tell; None for an unknown or another shape."""
        if "edm_mean" in self.others:  # Playground 2.5: the shape of SDXL and other latents
            return None
        for model in MODELS.values():
            if any(name.startswith(model.companions) for name in self.others) and model.has(self.config_of(model)):
                return model
        digest = None if self.others else checksum(self.path)
        return next((model for model in MODELS.values() if digest in model.digests), None)

    def config_of(self, model: Model) -> dict[str, Any]:
        """Return the configuration of this VAE as one of `model`: its shape comes from the weights.

        The original code has 32 groups in every norm.

        Raises:
            UserError: if the weights lack a part, or have other latents than the model.
        """
        levels = len({match[1] for name in self.shapes if (match := re.match(r"encoder\.down\.(\d+)\.", name))})
        blocks = {name.split(".")[4] for name in self.shapes if name.startswith("encoder.down.0.block.")}
        channels = self._side("decoder.conv_in.weight", 1)
        if channels != model.latent_channels:
            raise UserError(
                f"the VAE in '{self.path}' has {channels} latent channels, and that of the model has {model.latent_channels}"
            )
        return {
            "_class_name": AutoencoderKL.__name__,
            "in_channels": self._side("encoder.conv_in.weight", 1),
            "out_channels": self._side("decoder.conv_out.weight", 0),
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "block_out_channels": [
                self._side(f"encoder.down.{level}.block.0.conv1.weight", 0) for level in range(levels)
            ],
            "layers_per_block": len(blocks),
            "act_fn": "silu",
            "latent_channels": channels,
            "norm_num_groups": 32,
            "sample_size": model.sample_size,
            "scaling_factor": model.scaling_factor,
            "shift_factor": model.shift_factor,
            "force_upcast": True,
            "use_quant_conv": "quant_conv.weight" in self.shapes,
            "use_post_quant_conv": "post_quant_conv.weight" in self.shapes,
            "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in self.shapes,
        }

    def _side(self, name: str, axis: int) -> int:
        """Return the length of a tensor along an axis."""
        if len(self.shapes.get(name, ())) <= axis:
            raise UserError(f"'{self.path}' holds no VAE of the original layout: its {name} is missing")
        return self.shapes[name][axis]

    def load(self, config: Mapping[str, Any]) -> AutoencoderKL:
        """Load the VAE with this configuration in float32, whatever the precision of the file.

        No arithmetic exists for float8, not even a search for infinite values.

        Raises:
            UserError: if the weights do not fit the configuration, or if it is of another class.
        """
        if config["_class_name"] != AutoencoderKL.__name__:
            raise UserError(
                f"'{self.path}' holds an AutoencoderKL, and the configuration is of a {config['_class_name']}"
            )
        with torch.device("meta"):
            vae = AutoencoderKL.from_config(dict(config))
        wanted = vae.state_dict()
        names = {original_name(name, len(config["block_out_channels"])): name for name in wanted}
        check_keys(str(self.path), missing=names.keys() - self.shapes, unexpected=self.shapes.keys() - names.keys())
        for original, name in names.items():
            if not _fits(self.shapes[original], tuple(wanted[name].shape)):
                raise UserError(
                    f"cannot load the VAE '{self.path}': {original} expected shape {tuple(wanted[name].shape)}, "
                    f"got {self.shapes[original]}"
                )
        with safe_open(self.path, "pt") as file:
            weights = {
                name: file.get_tensor(self.prefix + original).reshape(wanted[name].shape).float()
                for original, name in names.items()
            }
        vae.load_state_dict(weights, assign=True)
        vae.register_to_config(_name_or_path=str(self.path))
        return vae.eval()


def _prefix(names: set[str], path: Path) -> str:
    """Return what the names of the VAE begin with.

    Raises:
        UserError: if there is no VAE, or one in the layout of diffusers.
    """
    prefix = next((prefix for prefix in PREFIXES if f"{prefix}encoder.conv_in.weight" in names), None)
    if prefix is not None and any(name.startswith(f"{prefix}encoder.down_blocks.") for name in names):
        raise UserError(f"'{path}' has the layout of diffusers: give its folder, with the config.json")
    if prefix is None:
        raise UserError(
            f"'{path}' holds no AutoencoderKL in the original layout: there is no encoder.conv_in.weight, alone or after "
            + " or ".join(filter(None, PREFIXES))
        )
    return prefix


def _check_types(types: Mapping[str, str], path: Path) -> None:
    """Raise a UserError unless all tensors of the VAE are of a type in `READABLE`."""
    for name, kind in sorted(types.items()):
        if kind not in READABLE:
            raise UserError(
                f"cannot load the VAE '{path}': its {name} is of the type {kind}, which holds no plain weights; give a "
                "file in float8, or in 16 or more bits of floating point"
            )


def _recorded(metadata: Mapping[str, str], path: Path) -> Mapping[str, Any] | None:
    """Return the configuration that `save_single_file` has added to the metadata; None if there is none."""
    if CONFIG_KEY not in metadata:
        return None
    try:
        config = json.loads(metadata[CONFIG_KEY])
    except (ValueError, RecursionError) as error:
        raise UnusableFile(f"the {CONFIG_KEY} in '{path}' is damaged: {first_line(error)}") from None
    if not isinstance(config, dict) or config.get("_class_name") != AutoencoderKL.__name__:
        raise UnusableFile(f"the {CONFIG_KEY} in '{path}' is damaged: it describes no AutoencoderKL")
    return config


def _fits(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Return whether a tensor has the wanted shape, as it is or as a convolution of one pixel."""
    return shape == wanted or (len(wanted) == 2 and shape in {(*wanted, 1), (*wanted, 1, 1)})
