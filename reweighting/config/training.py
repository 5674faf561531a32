"""The command's flags, grouped; `parse_arguments` reads them from the command line and from a recipe file.

    python reweighting/main.py --train_json_file data/train.json --meta_json_file data/meta.json --weights_path weights
    python reweighting/main.py --recipe recipes/qwen2_vl_2b.yaml --train_json_file mine.json … --lr 1e-6

A recipe is a JSON or YAML file of the same names; flags that are given on the command line win over it.
"""

import json
from argparse import ArgumentDefaultsHelpFormatter, Namespace
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from reweighting.errors import UserError
from reweighting.modeling.aggregation import AGGREGATIONS
from reweighting.modeling.config import ADAPTERS, SCORE_HEADS, TRAIN_MODES, check_settings, with_defaults

EMBEDDED_BACKBONE = Path(__file__).resolve().parents[2] / "backbone"


@dataclass
class DataArguments:
    """Files."""

    train_json_file: str = HfArg(help="training rows: a JSON file (or .jsonl, .parquet); see the README for its fields")
    meta_json_file: str | None = HfArg(default=None, help="meta rows; needed to learn the weights")
    validation_json_file: str | None = HfArg(
        default=None, help="candidate rows: the checkpoint with the best best-of-N accuracy on them is kept"
    )
    image_root: str | None = HfArg(
        default=None,
        help="folder that image paths start from and may not leave (default: the JSON file's, then the working one)",
    )
    weights_path: str = HfArg(default="weights", help="folder that the run writes into")


@dataclass
class ModelArguments:
    """The reward model."""

    reward_model: str = HfArg(
        default=str(EMBEDDED_BACKBONE), help="backbone: a folder, or a name on the Hugging Face hub"
    )
    train: str | None = HfArg(
        default=None,
        help="what is trained beside the score head: backbone, lora or dora (adapters on the language model), or head: "
        "nothing (default: backbone; lora with --lora_rank)",
    )
    lora_rank: int = HfArg(default=0, help="rank of the adapters of --train lora and dora; 0 there means 16")
    lora_alpha: float | None = HfArg(
        default=None, help="what the adapters say is scaled by lora_alpha / lora_rank (default: 32)"
    )
    freeze_vision: bool = HfArg(default=True, help="do not train the vision tower; --no_freeze_vision trains it")
    freeze_projector: bool | None = HfArg(
        default=None,
        help="do not train the projector from vision tower to language model; --no_freeze_projector trains it "
        "(default: as the tower)",
        metadata={"nargs": "?", "const": True},
    )
    load_in_4bit: bool = HfArg(
        default=False, help="the frozen language model in 4 bits (bitsandbytes, CUDA), under --train lora, dora or head"
    )
    score_head: str = HfArg(
        default="linear",
        help="linear, token (logit of the right answer minus that of the wrong one, by the model's own output "
        "embedding) or linear_from_token (linear, and starts there)",
    )
    correct_token: str | None = HfArg(default=None, help="score_head: the answer for right, one token (default: +)")
    incorrect_token: str | None = HfArg(default=None, help="score_head: the answer for wrong, one token (default: -)")
    attention: str = HfArg(default="sdpa", help="sdpa, flash_attention_2 (CUDA, bf16, package flash-attn) or eager")
    gradient_checkpointing: bool = HfArg(default=False, help="recompute activations: less memory, a third slower")
    max_image_side: int | None = HfArg(default=None, help="shrink larger images to this many pixels (published: 512)")
    max_length: int | None = HfArg(default=None, help="longest chain in tokens (default: what the backbone takes)")


