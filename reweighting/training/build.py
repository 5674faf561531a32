"""The parts of a run, each made from the flags: reward model, optimizers, learning rate, batch sizes, bounds of the
weights, validation.

`main.py` puts them together.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from reweighting.bilevel.calm_weights import CalmWeights
from reweighting.bilevel.domain_weights import LossWeights
from reweighting.bilevel.evidence import SlopeEvidence
from reweighting.bilevel.instance_evidence import InstanceEvidence
from reweighting.config.training import LowerConfig, TrainingConfig, UpperConfig
from reweighting.distributed import collectives
from reweighting.distributed.sharding import Replicated, Sharded
from reweighting.modeling.reward_model import CACHE_BYTES, ProcessRewardModel
from reweighting.modeling.state_files import StateFiles
from reweighting.modeling.step_states import StepStates
from reweighting.training.run_data import RunData
from reweighting.training.validation import Validation


def make_reward_model(
    config: TrainingConfig, device: torch.device, precision: str
) -> tuple[ProcessRewardModel, Replicated]:
    """Load the reward model, the same on every process, and place it.

    Args:
        config: the settings.
        device: where this process computes.
        precision: "fp32" or "bf16".

    Returns:
        The model, and how its parameters lie on the processes.

    Raises:
        UserError: if the backbone cannot be loaded.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    model = load_backbone(config, torch.device("cpu") if config.run.shard else device, precision)
    collectives.broadcast_parameters(list(model.parameters()))
    layout = Sharded(model, *model.language_model_layers(), device) if config.run.shard else Replicated(model)
    if not collectives.is_rank0():  # dropout that differs from rank 0's
        torch.manual_seed(config.run.seed + collectives.rank())
    return model, layout


def load_backbone(config: TrainingConfig, device: torch.device, precision: str) -> ProcessRewardModel:
    """Load the backbone with a score head; a frozen base takes the precision of the compute.

    With `--train head`, the model remembers what the head reads, see `modeling/step_states.py`, and keeps it in
    `--step_states_dir`. On the device meta no weight is read, and nothing takes memory.
    """
    model = config.model
    frozen_base = torch.bfloat16 if model.train != "full" and precision == "bf16" else torch.float32
    attention = model.attention
    if device.type == "meta" and attention == "flash_attention_2":
        attention = "sdpa"  # takes as much memory, and needs no GPU
    loaded = ProcessRewardModel.from_backbone(
        model.reward_model,
        dtype=frozen_base,
        device=device,
        gradient_checkpointing=model.gradient_checkpointing,
        attn_implementation=attention,
        aggregation=config.upper.aggregation_function,
        train=model.train,
        lora_rank=model.lora_rank,
        lora_alpha=model.lora_alpha,
        freeze_vision=model.freeze_vision,
        freeze_projector=model.freeze_projector,
        load_in_4bit=model.load_in_4bit,
        score_head=model.score_head,
        correct_token=model.correct_token,
        incorrect_token=model.incorrect_token,
        max_length=model.max_length,
        max_image_side=model.max_image_side,
    )
    # Processes that share a model's shards must make the same passes, whatever each of them remembers.
    if loaded.config.train == "head" and not config.run.shard:
        files, folder = None, config.data.step_states_dir
        if folder is not None and loaded.base_identity is not None:  # on the device meta there is none
            files = StateFiles(Path(folder), loaded.base_identity, loaded.base, loaded.chain_tokenizer, precision)
        loaded.step_states = StepStates(loaded.base, loaded.chain_tokenizer, precision, CACHE_BYTES, files)
    return loaded


def make_validation(
    config: TrainingConfig, data: RunData, model: ProcessRewardModel, device: torch.device, precision: str
) -> Validation | None:
    """Make the measure by which the best checkpoint is chosen; None without --validation_json_file."""
    if config.data.validation_json_file is None:
        return None
    return Validation(
        model,
        data.validation,
        data.correct,
        " ".join(config.data.validation_json_file),
        config.lower.batch_size,
        device,
        precision,
    )


def make_optimizer(config: LowerConfig, params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Make AdamW or SGD over the trainable parameters, in one group."""
    if config.optimizer == "sgd":
        momentum = 0.9 if config.momentum is None else config.momentum
        return torch.optim.SGD(params, lr=config.lr, momentum=momentum, weight_decay=config.weight_decay)
    return torch.optim.AdamW(params, lr=config.lr, weight_decay=config.weight_decay, fused=True)


def make_meta_optimizer(
    config: UpperConfig, table: LossWeights, evidence: SlopeEvidence, instance_evidence: InstanceEvidence | None = None
) -> torch.optim.Optimizer:
    """Make the calm rule, which follows the evidence, or AdamW over the raw weights."""
    if config.meta_optimizer == "calm":
        return CalmWeights(table, evidence, config.meta_range, instance_evidence)
    # The gradients of alpha are as small as --lr: AdamW's usual eps of 1e-8 would be of their size.
    groups = table.parameter_groups(config.meta_lr)
    return torch.optim.AdamW(groups, lr=config.meta_lr, weight_decay=config.meta_weight_decay, eps=1e-15)


def micro_batches_per_step(config: TrainingConfig, domains: int) -> int:
    """Return --gradiant_accumulation, or as many as let every domain into every window, at least 2."""
    return config.lower.gradiant_accumulation or max(2, math.ceil(domains / config.upper.unroll_steps))


def learning_rate_schedule(config: LowerConfig) -> Callable[[int], float]:
    """Return the learning rate as a function of the optimizer step (from 0): resuming needs no scheduler's state."""
    if config.scheduler == "step":
        size, gamma = (
            config.scheduler_step_size or 5000,
            0.5 if config.scheduler_gamma is None else config.scheduler_gamma,
        )
        return lambda step: config.lr * gamma ** (step // size)
    if config.scheduler == "cosine":
        return lambda step: config.lr * (1 + math.cos(math.pi * step / config.iteration_num)) / 2
    return lambda step: config.lr


def weight_bounds(config: UpperConfig) -> tuple[float, float]:
    """Return the lowest and the highest weight."""
    return config.min_weight, math.inf if config.max_weight is None else config.max_weight


def meta_batch_size(config: UpperConfig, data: RunData) -> int:
    """Return --meta_batch_size, or a seventh of the different meta answers, from 2 to 64."""
    return config.meta_batch_size or min(64, max(2, _different_meta_answers(data) // 7))


def windows_per_meta_pass(config: UpperConfig, data: RunData) -> float:
    """Return in how many updates of the weights the different meta answers are read once."""
    return _different_meta_answers(data) / meta_batch_size(config, data)


def _different_meta_answers(data: RunData) -> int:
    """The number of meta answers that differ in question, images or steps."""
    return len({(chain.prompt, chain.steps) for chain in data.meta})


def positive_rate(data: RunData) -> float:
    """Return the share of meta answers that are correct."""
    return sum(chain.label for chain in data.meta) / len(data.meta)
