"""Count the peak memory of a training step from tensor shapes alone, without a GPU, weights or arithmetic.

    python -m benchmarks.memory --model sd --resolution 512 --batch_sizes 1 2 4 8

The count is of the bytes of all tensors that are alive at the same time, in the precisions that autocast gives them on a
GPU, without torch.compile (which needs less). The work space of convolutions and fragmentation come on top.
"""

from __future__ import annotations

import argparse
import copy
import weakref
from collections.abc import Iterable

import lpips
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from benchmarks.train_step import SHAPES
from srl_utils.attacks.draws import image_generators
from srl_utils.attacks.gradient import PGDConfig
from srl_utils.command_line import Parser, exit_code, non_negative_float, positive_int
from srl_utils.evaluation.report.tables import markdown_table
from srl_utils.metrics.losses import PerceptualDistance, ReconstructionLoss
from srl_utils.training.step import Step, build_networks


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all live storages that operations have made: `now` and at the `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        self.add(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Count the storages of `tensors`, each once."""
        for tensor in tensors:
            self._add(tensor.untyped_storage())

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, size)

    def _remove(self, size: int) -> None:
        self.now -= size


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    args = parse_args(arguments)
    table = [["batch size", "plain", "--attack_batch_size 1", "--gradient_checkpointing", "both"]]
    for batch_size in args.batch_sizes:
        cells = [
            f"{step_bytes(args, batch_size, checkpointing=checkpointing, attack_batch_size=size) / 1e9:.1f} GB"
            for checkpointing in (False, True)
            for size in (None, 1)
        ]
        table.append([str(batch_size), *cells])
    print(f"{args.model}, {args.resolution} px, bf16, LPIPS weight {args.lpips_weight:g}\n\n{markdown_table(table)}")
    return 0


def step_bytes(args: argparse.Namespace, batch_size: int, *, checkpointing: bool, attack_batch_size: int | None) -> int:
    """Return the peak bytes of a whole update in bf16, with weights, gradients and AdamW's moments."""
    vae = AutoencoderKL(**SHAPES[args.model])
    if checkpointing:
        vae.enable_gradient_checkpointing()
    loss = ReconstructionLoss(random_perceptual_distance() if args.lpips_weight else None, weight=args.lpips_weight)
    networks = build_networks(vae, loss, autocast_dtype=torch.bfloat16)
    # One attack step needs as much memory as ten.
    step = Step(networks=networks, pgd=PGDConfig(num_steps=1), attack_batch_size=attack_batch_size)
    shapes = FakeTensorMode()
    with FakeCopyMode(shapes):
        step = copy.deepcopy(step)
    networks = step.networks
    normalise_in_float32(networks.encoder, networks.mirror.encoder, networks.reference, networks.decoder)
    with shapes, LiveBytes() as live:
        for module in (networks.vae, networks.mirror.encoder, networks.reference, networks.decoder, networks.loss):
            live.add(module.parameters())
        optimizer = torch.optim.AdamW(networks.encoder.parameters(), fused=True)
        images = torch.rand(batch_size, 3, args.resolution, args.resolution)
        for _ in range(2):  # the first update makes AdamW's moments
            value, _ = step(images, image_generators(0, range(batch_size)))
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
    return live.peak


def random_perceptual_distance() -> PerceptualDistance:
    """Return LPIPS with random weights."""
    return PerceptualDistance(lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False))


def normalise_in_float32(*networks: nn.Module) -> None:
    """Make group normalisation run in float32, as autocast does on a GPU; on the CPU it stays in bf16."""
    for network in networks:
        for layer in network.modules():
            if isinstance(layer, nn.GroupNorm):
                layer.register_forward_pre_hook(lambda layer, inputs: (inputs[0].float(),))


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m benchmarks.memory", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", choices=sorted(SHAPES), default="sd")
    add("--resolution", type=positive_int, default=512)
    add("--batch_sizes", nargs="+", type=positive_int, default=[1, 2, 4, 8])
    add("--lpips_weight", type=non_negative_float, default=1.0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
