"""The flags of `main.py`: one frozen dataclass for each group, and `TrainingConfig`, which holds them all.

    config = TrainingConfig.parse(sys.argv[1:])
    config.lower.lr, config.upper.unroll_steps, config.learns_weights

To add a flag, add a field to a group: the parser, `--help`, recipes and the command-line reference follow from it.
Ranges and flags that contradict each other are in `checks.py`.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from reweighting.config.checks import check_training_config
from reweighting.config.parsing import CommandConfig, flag, groups_of, parse_groups
from reweighting.config.reading import FILES, ReadingConfig
from reweighting.modeling.config import AggregationName, ScoreHead, TrainMode, with_defaults
from reweighting.modeling.saved_model import flags_of_saved

PACKAGE = Path(__file__).resolve().parents[1]
EMBEDDED_BACKBONE = PACKAGE / "_backbone"  # where `pip install` puts it
if not EMBEDDED_BACKBONE.is_dir():
    EMBEDDED_BACKBONE = PACKAGE.parent / "backbone"  # where the repository has it

LowerLossName = Literal["mse", "bce"]
WeightsFor = Literal["domain", "instance", "both"]
WeightsForm = Literal["table", "net"]
ActivationName = Literal["softplus", "clip", "relu", "leaky_relu"]
CorrectLabels = Literal["interval", "published"]
HypergradientName = Literal["auto", "unrolled", "jvp", "finite_difference", "darts"]


@dataclass(frozen=True)
class DataConfig:
    """Files."""

    train_json_file: list[str] | None = flag(default=None, help=f"answers with step labels: {FILES}")
    mixture: str | None = flag(
        default=None,
        help="more of them: a JSON list of objects with path, and domain, format or max_rows; in a recipe, a list",
    )
    meta_json_file: list[str] | None = flag(
        default=None, help="whole answers, correct and incorrect ones; needed to learn the weights"
    )
    validation_json_file: list[str] | None = flag(
        default=None,
        help="questions with several answers: the checkpoint with the best best-of-N accuracy on them is kept",
    )
    image_root: str | None = flag(
        default=None,
        help="folder that image paths start from and may not leave (default: the JSON file's, then the working one)",
    )
    drop_too_long: bool = flag(
        default=False,
        help="leave out chains that are longer than the model takes, and print how many; else they are an error",
    )
    weights_path: str = flag(default="weights", help="output folder")
    step_states_dir: str | None = flag(
        default=None,
        help="with --train head: keep the backbone's states at the steps' ends in this folder, so that later runs on "
        "the same chains (other seeds, weights, settings) need no pass of the backbone",
    )


@dataclass(frozen=True)
class ModelConfig:
    """The reward model."""

    reward_model: str = flag(
        default=str(EMBEDDED_BACKBONE),
        help="backbone: a folder, a name on the Hugging Face hub, or a GGUF file; or the folder of a trained reward "
        "model, which is continued: its head, its adapters, and its settings where no flag is given",
    )
    train: TrainMode | None = flag(
        default=None,
        help="what is trained beside the score head: full (the whole backbone), lora or dora (adapters on the language "
        "model), or head (nothing else) (default: full; lora with --lora_rank)",
    )
    lora_rank: int = flag(default=0, help="rank of the adapters of --train lora and dora; 0 there means 16")
    lora_alpha: float | None = flag(
        default=None, help="the adapters' output is scaled by lora_alpha / lora_rank (default: 32)"
    )
    freeze_vision: bool = flag(default=True, help="do not train the vision tower; --no_freeze_vision trains it")
    freeze_projector: bool | None = flag(
        default=None,
        help="do not train the projector from vision tower to language model; --no_freeze_projector trains it "
        "(default: as the tower)",
        metadata={"nargs": "?", "const": True},
    )
    load_in_4bit: bool = flag(
        default=False,
        help="load the frozen language model in 4 bits (bitsandbytes, CUDA), with --train lora, dora, head",
    )
    score_head: ScoreHead = flag(
        default="linear",
        help="linear; mlp: two layers with 512 hidden units; token: the logit of --correct_token minus that of "
        "--incorrect_token, by the model's own output embedding; linear_from_token: a linear head that starts from "
        "that difference",
    )
    correct_token: str | None = flag(default=None, help="score_head: the token for a correct step (default: +)")
    incorrect_token: str | None = flag(default=None, help="score_head: the token for an incorrect step (default: -)")
    attention: Literal["sdpa", "flash_attention_2", "eager"] = flag(
        default="sdpa", help="attention kernel; flash_attention_2 needs CUDA, bf16 and the package flash-attn"
    )
    gradient_checkpointing: bool = flag(default=False, help="recompute activations: less memory, a third slower")
    max_image_side: int | None = flag(default=None, help="shrink larger images to this many pixels (published: 512)")
    max_length: int | None = flag(default=None, help="longest chain in tokens (default: the backbone's limit)")


@dataclass(frozen=True)
class LowerConfig:
    """Lower level: fine-tuning the reward model."""

    iteration_num: int = flag(default=600, help="optimizer steps")
    batch_size: int = flag(default=8, help="chains in a micro-batch, all from one domain")
    group_by_question: bool = flag(
        default=False,
        help="fill a micro-batch with whole questions, whose answers share the pass over image and question: faster "
        "where a question has several answers",
    )
    gradiant_accumulation: int | None = flag(
        aliases=["--gradient_accumulation"],
        default=None,
        help="micro-batches in an optimizer step (default: 2, or as many as let every domain into every window)",
    )
    lower_loss: LowerLossName = flag(
        default="mse",
        help="loss of a step: mse, the squared error of its score; bce, the binary cross-entropy with its label, which "
        "may lie between 0 and 1",
    )
    optimizer: Literal["adamw", "sgd"] = flag(default="adamw", help="optimizer of the reward model")
    lr: float = flag(default=3e-4, help="learning rate")
    momentum: float | None = flag(default=None, help="momentum of sgd (default: 0.9)")
    weight_decay: float = flag(default=1e-3, help="weight decay (decoupled with adamw)")
    max_grad_norm: float = flag(default=0.0, help="clip a step's gradient to this norm; 0 does not clip")
    scheduler: Literal["constant", "step", "cosine"] = flag(
        default="cosine", help="learning rate over time; cosine decays to 0"
    )
    scheduler_step_size: int | None = flag(
        default=None, help="scheduler step: optimizer steps between two cuts (default: 5000)"
    )
    scheduler_gamma: float | None = flag(default=None, help="scheduler step: factor of each cut (default: 0.5)")
    baseline: bool = flag(default=False, help="plain fine-tuning, every domain weighted 1: no upper level")
    domain_weights: str | None = flag(
        default=None, help="fixed weights: a run's domain_weights.json, or {domain: weight}; no upper level"
    )
    instance_weights: str | None = flag(
        default=None, help="fixed weights of single chains: the instance_weights.parquet of a run; no upper level"
    )


@dataclass(frozen=True)
class UpperConfig:
    """Upper level: learning the domain weights."""

    weights_for: WeightsFor = flag(
        default="domain",
        help="what is weighted: each domain, each instance (a chain: the steps of one answer), or both: the instances "
        "of a domain around its weight",
    )
    instance_weights_form: WeightsForm = flag(
        default="table",
        help="table: a number for each instance; net: a small network that computes it from the instance's losses, "
        "domain, label entropy and length, for sets where each is met once or twice",
    )
    instance_activation: ActivationName = flag(
        default="softplus",
        help="from an instance's number to its weight: softplus, scaled to mean 1; or as published, unscaled, with "
        "--weights_for instance: clip (from -1 to 3), relu, leaky_relu",
    )
    warmup_iterations: int = flag(
        default=0,
        help="optimizer steps of plain fine-tuning, all domains weighted 1, before the weights are learned; they count "
        "in --iteration_num",
    )
    correct_labels: CorrectLabels | None = flag(
        default=None,
        help="move each step's label too: interval, within the confidence interval of its Monte Carlo rollouts; "
        "published, anywhere from 0 to 1 (default: labels stay as they are)",
    )
    label_times: float | None = flag(
        default=None, help="correct_labels interval: rollouts behind the labels whose rows have no `times`"
    )
    label_lr: float = flag(default=0.01, help="correct_labels: learning rate of the labels (--meta_optimizer adamw)")
    unroll_steps: int = flag(default=20, help="optimizer steps between two updates of the weights (a window)")
    meta_batch_size: int | None = flag(
        default=None,
        help="meta answers in an update, about: a question stays whole (default: a seventh of the different ones, from "
        "2 to 64)",
    )
    meta_optimizer: Literal["calm", "adamw"] = flag(
        default="calm",
        help="how the raw weights follow the hypergradients: calm sets them by how steadily all windows agree, and "
        "draws them to equal ones where that may be chance; adamw adds a step each window, as published",
    )
    meta_lr: float = flag(default=0.2, help="meta_optimizer adamw: learning rate of the raw weights")
    meta_weight_decay: float = flag(default=0.0, help="meta_optimizer adamw: decoupled pull towards equal weights")
    meta_range: float = flag(default=3.0, help="meta_optimizer calm: the largest raw weight, positive or negative")
    min_weight: float = flag(default=0.0, help="lowest domain weight, of mean 1")
    max_weight: float | None = flag(default=None, help="highest domain weight, of mean 1 (default: no bound)")
    aggregation_function: AggregationName = flag(
        default="mean_logit", help="how the step logits of an answer become one number"
    )
    center_meta_scores: bool = flag(
        default=True,
        help="compare meta answers with each other, those to one question first; --no_center_meta_scores: take them "
        "as they are",
    )
    hypergradient: HypergradientName = flag(
        default="auto",
        help="unrolled keeps one gradient a micro-batch; jvp and finite_difference keep none; auto takes unrolled "
        "where that fits into memory; darts is Betty's own",
    )


@dataclass(frozen=True)
class RunConfig:
    """The run."""

    seed: int = flag(default=1, help="seed of the data order, the score head and dropout")
    device: str | None = flag(default=None, help="cuda, cuda:1, mps, cpu, … (default: the best available)")
    shard: bool = flag(
        default=False, help="split the parameters over the processes, for models that do not fit one GPU"
    )
    distributed_timeout: float = flag(
        default=30.0,
        help="minutes that one of several processes waits for the others before the run ends; more than process 0 "
        "needs to write a checkpoint, or to read the data, while the others wait",
    )
    precision: Literal["fp32", "bf16"] | None = flag(
        default=None, help="precision of the compute (default: bf16 on cuda, else fp32)"
    )
    save_every_iterations: int = flag(default=200, help="optimizer steps between two checkpoints")
    keep_checkpoints: int = flag(default=2, help="newest checkpoints to keep, besides the best one")
    resume: bool = flag(
        default=False, help="resume from the newest undamaged checkpoint in --weights_path, if there is one"
    )
    resume_from: str | None = flag(default=None, help="resume from this checkpoint, or from the newest of this run")
    allow_changed_settings: bool = flag(
        default=False, help="resume although settings or data have changed; each change is printed"
    )
    max_skipped_steps: int = flag(default=0, help="steps that may be skipped because a loss or gradient is not finite")
    dry_run: bool = flag(
        default=False, help="check everything, train one window, and print what the whole run would take"
    )


@dataclass(frozen=True)
class TrainingConfig(CommandConfig):
    """All settings of a training run, by group."""

    summary: ClassVar[str] = "Learn domain weights and a process reward model from step-labelled rows and a meta set."

    data: DataConfig
    reading: ReadingConfig
    model: ModelConfig
    lower: LowerConfig
    upper: UpperConfig
    run: RunConfig

    @property
    def learns_weights(self) -> bool:
        """Whether the run has an upper level."""
        fixed = (self.lower.domain_weights, self.lower.instance_weights)
        return not self.lower.baseline and fixed == (None, None)

    @property
    def weighs_instances(self) -> bool:
        """Whether single chains get weights."""
        return self.learns_weights and self.upper.weights_for != "domain"

    @property
    def corrects_labels(self) -> bool:
        """Whether labels are moved."""
        return self.learns_weights and self.upper.correct_labels is not None

    @property
    def weighs_domains(self) -> bool:
        """Whether domains get weights."""
        return self.learns_weights and self.upper.weights_for != "instance"

    def with_changes(self, **changes: Any) -> "TrainingConfig":
        """Return a copy in which some flags have other values, whatever groups they belong to."""
        return TrainingConfig.from_flags(self.flags() | changes)

    @classmethod
    def parse(cls, argv: Sequence[str]) -> "TrainingConfig":
        """Read the flags from the command line, and from the recipe file that it names.

        Args:
            argv: the command line without the program's name.

        Returns:
            The settings, with those filled in that follow from others.

        Raises:
            UserError: for values that make no sense or contradict each other.
            SystemExit: with code 2, from argparse, for unknown flags and choices.
        """
        flags, given = parse_groups(
            GROUPS,
            argv,
            description=cls.summary,
            inherited=lambda flags: flags_of_saved(flags["reward_model"], flags["train"]),
        )
        config = cls.from_flags(with_defaults(flags))
        check_training_config(config, given)
        return config


GROUPS = tuple(groups_of(TrainingConfig).values())


def flag_defaults() -> dict[str, Any]:
    """Return {flag: its default} of the flags that have one."""
    return {
        field.name: field.default
        for group in GROUPS
        for field in dataclasses.fields(group)
        if field.default is not MISSING
    }
