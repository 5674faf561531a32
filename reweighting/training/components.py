"""The parts of a run that the flags describe: reward model, optimizer, learning rate, weights that stay as they are."""

import json
import math
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch

from reweighting.errors import UserError
from reweighting.modeling.reward_model import ProcessRewardModel

# Flags that are settings of the model too, see PRMConfig.
MODEL_SETTINGS = ("train", "lora_rank", "lora_alpha", "freeze_vision", "freeze_projector", "load_in_4bit", "score_head",
                  "correct_token", "incorrect_token", "max_length", "max_image_side")  # fmt: skip


def make_model(args: Namespace, device: torch.device, precision: str) -> ProcessRewardModel:
    """The reward model on its backbone; a frozen base takes the precision of the compute. On the device meta: no weight
    is read, and nothing takes memory."""
    frozen_base = torch.bfloat16 if args.train != "full" and precision == "bf16" else torch.float32
    attention = args.attention
    if device.type == "meta" and attention == "flash_attention_2":
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
