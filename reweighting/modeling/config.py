"""Settings of a reward model: how it is built and what of it is trained.

    train         trained                                     saved
    full          every weight that is not frozen (float32)   the whole backbone
    lora, dora    adapters on the language model              the adapters; the base is loaded from its own place
    head          nothing of the backbone                     the score head; the base is loaded from its own place

LoRA is arXiv 2106.09685, DoRA arXiv 2402.09353. The score head is always trained, except with `score_head="token"`.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from reweighting.errors import UserError

TrainMode = Literal["full", "lora", "dora", "head"]
AggregationName = Literal["mean_logit", "sum_logit", "mean", "min", "max", "product", "last"]  # see aggregation.py
ScoreHead = Literal["linear", "mlp", "token", "linear_from_token"]
FrozenDtype = Literal["float32", "bfloat16", "float16"]
PositiveInt = Annotated[int, Field(gt=0)]

CONFIG_FILE = "prm_config.json"
TRAIN_MODES: tuple[TrainMode, ...] = get_args(TrainMode)
ADAPTERS: tuple[TrainMode, ...] = ("lora", "dora")
SCORE_HEADS: tuple[ScoreHead, ...] = get_args(ScoreHead)
TOKEN_HEADS: tuple[ScoreHead, ...] = ("token", "linear_from_token")  # that start from the logits of two answers
DEFAULT_RANK, DEFAULT_ALPHA = 16, 32.0
ANSWER_TOKENS = ("+", "-")  # as in VisualPRM (arXiv 2503.10291) and DreamPRM-1.5 (arXiv 2509.05542)


@dataclass(frozen=True)
class PRMConfig:
    """Describe how a reward model is built and what of it is trained.

    Attributes:
        backbone: hub name or folder that training started from; whatever is not saved is loaded from there.
        train: what is trained besides the score head.
        aggregation: how `rank` turns step logits into one number, a name in `aggregation.AGGREGATIONS`.
        lora_rank: rank of the adapters; 0 without adapters.
        lora_alpha: the adapters are scaled by lora_alpha / lora_rank; None without adapters.
        freeze_vision: keep the vision tower as it is; only `train="full"` can train it.
        freeze_projector: keep the projector between tower and language model as it is; None: like the tower.
        load_in_4bit: hold the language model's linear layers in 4-bit NormalFloat (QLoRA, arXiv 2305.14314).
        dtype: of a frozen base; whatever is trained is always float32.
        score_head: see `score_head.py`.
        correct_token: answer whose logit `score_head` starts from; None with `linear` and `mlp`.
        incorrect_token: answer whose logit is subtracted from it; None with `linear` and `mlp`.
        max_length: longest chain in tokens; None: what the backbone takes.
        max_image_side: larger images are shrunk to this many pixels on their longest side; None: never.
    """

    backbone: str
    train: TrainMode = "full"
    aggregation: AggregationName = "mean_logit"
    lora_rank: Annotated[int, Field(ge=0)] = 0
    lora_alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    freeze_vision: bool = False
    freeze_projector: bool | None = None
    load_in_4bit: bool = False
    dtype: FrozenDtype = "float32"
    score_head: ScoreHead = "linear"
    correct_token: str | None = None
    incorrect_token: str | None = None
    max_length: PositiveInt | None = None
    max_image_side: PositiveInt | None = None

    @property
    def adapted(self) -> bool:
        """Tell whether the language model has adapters."""
        return self.train in ADAPTERS

    @property
    def trains_vision(self) -> bool:
        """Tell whether the vision tower is trained."""
        return self.train == "full" and not self.freeze_vision

    @property
    def trains_projector(self) -> bool:
        """Tell whether the projector between vision tower and language model is trained."""
        return self.trains_vision if self.freeze_projector is None else not self.freeze_projector


def with_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """Fill in the settings that follow from others.

    Args:
        settings: some attributes of a `PRMConfig`, or a command's flags.

    Returns:
        The settings, where `train` without a value is `lora` if there is a rank and `full` otherwise, adapters have a
        rank and a scale, and a head that reads answers has their tokens.
    """
    settings = dict(settings)
    if settings.get("train") is None:
        settings["train"] = "lora" if settings.get("lora_rank") else "full"
    if settings["train"] in ADAPTERS:
        settings["lora_rank"] = settings.get("lora_rank") or DEFAULT_RANK
        settings["lora_alpha"] = DEFAULT_ALPHA if settings.get("lora_alpha") is None else settings["lora_alpha"]
    if settings.get("score_head") in TOKEN_HEADS:
        for name, token in zip(("correct_token", "incorrect_token"), ANSWER_TOKENS, strict=True):
            settings[name] = token if settings.get(name) is None else settings[name]
    return settings


def check_settings(settings: Any) -> None:
    """Check that settings do not contradict each other.

    Args:
        settings: a `PRMConfig`, or a command's flags, which have the same attributes.

    Raises:
        UserError: they do.
    """
    choices: tuple[tuple[str, tuple[str, ...]], ...] = (("train", TRAIN_MODES), ("score_head", SCORE_HEADS))
    for name, allowed in choices:
        if getattr(settings, name) not in allowed:
            raise UserError(f"--{name}: found {getattr(settings, name)}, allowed: {', '.join(allowed)}")
    train, score_head = settings.train, settings.score_head
    if settings.lora_rank and train not in ADAPTERS:
        raise UserError(f"--lora_rank does nothing with --train {train}: there are no adapters")
    if train == "head" and settings.freeze_projector is False:
        raise UserError("--train head trains nothing of the backbone: leave out --no_freeze_projector")
    if settings.load_in_4bit and train == "full":
        raise UserError("--load_in_4bit: 4-bit weights cannot be trained: use --train lora, dora or head")
    if score_head == "token" and train == "head":
        raise UserError("--score_head token has no trained weights of its own, so that with --train head nothing is "
                        "trained: use --score_head linear_from_token")  # fmt: skip
    for name in ("correct_token", "incorrect_token"):
        if score_head not in TOKEN_HEADS and getattr(settings, name) is not None:
            raise UserError(f"--{name} does nothing with --score_head {score_head}: use token or linear_from_token")