@dataclass
class LowerArguments:
    """Lower level: fine-tuning the reward model."""

    iteration_num: int = HfArg(default=600, help="optimizer steps")
    batch_size: int = HfArg(default=8, help="chains in a micro-batch, all from one domain")
    group_by_question: bool = HfArg(
        default=False,
        help="a micro-batch holds whole questions, whose answers share the pass over image and question: faster where "
        "a question has several answers",
    )
    gradiant_accumulation: int | None = HfArg(
        aliases=["--gradient_accumulation"],
        default=None,
        help="micro-batches in an optimizer step (default: 2, or as many as let every domain into every window)",
    )
    optimizer: str = HfArg(default="adamw", help="adamw or sgd")
    lr: float = HfArg(default=3e-4, help="learning rate")
    momentum: float | None = HfArg(default=None, help="momentum of sgd (default: 0.9)")
    weight_decay: float = HfArg(default=1e-3, help="weight decay (decoupled with adamw)")
    max_grad_norm: float = HfArg(default=0.0, help="clip a step's gradient to this norm; 0 does not clip")
    scheduler: str = HfArg(default="cosine", help="learning rate over time: constant, step or cosine (to 0)")
    scheduler_step_size: int | None = HfArg(default=None, help="step: optimizer steps between two cuts (5000)")
    scheduler_gamma: float | None = HfArg(default=None, help="step: what a cut multiplies the rate with (0.5)")
    baseline: bool = HfArg(default=False, help="plain fine-tuning, every domain weighted 1: no upper level")
    domain_weights: str | None = HfArg(
        default=None,
        help="fixed weights: a run's domain_weights.json, or {domain: weight}; no upper level",
    )


@dataclass
class UpperArguments:
    """Upper level: learning the domain weights."""

    warmup_iterations: int = HfArg(
        default=0,
        help="optimizer steps of plain fine-tuning, all domains weighted 1, before it starts; part of --iteration_num",
    )
    unroll_steps: int = HfArg(default=20, help="optimizer steps between two updates of the weights (a window)")
    meta_batch_size: int = HfArg(default=64, help="meta chains in an update (about: a question stays whole)")
    meta_lr: float = HfArg(default=0.2, help="learning rate of the raw weights (AdamW)")
    meta_weight_decay: float = HfArg(default=0.0, help="pull towards equal weights (decoupled)")
    aggregation_function: str = HfArg(
        default="mean_logit", help=f"how a chain's steps become one number: {', '.join(AGGREGATIONS)}"
    )
    center_meta_scores: bool = HfArg(
        default=True,
        help="compare meta answers with each other, those to one question first; --no_center_meta_scores: take them "
        "as they are",
    )
    hypergradient: str = HfArg(
        default="auto",
        help="window (keeps a gradient a micro-batch), jvp or finite_difference (keep none; see the README), auto "
        "(window where that fits), or Betty's own darts or sama",
    )


@dataclass
class RunArguments:
    """The run."""

    seed: int = HfArg(default=1, help="of the data order, the score head and dropout")
    device: str | None = HfArg(default=None, help="cuda, cuda:1, mps, cpu, … (default: the best that is there)")
    shard: bool = HfArg(
        default=False, help="each of several processes holds a part of the model: for those that do not fit one GPU"
    )
    distributed_timeout: float = HfArg(
        default=30.0,
        help="minutes that one of several processes waits for the others before the run ends; more than process 0 "
        "needs to write a checkpoint, or to read the data, while the others wait",
    )
    precision: str | None = HfArg(default=None, help="of the compute: bf16 or fp32 (default: bf16 on cuda, else fp32)")
    save_every_iterations: int = HfArg(default=200, help="optimizer steps between two checkpoints")
    keep_checkpoints: int = HfArg(default=2, help="newest checkpoints to keep, besides the best one")
    resume: bool = HfArg(
        default=False, help="go on from the newest undamaged checkpoint in --weights_path, if there is one"
    )
    resume_from: str | None = HfArg(default=None, help="go on from this checkpoint, or from the newest of this run")
    allow_changed_settings: bool = HfArg(
        default=False, help="resume although settings or data have changed; says what has"
    )
    max_skipped_steps: int = HfArg(
        default=0, help="steps that may be left out because a loss or gradient is not finite"
    )
    dry_run: bool = HfArg(
        default=False, help="check everything, train one window, and tell what the whole run would take"
    )


GROUPS = (DataArguments, ModelArguments, LowerArguments, UpperArguments, RunArguments)
CHOICES = {
    "train": (*TRAIN_MODES, None),
    "score_head": SCORE_HEADS,
    "attention": ("sdpa", "flash_attention_2", "eager"),
    "optimizer": ("adamw", "sgd"),
    "scheduler": ("constant", "step", "cosine"),
    "aggregation_function": tuple(AGGREGATIONS),
    "hypergradient": ("auto", "unrolled", "jvp", "finite_difference", "darts", "sama"),
    "precision": ("fp32", "bf16", None),
}
POSITIVE = ("iteration_num", "batch_size", "gradiant_accumulation", "lr", "unroll_steps", "meta_batch_size", "meta_lr",
            "lora_alpha", "save_every_iterations", "keep_checkpoints", "scheduler_step_size", "max_image_side",
            "max_length", "distributed_timeout")  # fmt: skip
