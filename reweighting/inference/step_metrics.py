"""Step scores against step labels: per domain and over all, with thresholds that come from other questions."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from reweighting.data.chains import Chain, split_prompt, training_chains
from reweighting.data.schema import EvaluationRow
from reweighting.errors import UserError
from reweighting.inference.metrics import (
    auc,
    average_precision,
    best_f1_threshold,
    best_process_bench_threshold,
    expected_calibration_error,
    f1,
    process_bench,
)
from reweighting.modeling.reward_model import ProcessRewardModel


@dataclass(frozen=True)
class ScoredChain:
    """The labeled steps of a chain: `scores`, `accuracies` and whether they are `right`, one each; and its domain."""

    domain: str
    scores: list[float]
    accuracies: list[float]
    right: list[bool]

    @property
    def first_wrong(self) -> int:
        """The first labeled step that is not right, -1 if all are."""
        return self.right.index(False) if False in self.right else -1


def split(rows: Sequence[EvaluationRow]) -> tuple[list[EvaluationRow], list[EvaluationRow]]:
    """A third of the questions, and the others. It depends on domain, question and image only, not on the order."""
    parts: tuple[list, list] = [], []
    for row in rows:
        key = "\n".join((row.dataset, split_prompt(row.input, [row.add])[0], str(row.image_path)))
        parts[hashlib.sha256(key.encode()).digest()[0] % 3 > 0].append(row)
    return parts


def score_rows(
    model: ProcessRewardModel, rows: Sequence[EvaluationRow], threshold: float, batch_size: int, source: str
) -> list[ScoredChain]:
    """Merge the rows into chains and score them.

    threshold: a step whose row has no `correct` is right if its accuracy is above this. source: the file, for error
    messages. Raises UserError as `ProcessRewardModel.chain_logits` does.
    """
    chains, domains = training_chains(rows, source)
    model.check(chains)
    logits, _ = model.chain_logits(chains, batch_size)
    right, accuracies = correct_steps(chains, rows, threshold), {row.index: row.accuracy for row in rows}
    return [
        ScoredChain(
            domains[chain.domain], [z[step] for step in labeled_steps(chain)], [accuracies[i] for i in chain.rows], own
        )
        for chain, z, own in zip(chains, logits.double().sigmoid().tolist(), right, strict=True)
    ]


def correct_steps(chains: Sequence[Chain], rows: Sequence[EvaluationRow], threshold: float) -> list[list[bool]]:
    """For each chain of these rows, whether its labeled steps are right."""
    right = {row.index: row.accuracy > threshold if row.correct is None else row.correct for row in rows}
    return [[right[index] for index in chain.rows] for chain in chains]


def check_labels(rows: Sequence[EvaluationRow], threshold: float, source: str) -> None:
    """Raise UserError if no thresholds can be chosen on these rows, whatever their scores: one kind is missing."""
    right = correct_steps(training_chains(rows)[0], rows, threshold)
    steps = [one for own in right for one in own]
    if all(steps) or not any(steps):
        kind = "right" if any(steps) else "wrong"
        raise UserError(f"{source}: all {len(steps)} steps to choose thresholds on are {kind}; both kinds are needed.")
    if len({all(own) for own in right}) == 1:
        raise UserError(f"{source}: thresholds need answers with and without a wrong step; one kind is missing.")


def labeled_steps(chain: Chain) -> list[int]:
    """The steps of a training chain that a row labels, in order."""
    return [step for step, target in enumerate(chain.targets) if not math.isnan(target)]


def choose_thresholds(dev: Sequence[ScoredChain]) -> dict[str, float]:
    """The thresholds of the best `f1` and `process_bench`, on chains that `check_labels` lets pass."""
    scores, right = _steps(dev)
    first = [chain.first_wrong for chain in dev]
    chains = [chain.scores for chain in dev]
    return {"f1": best_f1_threshold(scores, right), "process_bench": best_process_bench_threshold(chains, first)}


def evaluate_domains(chains: Sequence[ScoredChain], thresholds: dict[str, float]) -> dict[str, dict]:
    """The numbers of `evaluate` over all chains ("all") and for each domain."""
    domains = sorted({chain.domain for chain in chains})
    parts = {name: [chain for chain in chains if chain.domain == name] for name in domains}
    return {"all": evaluate(chains, thresholds)} | {name: evaluate(part, thresholds) for name, part in parts.items()}


def evaluate(chains: Sequence[ScoredChain], thresholds: dict[str, float]) -> dict:
    """How well the scores tell right steps from wrong ones; NaN where one kind is missing.

    `right` is their share, which is also what `average_precision` is by chance. `calibration_error` compares scores
    with accuracies, which they estimate.
    """
    scores, right = _steps(chains)
    return {
        "chains": len(chains),
        "steps": len(scores),
        "right": float(right.mean()),
        "auc": auc(scores, right),
        "average_precision": average_precision(scores, right),
        "f1": f1(scores, right, thresholds["f1"]),
        "process_bench": process_bench(
            [chain.scores for chain in chains], [chain.first_wrong for chain in chains], thresholds["process_bench"]
        ),
        "calibration_error": expected_calibration_error(scores, [a for chain in chains for a in chain.accuracies]),
    }


def _steps(chains: Sequence[ScoredChain]) -> tuple[np.ndarray, np.ndarray]:
    """Scores and rightness of all labeled steps."""
    scores = np.array([score for chain in chains for score in chain.scores])
    return scores, np.array([right for chain in chains for right in chain.right], bool)


def table(results: dict[str, dict]) -> str:
    """The results as lines of text, a domain a row; `–` where a number is not defined."""
    names = ("steps", "right", "AUC", "av. prec.", "F1", "PB error", "PB correct", "PB F1", "calib. error")
    width = max(map(len, results))
    lines = [" " * (width + 2) + "".join(f"{name:>13}" for name in names)]
    for domain, found in results.items():
        bench = found["process_bench"]
        values = [found[name] for name in ("right", "auc", "average_precision", "f1")]
        values += [bench["error"], bench["correct"], bench["f1"], found["calibration_error"]]
        shown = ["–" if math.isnan(value) else f"{value:.3f}" for value in values]
        lines.append(f"  {domain:<{width}}" + "".join(f"{cell:>13}" for cell in (found["steps"], *shown)))
    return "\n".join(lines)
