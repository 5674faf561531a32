"""Puts a run together: chains -> model -> the two problems -> the engine."""

import json
import math
import os
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from betty.configs import Config
from transformers.utils import logging as transformers_logging

from reweighting import processes
from reweighting.arguments import learns_weights
from reweighting.batches import Batch, by_length
from reweighting.candidates import best_of_n_accuracy, score_candidates
from reweighting.chains import candidate_chains
from reweighting.checkpoints import HISTORY_FILE, check_same_run, digest, load_latest, load_named, load_state
from reweighting.devices import autocast, check_attention, choose_device, choose_precision
from reweighting.domain_weights import DomainWeights
from reweighting.engine import ReweightingEngine
from reweighting.errors import UnreadableImage, UserError
from reweighting.folders import set_aside, write_folder_whole, write_whole
from reweighting.free_memory import free_memory
from reweighting.hypergradient_plan import has_forward_mode, plan_hypergradient
from reweighting.layouts import Replicated, Sharded
from reweighting.memory_estimate import MemoryEstimate, Setting, estimate_run, weight_bytes
from reweighting.problems import SLOPES, DomainReweighting, PRMFineTuning
from reweighting.reward_model import ProcessRewardModel
from reweighting.run_data import RunData
from reweighting.sampling import ChainSampler, QuestionSampler, WindowSampler, small_batches

# Flags: how a run is started.
STARTING = ("recipe", "resume", "resume_from", "allow_changed_settings", "dry_run", "shard")
# Flags that are settings of the model too, see PRMConfig.
MODEL_SETTINGS = ("train", "lora_rank", "freeze_vision", "freeze_projector", "base_4bit", "score_head", "right_token",
                  "wrong_token", "max_length", "max_image_side")  # fmt: skip


def make_model(args: Namespace, device: torch.device, precision: str) -> ProcessRewardModel:
    """The reward model on its backbone; a frozen base takes the precision of the compute. On the device meta: no weight
    is read, and nothing takes memory."""
    frozen_base = torch.bfloat16 if args.train != "backbone" and precision == "bf16" else torch.float32
    attention = args.attention
    if device.type != "meta":
        check_attention(attention, device, precision)
    elif attention == "flash_attention_2":
        attention = "sdpa"  # takes as much memory, and wants no GPU
    return ProcessRewardModel.from_backbone(
        args.reward_model,
        dtype=frozen_base,
        device=device,
        gradient_checkpointing=args.gradient_checkpointing,
        attn_implementation=attention,
        aggregation=args.aggregation_function,
        **{name: getattr(args, name) for name in MODEL_SETTINGS},
    )