NOT_NEGATIVE = ("lora_rank", "weight_decay", "meta_weight_decay", "momentum", "max_grad_norm", "seed",
                "scheduler_gamma", "max_skipped_steps", "warmup_iterations")  # fmt: skip
# A flag that would do nothing is an error: flag -> (the flag it needs, the value that one must have).
NEEDS = {
    "momentum": ("optimizer", "sgd"),
    "scheduler_step_size": ("scheduler", "step"),
    "scheduler_gamma": ("scheduler", "step"),
}


def parse_arguments(argv: Sequence[str]) -> Namespace:
    """All flags as one namespace. Raises UserError for values that make no sense; argparse exits with 2 for others."""
    parser = HfArgumentParser(GROUPS, prog="main.py", description=__doc__.split("\n")[0], allow_abbrev=False,
                              formatter_class=ArgumentDefaultsHelpFormatter)  # fmt: skip
    parser.add_argument("--no_freeze_projector", dest="freeze_projector", action="store_false", default=None,
                        help="train the projector, beside adapters or a frozen tower too")  # fmt: skip
    parser.add_argument("--recipe", help="JSON or YAML file of flags; those on the command line win")
    first = HfArgumentParser((), add_help=False, allow_abbrev=False)
    first.add_argument("--recipe")
    recipe_file = first.parse_known_args(argv)[0].recipe
    if recipe_file is not None:
        recipe = _read_recipe(Path(recipe_file))
        for action in parser._actions:
            if action.dest in recipe:
                action.required = False
        parser.set_defaults(**recipe)
    args = Namespace(**with_defaults(vars(parser.parse_args(argv))))
    words = {word.split("=")[0] for word in argv}
    _check(args, {action.dest for action in parser._actions if words & set(action.option_strings)})
    return args


def flag_defaults() -> dict:
    """{flag: its default}, of those that have one."""
    return {field.name: field.default for group in GROUPS for field in fields(group) if field.default is not MISSING}


def learns_weights(args: Namespace) -> bool:
    """Whether the run has an upper level."""
    return not args.baseline and args.domain_weights is None


def _read_recipe(path: Path) -> dict:
    """The recipe's settings. Raises UserError if it is unreadable or names a flag that there is not."""
    try:
        text = path.read_text(encoding="utf-8")
        settings = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"--recipe {path}: cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"--recipe {path}: expected names and values, one flag each")
    types = {field.name: field.type for group in GROUPS for field in fields(group)}
    if "gradient_accumulation" in settings:
        if "gradiant_accumulation" in settings:
            raise UserError(f"--recipe {path}: gradient_accumulation and gradiant_accumulation are the same flag")
        settings["gradiant_accumulation"] = settings.pop("gradient_accumulation")
    for name, value in settings.items():
        if name not in types:
            raise UserError(f"--recipe {path}: {name}: there is no such flag")
        allowed = getattr(types[name], "__args__", None) or (types[name],)
        try:
            settings[name] = _as_flag(value, allowed)
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(f"--recipe {path}: {name}: found {value!r}: {error}") from error
    return settings


def _as_flag(value, allowed: tuple[type, ...]):
    """A recipe's value as one of the types that a flag allows. Raises ValueError or OverflowError if it is none."""
    if value is None and type(None) in allowed:
        return None
    wanted = allowed[0]
    if wanted is bool or isinstance(value, bool):
        if wanted is not bool or not isinstance(value, bool):
            raise ValueError("expected true or false" if wanted is bool else f"expected {wanted.__name__}")
        return value
    if wanted is str:
        if not isinstance(value, str):
            raise ValueError("expected text")
        return value
    if value is None or isinstance(value, list | dict):
        raise ValueError("expected a number")
    if isinstance(value, int):  # of any size
        return wanted(value)
    number = float(value)  # YAML reads 5e-7 as a text, and 1 where 1.0 is meant
    if wanted is int and number != int(number):
        raise ValueError("expected a whole number")
    return wanted(number)


