"""Checks before hours of computing: flags against the machine, chains against the model."""

import sys

import torch

from reweighting.config.training import TrainingConfig
from reweighting.data.chains import Chain
from reweighting.devices import check_attention
from reweighting.distributed import collectives
from reweighting.errors import UserError
from reweighting.modeling.reward_model import ProcessRewardModel
from reweighting.training.build import micro_batches_per_step
from reweighting.training.hypergradient_choice import check_method
from reweighting.training.run_data import RunData
from reweighting.training.validation import Validation


def check_possible(config: TrainingConfig, device: torch.device, precision: str) -> None:
    """Check the flags against the device and the number of processes, before a weight is read.

    Args:
        config: the settings.
        device: where this process computes.
        precision: "fp32" or "bf16".

    Raises:
        UserError: for a flag that cannot be honoured; the message names it and the remedy.
    """
    check_attention(config.model.attention, device, precision)
    if config.learns_weights:
        check_method(config, config.upper.hypergradient)
    if config.run.shard:
        _check_shard(config)


def _check_shard(config: TrainingConfig) -> None:
    if collectives.world_size() == 1:
        raise UserError("--shard does nothing in one process: start several with torchrun")
    if config.model.load_in_4bit:
        raise UserError("--shard cannot split 4-bit weights: leave out --load_in_4bit, or --shard")
    trains_projector_alone = config.model.train != "full" and config.model.freeze_projector is False
    if trains_projector_alone and not config.model.gradient_checkpointing:
        raise UserError(
            "--shard with a trained projector beside a frozen language model needs --gradient_checkpointing: without "
            "it, processes with and without images would wait for each other"
        )


def check_chains(model: ProcessRewardModel, data: RunData, validation: Validation | None) -> None:
    """Check that the model can read every chain: none is too long, no image has an impossible shape.

    Raises:
        UserError: naming the rows.
    """
    chains: list[Chain] = [*data.train, *data.meta]
    model.check(chains + validation.chains() if validation else chains)


def print_summary(
    config: TrainingConfig, data: RunData, model: ProcessRewardModel, device: torch.device, precision: str
) -> None:
    """Print what is trained on what, in one line, and warn of steps that teach nothing."""
    accumulation = micro_batches_per_step(config, len(data.domains))
    if config.learns_weights and config.lower.max_grad_norm and accumulation == 1:
        print(
            "warning: a clipped step of a single micro-batch teaches nothing about its domain's weight: use "
            "--gradiant_accumulation 2 or more with --max_grad_norm",
            file=sys.stderr,
        )
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    processes = collectives.world_size()
    print(
        f"{data.rows} rows in {len(data.train)} chains from {len(data.domains)} domains, {len(data.meta)} meta chains; "
        f"{trainable:,} trainable parameters on {device} ({precision}); "
        f"{accumulation} x {config.lower.batch_size} chains a step"
        + (f", shared by {processes} processes" if processes > 1 else "")
    )