def make_optimizer(args: Namespace, params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW or SGD over the trainable parameters, one group."""
    if args.optimizer == "sgd":
        momentum = 0.9 if args.momentum is None else args.momentum
        return torch.optim.SGD(params, lr=args.lr, momentum=momentum, weight_decay=args.weight_decay)
    return torch.optim.AdamW(params, lr=args.lr, weight_decay=args.weight_decay, fused=True)


def micro_batches_of_step(args: Namespace, domains: int) -> int:
    """--gradiant_accumulation, or as many as let every domain into every window, 2 at least."""
    return args.gradiant_accumulation or max(2, math.ceil(domains / args.unroll_steps))


def estimate_memory(
    args: Namespace, data: RunData, device: torch.device, precision: str, hypergradient: str | None = None
) -> MemoryEstimate:
    """What the run will take on the device, by this process. No weight is read and no random number drawn.
    hypergradient: in place of what --hypergradient means."""
    accumulation = micro_batches_of_step(args, len(data.domains))
    with torch.random.fork_rng(devices=[]):
        model = make_model(args, torch.device("meta"), precision)
        if hypergradient is None and data.meta:
            free = free_memory(device) - weight_bytes(model)
            hypergradient, _ = choose_hypergradient(args, data, model, device, precision, free)
        return estimate_run(model, args, hypergradient, precision, accumulation, device, data.train, data.meta)


def choose_hypergradient(
    args: Namespace, data: RunData, model: ProcessRewardModel, device: torch.device, precision: str, free: int
) -> tuple[str, str]:
    """What --hypergradient means, with so many bytes `free` beside the model, and why. Raises UserError if what is
    asked for by name cannot be had."""
    forward_mode = has_forward_mode(args.attention, args.base_4bit)
    if args.hypergradient == "jvp" and not forward_mode:
        raise UserError("--hypergradient jvp: there is no forward mode through --attention flash_attention_2 or "
                        "--base_4bit: use finite_difference")  # fmt: skip
    if args.hypergradient != "auto":
        return args.hypergradient, "as asked for"
    if args.shard:
        return "window", "each process keeps its part of the gradients"
    trained = sum(param.numel() for param in model.parameters() if param.requires_grad)
    accumulation = micro_batches_of_step(args, len(data.domains))
    window = Setting(steps=args.unroll_steps, accumulation=accumulation, processes=processes.world())
    return plan_hypergradient(
        trained, window.window_vectors, args.optimizer, free, forward_mode,
        lambda: estimate_memory(args, data, device, precision, "jvp"),
    )  # fmt: skip


def way_so_far(settings: dict) -> str | None:
    """What --hypergradient meant in the run with these settings; None if it learned no weights."""
    way = settings.get("planned_hypergradient") or settings.get("hypergradient")
    return None if way == "auto" else way


def learning_rate(args: Namespace) -> Callable[[int], float]:
    """The learning rate as a function of the optimizer step (from 0): a resumed run needs no scheduler's state."""
    if args.scheduler == "step":
        size, gamma = args.scheduler_step_size or 5000, 0.5 if args.scheduler_gamma is None else args.scheduler_gamma
        return lambda step: args.lr * gamma ** (step // size)
    if args.scheduler == "cosine":
        return lambda step: args.lr * (1 + math.cos(math.pi * step / args.iteration_num)) / 2
    return lambda step: args.lr


def read_fixed_weights(args: Namespace, domains: list[str]) -> torch.Tensor | None:
    """The weights [K] of --domain_weights scaled to mean 1, ones with --baseline, None where they are learned."""
    if args.baseline:
        return torch.ones(len(domains))
    if args.domain_weights is None:
        return None
    try:
        content = json.loads(Path(args.domain_weights).read_text(encoding="utf-8"))
        content = content.get("weights", content)
        weights = torch.tensor([float(content[domain]) for domain in domains], dtype=torch.float64)
    except KeyError as error:
        raise UserError(f"--domain_weights {args.domain_weights}: the domain {error} has no weight") from error
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"--domain_weights {args.domain_weights}: expected {{domain: weight}}: {error}") from error
    scaled = (weights / weights.mean()).float()
    if not (scaled.isfinite().all() and (scaled >= 0).all() and scaled.sum() > 0):
        raise UserError(f"--domain_weights {args.domain_weights}: weights must be at least 0, one of them more")
    return scaled


def run_settings(args: Namespace) -> dict:
    """What a checkpoint remembers of a run: the flags that say what is computed, not how it is started; the precision
    that is meant where none is given; and digests of the JSON files' and a local backbone's bytes, since another file
    of the same name is another run. Raises UserError if a file cannot be read, or the device is not there."""
    names = [args.train_json_file, args.meta_json_file] if learns_weights(args) else [args.train_json_file]
    if args.domain_weights is not None:
        names.append(args.domain_weights)
    try:
        data = digest(*map(Path, names))
        validation = None if args.validation_json_file is None else digest(Path(args.validation_json_file))
        backbone = args.reward_model
        if os.path.isdir(backbone):
            files = (path for path in Path(backbone).iterdir() if path.suffix in (".json", ".jinja", ".safetensors"))
            backbone = digest(*sorted(files))
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from error
    flags = {name: value for name, value in vars(args).items() if name not in STARTING}
    return flags | {
        "backbone": backbone,
        "precision": choose_precision(args.precision, choose_device(args.device)),
        "data": data,
        "validation": validation,
    }


def find_checkpoint(args: Namespace, settings: dict, folder: Path) -> tuple[Path, dict] | None:
    """The checkpoint that a run goes on from, and its state; None at a start. Moves nothing but what is damaged.

    settings: from `run_settings`. Raises UserError if the checkpoint is missing, damaged or another run's. Of several
    processes the main one looks, and all read what it has found.
    """
    if not processes.is_main():
        place = processes.from_main(None)
        return None if place is None else (place, load_state(place))
    found = None
    if args.resume_from is not None:
        found = load_named(Path(args.resume_from))
    elif args.resume:
        found = load_latest(folder / "checkpoints")
        if found is None:
            print(f"--resume: there is no checkpoint in {folder} yet: starting at step 0")
    if found is not None:
        check_same_run(found[1], settings, args.allow_changed_settings)
        print(f"going on from {found[0]}")
    processes.from_main(None if found is None else found[0])
    return found


def take_over(args: Namespace, folder: Path, place: Path | None) -> None:
    """Make the output folder ready for a run that starts (place None) or goes on from the checkpoint at `place`.

    What an earlier run left is moved aside, but with --resume; history goes back to the checkpoint. A checkpoint from
    elsewhere is copied, so that --resume finds it from the first moment on. The main process does all this.
    """
    if not processes.is_main():
        return
    if place is None:
        set_aside(folder)
        (folder / "checkpoints").mkdir(exist_ok=True)  # now, not at the first save: it might not be possible
        return
    history = (place / HISTORY_FILE).read_text(encoding="utf-8")
    if args.resume_from is not None:
        waiting = folder / ".taken-over"
        write_folder_whole(waiting, lambda aside: shutil.copytree(place, aside, dirs_exist_ok=True))
        set_aside(folder)
        (folder / "checkpoints").mkdir()
        waiting.rename(folder / "checkpoints" / place.name)
    write_whole(folder / HISTORY_FILE, history)


def check_shares(args: Namespace, samplers: list, meta_sampler: QuestionSampler | None) -> None:
    """Raise UserError if a process would have nothing to do in some batch, or something that it cannot."""
    world = processes.world()
    if args.shard and world == 1:
        raise UserError("--shard does nothing in one process: start several with torchrun, see the README")
    if args.shard and args.base_4bit:
        raise UserError("--shard cannot cut 4-bit weights into parts: leave out --base_4bit, or --shard")
    lower, upper = ("batch_size", samplers), ("meta_batch_size", [meta_sampler] if meta_sampler else [])
    for name, drawing in (lower, upper):
        least = min((sampler.least for sampler in drawing), default=world)
        if least < world:
            raise UserError(f"--{name} {getattr(args, name)}: {world} processes share the chains of a batch, which can "
                            f"be {least}: use a larger one")  # fmt: skip
    if args.shard and args.train != "backbone" and args.freeze_projector is False and not args.gradient_checkpointing:
        raise UserError("--shard with a trained projector beside a frozen language model needs "
                        "--gradient_checkpointing: else processes with and without images would wait for each other")


def check_way(hypergradient: str, shard: bool) -> None:
    """Raise UserError if this way to the hypergradient cannot be had in so many processes."""
    if shard and hypergradient in SLOPES:
        raise UserError(f"--hypergradient {hypergradient} cannot move parameters that are cut into parts: use window, "
                        "or leave out --shard")  # fmt: skip
    if processes.world() > 1 and hypergradient in ("darts", "sama"):
        raise UserError(f"--hypergradient {hypergradient}: Betty's own work in one process only: use window")


def build(
    args: Namespace, settings: dict, data: RunData, folder: Path, state: dict | None = None
) -> ReweightingEngine:
    """The engine of a run that writes into `folder`, at its start or at a checkpoint's `state`.

    settings: from `run_settings`.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.manual_seed(args.seed)
    device, precision = choose_device(args.device), settings["precision"]

    train, domains, meta = data.train, data.domains, data.meta
    fixed_weights = read_fixed_weights(args, domains)
    members = [[] for _ in domains]
    for index, chain in enumerate(train):
        members[chain.domain].append(index)
    accumulation = micro_batches_of_step(args, len(domains))
    if args.max_grad_norm and accumulation == 1 and fixed_weights is None:
        print("warning: a clipped step of a single micro-batch teaches nothing about its domain's weight: "
              "--max_grad_norm wants --gradiant_accumulation 2 or more", file=sys.stderr)  # fmt: skip
    samplers = [
        QuestionSampler(train, indices, args.batch_size, args.seed, 1, domain)
        if args.questions_together
        else ChainSampler(indices, args.batch_size, args.seed, 1, domain)
        for domain, indices in enumerate(members)
    ]
    sampler = WindowSampler(samplers, args.unroll_steps * accumulation, args.seed)
    meta_sampler = QuestionSampler(meta, range(len(meta)), args.meta_batch_size, args.seed, 3) if meta else None

    check_shares(args, samplers, meta_sampler)

    model = make_model(args, torch.device("cpu") if args.shard else device, precision)
    processes.spread(list(model.parameters()))
    layout = Sharded(model, *model.language_model_layers(), device) if args.shard else Replicated(model)
    if not processes.is_main():  # other dropout than the main process's
        torch.manual_seed(args.seed + processes.rank())
    candidates = [chain for row in data.validation for chain in candidate_chains(row, args.validation_json_file)]
    model.check(train + meta + candidates)

    def draw_train(micro_step: int) -> tuple[int, Batch]:
        domain, indices = sampler.draw(micro_step)
        batch = model.collate([model.chain_tokenizer.encode(train[index]) for index in processes.share(indices)])
        return domain, replace(batch, labelled=sum(train[index].labelled for index in indices))

    def draw_meta(update: int) -> list[Batch]:
        drawn = meta_sampler.draw(update)
        encoded = by_length([model.chain_tokenizer.encode(meta[index]) for index in processes.share(drawn)])
        return [model.collate(part) for part in small_batches(encoded, len(drawn), args.batch_size)]

    optimizer = make_optimizer(args, list(layout.trainables().values()))
    hypergradient = None
    if fixed_weights is None:
        so_far = None if state is None else way_so_far(state["settings"])
        if args.hypergradient == "auto" and so_far is not None:  # the window so far is of that kind
            hypergradient, reason = so_far, "as when the run was started"
        else:
            free = free_memory(device)
            choice = choose_hypergradient(args, data, model, device, precision, free)
            hypergradient, reason = processes.from_main(choice)  # each may have other memory
        check_way(hypergradient, args.shard)
        settings = settings | {"planned_hypergradient": hypergradient}
        print(f"hypergradient: {hypergradient}: {reason}")
    lower_config = Config(
        type=hypergradient,
        warmup_steps=args.warmup_iterations * accumulation,
        unroll_steps=args.unroll_steps,
        gradient_accumulation=accumulation,
        precision=precision,
    )
    lower = PRMFineTuning(
        lower_config, model, optimizer, draw_train, layout,
        learning_rate=learning_rate(args), clip=args.max_grad_norm, fixed_weights=fixed_weights,
    )  # fmt: skip
    upper = None
    if fixed_weights is None:
        table = DomainWeights(domains)
        # The gradients of alpha are as small as --lr: AdamW's usual eps of 1e-8 would be of their size.
        meta_optimizer = torch.optim.AdamW(
            table.parameters(), lr=args.meta_lr, weight_decay=args.meta_weight_decay, eps=1e-15
        )
        right_share = sum(chain.label for chain in meta) / len(meta) if args.center_meta_scores else None
        upper = DomainReweighting(
            Config(precision=precision), table, meta_optimizer, draw_meta,
            aggregation=args.aggregation_function, right_share=right_share,
        )  # fmt: skip
    print(
        f"{data.rows} rows in {len(train)} chains from {len(domains)} domains, {len(meta)} meta chains; "
        f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,} trainable parameters on {device} "
        f"({precision}); {accumulation} x {args.batch_size} chains a step"
        + (f", shared by {processes.world()} processes" if processes.world() > 1 else "")
    )

    def score_share() -> list:
        rows = data.validation if args.shard else processes.share(data.validation)  # a sharded model scores all at once
        try:
            with autocast(device, precision):
                return score_candidates(model, rows, args.batch_size, args.validation_json_file)
        except UnreadableImage as error:
            if args.shard:  # the others wait inside the model: this process cannot try again, and ends them all
                raise UserError(str(error)) from error
            raise

    def accuracy(scored: list) -> float:
        if not args.shard:
            scored = [row for share in processes.everyones(scored) for row in share]
        return best_of_n_accuracy(scored, data.right, max(map(len, data.right)))

    engine = ReweightingEngine(
        lower, upper, domains, device, folder, args.iteration_num, args.save_every_iterations, settings,
        keep=args.keep_checkpoints, skip_nonfinite=args.skip_nonfinite,
        validate=(score_share, accuracy) if data.validation else None,
    )  # fmt: skip
    if state is not None:
        engine.load_state_dict(state)
        print(f"resumed at step {engine.global_step}")
    return engine