def _check(args: Namespace, given: set[str]) -> None:
    """Raise UserError for the first flag whose value cannot be meant. given: those on the command line itself."""
    for name, allowed in CHOICES.items():
        if getattr(args, name) not in allowed:
            raise UserError(f"--{name}: found {getattr(args, name)}, allowed: {', '.join(filter(None, allowed))}")
    for name in POSITIVE + NOT_NEGATIVE:
        value = getattr(args, name)
        if value is not None and not (0 < value < float("inf") or (value == 0 and name in NOT_NEGATIVE)):
            least = "at least 0" if name in NOT_NEGATIVE else "more than 0"
            raise UserError(f"--{name}: found {value}, allowed: a number of {least}")
    for name, value in vars(args).items():
        if isinstance(value, str) and "\0" in value:
            raise UserError(f"--{name}: found {value!r}, allowed: text without a NUL character")
    if args.scheduler_gamma is not None and args.scheduler_gamma > 1:
        raise UserError(f"--scheduler_gamma: found {args.scheduler_gamma}, allowed: a number from 0 to 1")
    for name in ("lr", "meta_lr"):
        if getattr(args, name) > 1000:  # far beyond, float32 overflows
            raise UserError(f"--{name}: found {getattr(args, name)}, allowed: a number of at most 1000")
    for name, (other, value) in NEEDS.items():
        if getattr(args, name) is not None and getattr(args, other) != value:
            raise UserError(f"--{name} does nothing without --{other} {value}")
    if args.seed >= 2**63:
        raise UserError(f"--seed: found {args.seed}, allowed: a number below 2 ** 63")
    resumes = args.resume or args.resume_from is not None
    if args.resume and args.resume_from is not None:
        raise UserError("--resume_from says where to go on from: leave out --resume")
    if args.allow_changed_settings and not resumes:
        raise UserError("--allow_changed_settings does nothing without --resume or --resume_from")
    if args.dry_run and resumes:
        raise UserError("--dry_run starts at step 0: leave out --resume and --resume_from")
    if args.baseline and args.domain_weights is not None:
        raise UserError("--baseline weights every domain 1: leave out --domain_weights, or --baseline")
    check_settings(args)
    if args.lora_alpha is not None and args.train not in ADAPTERS:
        raise UserError(f"--lora_alpha does nothing with --train {args.train}: there are no adapters")
    if args.train != "full" and not args.freeze_vision:
        raise UserError(f"--no_freeze_vision does nothing with --train {args.train}: the vision tower stays as it is")
    if not learns_weights(args):
        for name in ("meta_batch_size", "meta_lr", "meta_weight_decay", "center_meta_scores", "hypergradient",
                     "warmup_iterations"):  # fmt: skip
            if name in given:  # a recipe's are for the runs that learn weights
                raise UserError(f"--{name} does nothing with --baseline or --domain_weights: no weights are learned")
        return
    for name, window in (("warmup_iterations", "first"), ("iteration_num", "last")):
        steps = getattr(args, name)
        if steps % args.unroll_steps:
            fewer = steps // args.unroll_steps * args.unroll_steps
            near = " or ".join(str(n) for n in (fewer, fewer + args.unroll_steps) if n)
            raise UserError(
                f"--{name} {steps} is no multiple of --unroll_steps {args.unroll_steps}, so the {window} "
                f"window would be cut short: use {near}"
            )
    if args.warmup_iterations >= args.iteration_num:
        raise UserError(
            f"--warmup_iterations {args.warmup_iterations} leaves none of --iteration_num {args.iteration_num} to "
            f"learn the weights in: use at most {args.iteration_num - args.unroll_steps}"
        )
    if args.center_meta_scores and args.meta_batch_size == 1:
        raise UserError("--meta_batch_size 1: a single answer has nothing to be compared with: use 2 or more, or "
                        "--no_center_meta_scores")  # fmt: skip
    if args.meta_json_file is None:
        raise UserError(
            "--meta_json_file is needed to learn the weights (or --baseline to train without learning them)"
        )
