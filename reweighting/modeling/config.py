"""How a reward model is built and what of it is trained: the settings that `prm_config.json` remembers.

    train         trained                                       saved
    backbone      every weight that is not frozen (float32)     the whole backbone
    lora, dora    adapters on the language model                the adapters; the base is loaded from where it was
    head          nothing of the backbone                       the score head; the base is loaded from where it was

LoRA is arXiv 2106.09685, DoRA arXiv 2402.09353. The score head is trained in each of them, unless it is `token`.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, get_args

from reweighting.errors import UserError

CONFIG_FILE = "prm_config.json"
TrainMode = Literal["full", "lora", "dora", "head"]
TRAIN_MODES = get_args(TrainMode)
ADAPTERS = ("lora", "dora")
DEFAULT_RANK, DEFAULT_ALPHA = 16, 32.0
ScoreHead = Literal["linear", "token", "linear_from_token"]
SCORE_HEADS = get_args(ScoreHead)
ANSWER_TOKENS = ("+", "-")  # as VisualPRM (arXiv 2503.10291) and DreamPRM-1.5 (arXiv 2509.05542) have them


@dataclass(frozen=True)
class PRMConfig:
    """What `prm_config.json` holds, beyond the backbone's own config.

    backbone:       hub name or folder the training started from; what is not saved is loaded from there.
    train:          what is trained, one of TRAIN_MODES.
    aggregation:    how `rank` turns step logits into one number, a name of `aggregation.AGGREGATIONS`.
    lora_rank:      of the adapters; 0 without adapters.
    lora_alpha:     the adapters' scale is lora_alpha / lora_rank; None without adapters.
    freeze_vision:  the vision tower is not trained; it never is but with `backbone`.
    freeze_projector: nor is the projector between tower and language model. None: as the tower.
    load_in_4bit:      the language model's linear layers are in 4-bit NormalFloat (QLoRA, arXiv 2305.14314).
    dtype:          of a frozen base; what is trained is always float32.
    score_head:     one of SCORE_HEADS, see `score_head.py`; correct_token and incorrect_token: the answers that it
                    starts from, None with `linear`.
    max_length:     tokens of the longest chain; None: what the backbone takes.
    max_image_side: larger images are shrunk to this many pixels; None: never.
    """

    backbone: str
    train: str = "full"
    aggregation: str = "mean_logit"
    lora_rank: int = 0
    lora_alpha: float | None = None
    freeze_vision: bool = False
    freeze_projector: bool | None = None
    load_in_4bit: bool = False
    dtype: str = "float32"
    score_head: str = "linear"
    correct_token: str | None = None
    incorrect_token: str | None = None
    max_length: int | None = None
    max_image_side: int | None = None

    @property
    def adapted(self) -> bool:
        """Whether the language model has adapters."""
        return self.train in ADAPTERS

    @property
    def trains_vision(self) -> bool:
        """Whether the vision tower is trained."""
        return self.train == "full" and not self.freeze_vision

    @property
    def trains_projector(self) -> bool:
        """Whether the projector between vision tower and language model is trained."""
        return self.trains_vision if self.freeze_projector is None else not self.freeze_projector

    def save(self, folder: Path) -> None:
        """Write it into `folder`."""
        (folder / CONFIG_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "PRMConfig":
        """What `save` wrote, by this version or another: unknown keys are left out. Raises UserError."""
        path = folder / CONFIG_FILE
        if not path.is_file():
            raise UserError(f"{folder} holds no reward model: it has no {CONFIG_FILE}. Name a folder a run saved.")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            known = {field.name for field in fields(cls)}
            config = cls(**with_defaults({key: value for key, value in values.items() if key in known}))
            check_settings(config)
            return config
        except (ValueError, TypeError, AttributeError, UserError) as error:
            raise UserError(f"{path} is damaged: {error}") from error


def with_defaults(settings: dict) -> dict:
    """The settings with those filled in that follow from others: a rank alone means LoRA, adapters without a rank or
    a scale get them, and a head that reads answers gets their tokens."""
    settings = dict(settings)
    if settings.get("train") is None:
        settings["train"] = "lora" if settings.get("lora_rank") else "full"
    if settings["train"] in ADAPTERS:
        settings["lora_rank"] = settings.get("lora_rank") or DEFAULT_RANK
        settings["lora_alpha"] = DEFAULT_ALPHA if settings.get("lora_alpha") is None else settings["lora_alpha"]
    if settings.get("score_head", "linear") != "linear":
        for name, token in zip(("correct_token", "incorrect_token"), ANSWER_TOKENS, strict=True):
            settings[name] = token if settings.get(name) is None else settings[name]
    return settings


def check_settings(settings) -> None:
    """Raise UserError for settings that contradict each other; `settings` has the attributes of a PRMConfig."""
    for name, allowed in (("train", TRAIN_MODES), ("score_head", SCORE_HEADS)):
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
        raise UserError("--score_head token reads the score off what the backbone says, so that with --train head "
                        "nothing is trained: use --score_head linear_from_token")  # fmt: skip
    for name in ("correct_token", "incorrect_token"):
        if score_head == "linear" and getattr(settings, name) is not None:
            raise UserError(f"--{name} does nothing with --score_head linear: use token or linear_from_token")
