"""Decide which flags of the training have an effect, given the others."""

from __future__ import annotations

import argparse
from os.path import exists  # which, unlike pathlib's, says False of a name too long for a file

from srl_utils.command_line import Effects
from srl_utils.images.sources import PHOTOGRAPHS
from srl_utils.training.cli.planning import attacks, may_attack, perceptual_trunk
from srl_utils.training.objectives import OBJECTIVES

ATTACKING = "an --objective other than equivariance"


def training_effects(args: argparse.Namespace) -> Effects:
    """Return what each flag needs to have an effect, and its values that ask for what happens anyway."""
    tracked = args.report_to != "none"
    data_set = args.dataset_name not in (None, PHOTOGRAPHS)
    hub_model = not exists(args.pretrained_model_name_or_path)
    objective = OBJECTIVES[args.objective]
    latents = objective.latent_weight(args.latent_weight) > 0 or objective.latent_share(args.latent_attack_share) > 0
    attack = attacks(args), f"an attack: --pgd_steps and --epsilon above 0, {ATTACKING} and no --gaussian_noise"
    decoding = objective.decodes is not None, "an --objective other than feature, which decodes nothing"
    return {
        "revision": (hub_model, "a model of the Hub", "main"),
        "cache_dir": (hub_model or data_set or args.train_data_dir is not None, "a model or a dataset of the Hub"),
        "dataset_config_name": (data_set, "--dataset_name of a dataset with configurations", "default"),
        "train_split": (data_set, "--dataset_name of a dataset with splits"),
        "image_column": (data_set or args.train_data_dir is not None, "a dataset with columns"),
        "streaming": (data_set or args.train_data_dir is not None, "a dataset that can be streamed"),
        "dataloader_num_workers": (
            not (args.streaming and args.dataloader_num_workers > 1), "a dataset that is not streamed, beyond 1"
        ),
        "pgd_steps": (may_attack(args), f"an attack: --epsilon above 0, {ATTACKING} and no --gaussian_noise", 0),
        "gaussian_noise": (objective.victim is not None, ATTACKING),
        "pgd_step_size": attack,
        "no_pgd_random_start": attack,
        "lpips_weight": (*decoding, 0.0),
        "lpips_net": (perceptual_trunk(args) is not None, f"a --lpips_weight above 0, and {decoding[1]}"),
        "sample_posterior": decoding,
        "latent_weight": (
            objective.fixed_latent_weight is None,
            "--objective srl, purify or trades: it is 1 with feature and 0 with equivariance",
        ),
        "originality_units": (
            args.originality_weight > 0 or latents, "an --originality_weight or --latent_weight above 0"
        ),
        "latent_attack_share": (
            attacks(args) and not objective.attacks_latents, "--objective srl or purify with an attack"
        ),
        "torch_compile": (
            objective.decodes != "transformed", "an --objective other than equivariance, whose images have many sizes",
            False,
        ),
        "lr_warmup_steps": (args.lr_scheduler != "constant", "a schedule with warm-up, such as constant_with_warmup", 0),
        "lr_num_cycles": (args.lr_scheduler == "cosine_with_restarts", "--lr_scheduler cosine_with_restarts"),
        "lr_power": (args.lr_scheduler == "polynomial", "--lr_scheduler polynomial"),
        "logging_dir": (args.report_to in ("tensorboard", "all"), "--report_to tensorboard"),
        "tracker_project_name": (tracked, "a tracker, --report_to"),
        **{flag: (args.push_to_hub, "--push_to_hub") for flag in vars(args) if flag.startswith("hub_")},
    }  # fmt: skip
