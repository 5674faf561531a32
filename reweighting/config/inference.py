"""The flags of the commands that use a trained reward model: best_of_n.py, evaluate.py and show.py."""

from argparse import ArgumentDefaultsHelpFormatter, Namespace
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from reweighting.errors import UserError
from reweighting.modeling.aggregation import AGGREGATIONS


@dataclass
class ScoringArguments:
    """Using the reward model: best_of_n.py, evaluate.py and show.py."""

    weights_path: str = HfArg(default="weights", help="folder that a training run wrote, or the `prm` in it")
    image_root: str | None = HfArg(
        default=None,
        help="folder that image paths start from and may not leave (default: the JSON file's, then the working one)",
    )
    batch_size: int = HfArg(default=32, help="chains in a forward pass; changes no score")
    device: str | None = HfArg(default=None, help="cuda, cuda:1, mps, cpu, … (default: the best that is there)")
    precision: str | None = HfArg(default=None, help="of the compute: bf16 or fp32 (default: bf16 on cuda, else fp32)")


@dataclass
class CandidateArguments:
    """Candidates: best_of_n.py and show.py."""

    candidates_json_file: str = HfArg(
        help="candidate rows: a JSON file (or .jsonl, .parquet); see the README for its fields"
    )
    aggregation_function: str | None = HfArg(
        default=None, help="how steps become one number, as in training (default: as the model was trained)"
    )


@dataclass
class BestOfNArguments:
    """best_of_n.py."""

    output: str = HfArg(default="selections.json", help="the choices; continued if it is there (.jsonl: a row a line)")


@dataclass
class EvaluateArguments:
    """evaluate.py."""

    eval_json_file: str = HfArg(help="rows as for training; `correct` (true, false), where given, is the label")
    dev_json_file: str | None = HfArg(
        default=None, help="rows to choose thresholds on (default: a third of the questions is split off)"
    )
    threshold: float = HfArg(default=0.0, help="a step without `correct` is right if its accuracy is above this")
    output: str = HfArg(default="evaluation", help="folder for evaluation.json and reliability.png")


@dataclass
class ShowArguments:
    """show.py."""

    id: str = HfArg(help="the `id` of the row to show")
    output: str = HfArg(default="answer.html", help="the page")


BEST_OF_N = (CandidateArguments, BestOfNArguments, ScoringArguments)
EVALUATE = (EvaluateArguments, ScoringArguments)
SHOW = (CandidateArguments, ShowArguments, ScoringArguments)
GROUPS = (ScoringArguments, CandidateArguments, BestOfNArguments, EvaluateArguments, ShowArguments)


def parse_inference_arguments(command: str, description: str, groups: Sequence[type], argv: Sequence[str]) -> Namespace:
    """A command's flags. Raises UserError for values that make no sense; argparse exits with 2 for others."""
    parser = HfArgumentParser(groups, prog=command, description=description.split("\n")[0], allow_abbrev=False,
                              formatter_class=ArgumentDefaultsHelpFormatter)  # fmt: skip
    args = parser.parse_args(argv)
    choices = {"precision": ("fp32", "bf16"), "aggregation_function": tuple(AGGREGATIONS)}
    for name, allowed in choices.items():
        if getattr(args, name, None) not in (None, *allowed):
            raise UserError(f"--{name}: found {getattr(args, name)}, allowed: {', '.join(allowed)}")
    if args.batch_size < 1:
        raise UserError(f"--batch_size: found {args.batch_size}, allowed: a number of at least 1")
    if not 0 <= getattr(args, "threshold", 0) < 1:
        raise UserError(f"--threshold: found {args.threshold}, allowed: a number from 0 to below 1")
    return args
