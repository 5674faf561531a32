"""Puts a run together: chains -> model -> the two problems -> the engine."""

import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

import torch
from betty.configs import Config
from transformers.utils import logging as transformers_logging

from reweighting.bilevel.domain_weights import DomainWeights
from reweighting.bilevel.problems import DomainReweighting, PRMFineTuning
from reweighting.config.training import learns_weights
from reweighting.devices import check_attention, choose_device
from reweighting.distributed import collectives
from reweighting.distributed.sharding import Replicated, Sharded
from reweighting.errors import UserError
from reweighting.training.batches import BatchSource
from reweighting.training.components import (
    learning_rate,
    make_model,
    make_optimizer,
    micro_batches_of_step,
    read_fixed_weights,
)
from reweighting.training.engine import ReweightingEngine
from reweighting.training.hypergradient_choice import check_method, resolve_hypergradient
from reweighting.training.run_data import RunData
from reweighting.training.validation import Validation


def build(args: Namespace, settings: dict, data: RunData, folder: Path, state: dict | None = None) -> ReweightingEngine:
    """The engine of a run that writes into `folder`, at its start or at a checkpoint's `state`.

    settings: from `run_settings`. Raises UserError for what the user can mend, before a weight is loaded if possible.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.manual_seed(args.seed)
    device, precision = choose_device(args.device), settings["precision"]
    fixed_weights = read_fixed_weights(args, data.domains)
    accumulation = micro_batches_of_step(args, len(data.domains))
    if args.max_grad_norm and accumulation == 1 and fixed_weights is None:
        print("warning: a clipped step of a single micro-batch teaches nothing about its domain's weight: "
              "--max_grad_norm wants --gradiant_accumulation 2 or more", file=sys.stderr)  # fmt: skip
    draws = BatchSource(args, data, accumulation)
    check_possible(args, device, precision)

    model = make_model(args, torch.device("cpu") if args.shard else device, precision)
    collectives.broadcast_parameters(list(model.parameters()))
    layout = Sharded(model, *model.language_model_layers(), device) if args.shard else Replicated(model)
    if not collectives.is_rank0():  # other dropout than the main process's
        torch.manual_seed(args.seed + collectives.rank())
    name = args.validation_json_file
    validation = Validation(model, data.validation, data.right, name, args.batch_size, device, precision)
    model.check(data.train + data.meta + validation.chains())

    hypergradient = None
    if fixed_weights is None:
        so_far = None if state is None else state["settings"]
        hypergradient = resolve_hypergradient(args, data, model, device, precision, so_far)
        settings = settings | {"planned_hypergradient": hypergradient}
    lower_config = Config(
        type=hypergradient,
        warmup_steps=args.warmup_iterations * accumulation,
        unroll_steps=args.unroll_steps,
        gradient_accumulation=accumulation,
        precision=precision,
    )
    optimizer = make_optimizer(args, list(layout.trainables().values()))
    lower = PRMFineTuning(
        lower_config, model, optimizer, partial(draws.train, model), layout,
        learning_rate=learning_rate(args), clip=args.max_grad_norm, fixed_weights=fixed_weights,
    )  # fmt: skip
    upper = None
    if fixed_weights is None:
        table = DomainWeights(data.domains).to(device)
        # The gradients of alpha are as small as --lr: AdamW's usual eps of 1e-8 would be of their size.
        meta_optimizer = torch.optim.AdamW(
            table.parameters(), lr=args.meta_lr, weight_decay=args.meta_weight_decay, eps=1e-15
        )
        positive_rate = sum(chain.label for chain in data.meta) / len(data.meta) if args.center_meta_scores else None
        upper = DomainReweighting(
            Config(precision=precision), table, meta_optimizer, partial(draws.meta, model),
            aggregation=args.aggregation_function, positive_rate=positive_rate,
        )  # fmt: skip
    print(
        f"{data.rows} rows in {len(data.train)} chains from {len(data.domains)} domains, {len(data.meta)} meta chains; "
        f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,} trainable parameters on {device} "
        f"({precision}); {accumulation} x {args.batch_size} chains a step"
        + (f", shared by {collectives.world_size()} processes" if collectives.world_size() > 1 else "")
    )
    engine = ReweightingEngine(
        lower, upper, data.domains, device, folder, args.iteration_num, args.save_every_iterations, settings,
        keep=args.keep_checkpoints, max_skipped_steps=args.max_skipped_steps,
        validation=validation if data.validation else None, persistent=not args.dry_run,
    )  # fmt: skip
    if state is not None:
        engine.load_state_dict(state)
        print(f"resumed at step {engine.global_step}")
    return engine


def check_possible(args: Namespace, device: torch.device, precision: str) -> None:
    """Raise UserError for flags that cannot be had on this device or in so many processes: before a weight is read."""
    check_attention(args.attention, device, precision)
    if learns_weights(args):
        check_method(args, args.hypergradient)
    if args.shard:
        _check_shard(args)


def _check_shard(args: Namespace) -> None:
    if collectives.world_size() == 1:
        raise UserError("--shard does nothing in one process: start several with torchrun, see the README")
    if args.load_in_4bit:
        raise UserError("--shard cannot cut 4-bit weights into parts: leave out --load_in_4bit, or --shard")
    if args.train != "full" and args.freeze_projector is False and not args.gradient_checkpointing:
        raise UserError(
            "--shard with a trained projector beside a frozen language model needs "
            "--gradient_checkpointing: else processes with and without images would wait for each other"
        )
