"""Checks before hours of computing: flags against the machine, chains against the model."""

import sys
from dataclasses import replace
from itertools import compress

import torch

from reweighting.config.training import TrainingConfig
from reweighting.data.chains import candidate_chains
from reweighting.data.row_files import short_repr
from reweighting.devices import check_attention
from reweighting.distributed import collectives
from reweighting.errors import LISTED_PLACES, UserError
from reweighting.modeling.chain_checks import check_chains
from reweighting.modeling.reward_model import ProcessRewardModel
from reweighting.modeling.saved_model import flags_of_saved
from reweighting.terminal import printable
from reweighting.training.build import load_backbone, meta_batch_size, micro_batches_per_step, windows_per_meta_pass
from reweighting.training.hypergradient_choice import check_method
from reweighting.training.run_data import RunData


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


def check_data(config: TrainingConfig, data: RunData) -> RunData:
    """Check, without reading the model's weights, that it can read every chain.

    Args:
        config: the settings.
        data: what the run reads.

    Returns:
        The same; under --drop_too_long without the chains that are too long, and without the validation questions of
        which a candidate is.

    Raises:
        UserError: naming the rows; or if nothing is left of a domain, of a kind of meta answers or of the validation.
    """
    model = load_backbone(config, torch.device("meta"), "fp32")
    inherited = flags_of_saved(config.model.reward_model, config.model.train).get("freeze_vision", True)
    if not model.chain_tokenizer.family.reads_images and inherited and not config.model.freeze_vision:
        raise UserError(
            f"--no_freeze_vision does nothing with {model.base.config.model_type} models: they read text only"
        )
    chains = [*data.train, *data.meta]
    questions: list[int] = []  # of each validation chain behind these: its place in data.validation
    for place, row in enumerate(data.validation):
        candidates = candidate_chains(row, " ".join(config.data.validation_json_file or ()))
        chains += candidates
        questions += [place] * len(candidates)
    purpose = "train without the chains that are too long"
    too_long = check_chains(model.chain_tokenizer, chains, config.data.drop_too_long, purpose)
    return _without(config, data, set(too_long), questions, model) if too_long else data


def _without(
    config: TrainingConfig, data: RunData, too_long: set[int], questions: list[int], model: ProcessRewardModel
) -> RunData:
    """The data without chains that are too long, which are counted in a line. Raises UserError if too little is left.

    too_long: positions in the list of training, meta and validation chains. questions: of each of the last.
    """
    first_meta = len(data.train)
    first_candidate = first_meta + len(data.meta)
    train = [chain for place, chain in enumerate(data.train) if place not in too_long]
    meta = [chain for place, chain in enumerate(data.meta, first_meta) if place not in too_long]
    dropped = {question for place, question in enumerate(questions, first_candidate) if place in too_long}
    keeps = [place not in dropped for place in range(len(data.validation))]
    for kept, whole, what, names in (
        (len(train), len(data.train), "chains", config.data.train_json_file or ["mixture"]),
        (len(meta), len(data.meta), "chains", config.data.meta_json_file),
        (sum(keeps), len(keeps), "questions", config.data.validation_json_file),
    ):
        if kept < whole:
            files = printable(" ".join(names or ()))
            print(f"--drop_too_long: {files}: {whole - kept} of {whole} {what} are left out, which are "
                  f"longer than {model.chain_tokenizer.max_length} tokens")  # fmt: skip
    remedy = "Shorten their texts, raise --max_length or lower --max_image_side"
    if lost := sorted({chain.domain for chain in data.train} - {chain.domain for chain in train}):
        names = ", ".join(short_repr(data.domains[domain]) for domain in lost[:LISTED_PLACES])
        raise UserError(f"--drop_too_long leaves no chain of {len(lost)} domains ({names}). {remedy}")
    if {chain.label for chain in meta} != {chain.label for chain in data.meta}:
        raise UserError(f"--drop_too_long leaves only one kind of meta answers, correct or incorrect ones. {remedy}")
    if data.validation and not any(keeps):
        raise UserError(f"--drop_too_long leaves no validation question. {remedy}")
    validation, correct = list(compress(data.validation, keeps)), list(compress(data.correct, keeps))
    return replace(data, train=train, meta=meta, validation=validation, correct=correct)


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
    if (
        config.learns_weights
        and config.upper.meta_optimizer == "calm"
        and windows_per_meta_pass(config.upper, data) <= 1
    ):
        print(
            f"warning: --meta_batch_size {meta_batch_size(config.upper, data)} reads every different meta answer for "
            "each update, so --meta_optimizer calm leaves every weight at 1: use a seventh of their number, or more "
            "meta answers",
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
