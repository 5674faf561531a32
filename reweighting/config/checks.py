"""What flags may be: ranges, flags that would do nothing, and flags that contradict each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from reweighting.errors import UserError
from reweighting.modeling.config import ADAPTERS, check_settings

if TYPE_CHECKING:
    from reweighting.config.training import TrainingConfig, UpperConfig

POSITIVE = ("iteration_num", "batch_size", "gradiant_accumulation", "lr", "unroll_steps", "meta_batch_size", "meta_lr",
            "lora_alpha", "save_every_iterations", "keep_checkpoints", "scheduler_step_size", "max_image_side",
            "max_length", "distributed_timeout", "meta_range", "label_lr", "label_times")  # fmt: skip
NOT_NEGATIVE = ("lora_rank", "weight_decay", "meta_weight_decay", "momentum", "max_grad_norm", "seed",
                "scheduler_gamma", "max_skipped_steps", "warmup_iterations")  # fmt: skip
# Beyond, numbers overflow.
AT_MOST = {
    "lr": 1000,
    "meta_lr": 1000,
    "meta_range": 1000,
    "label_lr": 1,
    "scheduler_gamma": 1,
    "seed": 2**63 - 1,
    "distributed_timeout": 1_000_000,
}


@dataclass(frozen=True)
class Useless:
    """Flags that would do nothing: an error, since whoever gives one expects something of it.

    Attributes:
        flags: their names.
        when: whether they do nothing in this config.
        because: why, in words that follow "--flag does nothing".
        from_recipes: whether a recipe's are errors too; recipes are shared by runs of several kinds.
    """

    flags: tuple[str, ...]
    when: Callable[[TrainingConfig], bool]
    because: str
    from_recipes: bool = True


USELESS = (
    Useless(("momentum",), lambda c: c.lower.optimizer != "sgd", "without --optimizer sgd"),
    Useless(
        ("scheduler_step_size", "scheduler_gamma"), lambda c: c.lower.scheduler != "step", "without --scheduler step"
    ),
    Useless(
        ("allow_changed_settings",),
        lambda c: not c.run.resume and c.run.resume_from is None,
        "without --resume or --resume_from",
    ),
    Useless(("lora_alpha",), lambda c: c.model.train not in ADAPTERS, "without adapters: use --train lora or dora"),
    Useless(
        ("gradient_checkpointing",),
        lambda c: c.model.train == "head",
        "with --train head: no gradient goes through the backbone",
        from_recipes=False,
    ),
    Useless(
        ("step_states_dir",),
        lambda c: c.model.train != "head",
        "without --train head: the states change while the backbone is trained",
        from_recipes=False,
    ),
    Useless(
        ("step_states_dir",),
        lambda c: c.run.shard,
        "with --shard: each process holds a part of the backbone, and nothing is remembered",
    ),
    Useless(
        ("freeze_vision",),
        lambda c: c.model.train != "full" and not c.model.freeze_vision,
        "without --train full: the vision tower stays frozen",
    ),
    Useless(
        (
            "meta_batch_size",
            "meta_lr",
            "meta_weight_decay",
            "center_meta_scores",
            "hypergradient",
            "warmup_iterations",
            "meta_optimizer",
            "meta_range",
            "weights_for",
            "instance_weights_form",
            "instance_activation",
            "correct_labels",
            "min_weight",
            "max_weight",
        ),
        lambda c: not c.learns_weights,
        "with --baseline, --domain_weights or --instance_weights: no weights are learned",
        from_recipes=False,
    ),
    Useless(
        ("meta_lr", "meta_weight_decay"),
        lambda c: c.upper.meta_optimizer != "adamw",
        "without --meta_optimizer adamw",
        from_recipes=False,
    ),
    Useless(
        ("meta_range",), lambda c: c.upper.meta_optimizer != "calm", "without --meta_optimizer calm", from_recipes=False
    ),
    Useless(
        ("instance_weights_form", "instance_activation"),
        lambda c: c.upper.weights_for == "domain",
        "without --weights_for instance or both",
    ),
    Useless(
        ("instance_activation",),
        lambda c: c.upper.instance_weights_form == "net",
        "with --instance_weights_form net, whose weights are softplus of its output",
    ),
    Useless(
        ("label_times",),
        lambda c: c.upper.correct_labels != "interval",
        "without --correct_labels interval",
        from_recipes=False,
    ),
    Useless(
        ("label_lr",),
        lambda c: c.upper.correct_labels is None or c.upper.meta_optimizer != "adamw",
        "without --correct_labels and --meta_optimizer adamw",
        from_recipes=False,
    ),
    Useless(
        ("min_weight", "max_weight"),
        lambda c: c.upper.weights_for == "instance",
        "with --weights_for instance: it bounds the weights of domains, and these have none of their own",
        from_recipes=False,
    ),
)


def check_training_config(config: TrainingConfig, given: set[str]) -> None:
    """Check all flags of a training run.

    Args:
        config: the settings.
        given: the flags that stand on the command line itself.

    Raises:
        UserError: for the first flag that cannot be meant; the message names it and the remedy.
    """
    flags = config.flags()
    _check_ranges(flags)
    _check_useless(config, flags, given)
    if config.run.resume and config.run.resume_from is not None:
        raise UserError("--resume_from names the checkpoint to resume from: leave out --resume")
    if config.run.dry_run and (config.run.resume or config.run.resume_from is not None):
        raise UserError("--dry_run starts at step 0: leave out --resume and --resume_from")
    files = [name for name in ("domain_weights", "instance_weights") if getattr(config.lower, name) is not None]
    if config.lower.baseline and files:
        raise UserError(f"--baseline weights every domain 1: leave out --{files[0]}, or --baseline")
    if len(files) > 1:
        raise UserError("--instance_weights holds the weights of the domains too: leave out --domain_weights")
    if config.data.train_json_file is None and config.data.mixture is None:
        raise UserError("--train_json_file is needed: name the training rows")
    check_settings(config.model)
    if config.learns_weights:
        _check_upper_level(config)


def _check_ranges(flags: dict) -> None:
    for name in POSITIVE + NOT_NEGATIVE:
        value = flags[name]
        if value is not None and not (0 < value < float("inf") or (value == 0 and name in NOT_NEGATIVE)):
            least = "at least 0" if name in NOT_NEGATIVE else "more than 0"
            raise UserError(f"--{name}: found {value}, allowed: a number of {least}")
    for name, most in AT_MOST.items():
        if flags[name] is not None and flags[name] > most:
            raise UserError(f"--{name}: found {flags[name]}, allowed: a number of at most {most}")


def _check_useless(config: TrainingConfig, flags: dict, given: set[str]) -> None:
    defaults = {field.name: field.default for group in vars(config).values() for field in fields(group)}
    for rule in USELESS:
        for name in rule.flags if rule.when(config) else ():
            if name in given or (rule.from_recipes and flags[name] != defaults[name]):
                negated = "no_" if defaults[name] is True and flags[name] is False else ""
                raise UserError(f"--{negated}{name} does nothing {rule.because}")


def _check_upper_level(config: TrainingConfig) -> None:
    upper, steps = config.upper, config.upper.unroll_steps
    if upper.instance_activation != "softplus":
        _check_published_table(upper)
    if upper.instance_weights_form == "net" and upper.meta_optimizer != "adamw":
        raise UserError("--instance_weights_form net is trained by gradient steps: use --meta_optimizer adamw")
    for name, number, window in (
        ("warmup_iterations", upper.warmup_iterations, "first"),
        ("iteration_num", config.lower.iteration_num, "last"),
    ):
        if number % steps:
            fewer = number // steps * steps
            near = " or ".join(str(n) for n in (fewer, fewer + steps) if n)
            raise UserError(
                f"--{name} {number} is no multiple of --unroll_steps {steps}, so the {window} window would be cut "
                f"short: use {near}"
            )
    if upper.warmup_iterations >= config.lower.iteration_num:
        raise UserError(
            f"--warmup_iterations {upper.warmup_iterations} leaves none of --iteration_num "
            f"{config.lower.iteration_num} to learn the weights in: use at most {config.lower.iteration_num - steps}"
        )
    if not 0 <= upper.min_weight <= 1:
        raise UserError(f"--min_weight {upper.min_weight}: weights have mean 1, so the lowest is a number from 0 to 1")
    if upper.max_weight is not None and not 1 <= upper.max_weight < float("inf"):
        raise UserError(f"--max_weight {upper.max_weight}: weights have mean 1, so the highest is at least 1")
    if upper.center_meta_scores and upper.meta_batch_size == 1:
        raise UserError(
            "--meta_batch_size 1: a single answer has nothing to be compared with: use 2 or more, or "
            "--no_center_meta_scores"
        )
    if config.data.meta_json_file is None:
        raise UserError(
            "--meta_json_file is needed to learn the weights (or --baseline to train without learning them)"
        )


def _check_published_table(upper: UpperConfig) -> None:
    activation = f"--instance_activation {upper.instance_activation}"
    if upper.weights_for != "instance":
        raise UserError(
            f"{activation} leaves the weights unscaled, so they cannot stand around a domain's: use --weights_for "
            "instance, or softplus"
        )
    if upper.meta_optimizer != "adamw":
        raise UserError(f"{activation} is trained by gradient steps: use --meta_optimizer adamw, or softplus")
