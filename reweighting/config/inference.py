"""The flags of the commands that use a trained reward model: best_of_n.py, evaluate.py and show.py.

    config = BestOfNConfig.parse(sys.argv[1:])
    config.scoring.batch_size, config.candidates.aggregation_function

To add a flag, add a field to a group: the parser, `--help` and the command-line reference follow from it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from reweighting.config.parsing import CommandConfig, flag
from reweighting.config.reading import FILES, ReadingConfig
from reweighting.errors import UserError
from reweighting.modeling.config import AggregationName


@dataclass(frozen=True)
class ScoringConfig:
    """Using the reward model: best_of_n.py, evaluate.py and show.py."""

    weights_path: str = flag(default="weights", help="folder that a training run wrote, or the `prm` in it")
    backbone: str | None = flag(
        default=None,
        help="where the base of a model with adapters or of a score head is now, if it has moved (default: where it "
        "was in training)",
    )
    image_root: str | None = flag(
        default=None,
        help="folder that image paths start from and may not leave (default: the JSON file's, then the working one)",
    )
    batch_size: int = flag(
        default=32, help="chains in a forward pass; changes scores by rounding only (about 1e-6, with bf16 1e-3)"
    )
    device: str | None = flag(default=None, help="cuda, cuda:1, mps, cpu, … (default: the best that is there)")
    precision: Literal["fp32", "bf16"] | None = flag(
        default=None, help="precision of the compute (default: bf16 on cuda, else fp32)"
    )
    allow_changed_base: bool = flag(
        default=False, help="use the base of an adapter model although its weights are not those it was trained on"
    )

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"--batch_size: found {self.batch_size}, allowed: a number of at least 1")


@dataclass(frozen=True)
class CandidateConfig:
    """Candidates: best_of_n.py and show.py."""

    candidates_json_file: list[str] = flag(help=f"questions with several answers: {FILES}")
    aggregation_function: AggregationName | None = flag(
        default=None, help="how a candidate's steps become one number (default: as the model was trained)"
    )


@dataclass(frozen=True)
class SelectionsConfig:
    """best_of_n.py."""

    output: str = flag(
        default="selections.json", help="the choices; an interrupted file is resumed (.jsonl: a row a line)"
    )
    drop_too_long: bool = flag(
        default=False,
        help="leave out questions of which an answer is longer than the model takes, and print how many; else they are "
        "an error",
    )

    def __post_init__(self) -> None:
        _check_output(self.output)


@dataclass(frozen=True)
class EvaluationConfig:
    """evaluate.py."""

    eval_json_file: list[str] = flag(
        help=f"answers with step labels; in rows as for training, `correct` (true, false) is the label: {FILES}"
    )
    dev_json_file: list[str] | None = flag(
        default=None, help="the same, to choose thresholds on (default: a third of the questions is split off)"
    )
    threshold: float = flag(
        default=0.0, help="a step without `correct` counts as correct if its accuracy is above this"
    )
    drop_too_long: bool = flag(
        default=False,
        help="leave out answers that are longer than the model takes, and print how many; else they are an error",
    )
    output: str = flag(default="evaluation", help="folder for evaluation.json and reliability.png")

    def __post_init__(self) -> None:
        _check_output(self.output)
        if not 0 <= self.threshold < 1:
            raise UserError(f"--threshold: found {self.threshold}, allowed: a number from 0 to below 1")


@dataclass(frozen=True)
class PageConfig:
    """show.py."""

    id: str = flag(help="the `id` of the row to show")
    output: str = flag(default="answer.html", help="the HTML page; an earlier page is replaced, no other file")

    def __post_init__(self) -> None:
        _check_output(self.output)


GROUPS = (ScoringConfig, CandidateConfig, SelectionsConfig, EvaluationConfig, PageConfig)


@dataclass(frozen=True)
class BestOfNConfig(CommandConfig):
    """All flags of best_of_n.py."""

    summary: ClassVar[str] = "Choose the best of N candidate answers to each question, and report how well that works."

    candidates: CandidateConfig
    selections: SelectionsConfig
    reading: ReadingConfig
    scoring: ScoringConfig


@dataclass(frozen=True)
class EvaluateConfig(CommandConfig):
    """All flags of evaluate.py."""

    summary: ClassVar[str] = "Evaluate a reward model step by step, on rows with step labels."

    evaluation: EvaluationConfig
    reading: ReadingConfig
    scoring: ScoringConfig


@dataclass(frozen=True)
class ShowConfig(CommandConfig):
    """All flags of show.py."""

    summary: ClassVar[str] = (
        "Look at one question: its candidates, their steps coloured by score, and the choice, as one HTML page."
    )

    candidates: CandidateConfig
    page: PageConfig
    reading: ReadingConfig
    scoring: ScoringConfig


def _check_output(value: str) -> None:
    """Raise UserError for an output that has no name of its own."""
    if Path(value.strip()).name in ("", ".."):
        raise UserError(f"--output: found {value!r}, allowed: a path that ends in a name, not in `.`, `..` or `/`")
