"""Step scores against step labels: per domain and over all, with thresholds that come from other questions."""

import hashlib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from reweighting.data.chains import Chain, step_warnings, training_chains
from reweighting.data.schema import EvaluationRow
from reweighting.data.steps import split_prompt
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
from reweighting.tables import new_table
from reweighting.terminal import printable


@dataclass(frozen=True)
class ScoredChain:
    """The labeled steps of a chain and their scores.

    Attributes:
        domain: the name of its domain.
        scores: one for each labeled step, in (0, 1).
        accuracies: the Monte Carlo accuracies that the scores estimate, one for each labeled step.
        correct: whether each labeled step is correct.
    """

    domain: str
    scores: list[float]
    accuracies: list[float]
    correct: list[bool]

    @property
    def first_incorrect(self) -> int:
        """The first labeled step that is not correct, -1 if all are."""
        return self.correct.index(False) if False in self.correct else -1


def split_dev(rows: Sequence[EvaluationRow]) -> tuple[list[EvaluationRow], list[EvaluationRow]]:
    """Split off about a third of the questions, to choose thresholds on.

    A question's part depends on its domain, text and image path only, not on the order of the rows.

    Returns:
        The rows of that third, and the others.
    """
    dev: list[EvaluationRow] = []
    rest: list[EvaluationRow] = []
    for row in rows:
        key = "\n".join((row.dataset, split_prompt(row.input, [row.add])[0], str(row.image_path)))
        part = dev if hashlib.sha256(key.encode()).digest()[0] % 3 == 0 else rest
        part.append(row)
    return dev, rest


def score_rows(
    model: ProcessRewardModel, rows: Sequence[EvaluationRow], threshold: float, batch_size: int, source: str
) -> list[ScoredChain]:
    """Merge the rows into chains and score them; warn on stderr of chains that are oddly cut into steps.

    Args:
        model: the reward model; the caller sets autocast.
        rows: the step rows.
        threshold: a step whose row has no `correct` is correct if its accuracy is above this.
        batch_size: chains in a forward pass.
        source: the file, for error messages.

    Raises:
        UserError: as `ProcessRewardModel.chain_logits` does.
    """
    chains, domains = training_chains(rows, source)
    for line in step_warnings(chains, source):
        print(f"warning: {printable(line)}", file=sys.stderr)
    model.check(chains)
    logits, _ = model.chain_logits(chains, batch_size)  # [chains, S]
    correct, accuracies = correct_steps(chains, rows, threshold), {row.index: row.accuracy for row in rows}
    return [
        ScoredChain(
            domains[chain.domain],
            [scores[step] for step in labeled_steps(chain)],
            [accuracies[index] for index in chain.rows],
            own,
        )
        for chain, scores, own in zip(chains, logits.double().sigmoid().tolist(), correct, strict=True)
    ]


def correct_steps(chains: Sequence[Chain], rows: Sequence[EvaluationRow], threshold: float) -> list[list[bool]]:
    """Return for each chain of these rows whether its labeled steps are correct."""
    correct = {row.index: row.accuracy > threshold if row.correct is None else row.correct for row in rows}
    return [[correct[index] for index in chain.rows] for chain in chains]


def check_labels(rows: Sequence[EvaluationRow], threshold: float, source: str) -> None:
    """Check that thresholds can be chosen on these rows, before anything is scored.

    Raises:
        UserError: if one kind of step or chain is missing; it names `source`.
    """
    correct = correct_steps(training_chains(rows)[0], rows, threshold)
    steps = [one for own in correct for one in own]
    if all(steps) or not any(steps):
        kind = "correct" if any(steps) else "incorrect"
        raise UserError(f"{source}: all {len(steps)} steps to choose thresholds on are {kind}; both kinds are needed.")
    if len({all(own) for own in correct}) == 1:
        raise UserError(f"{source}: thresholds need answers with and without an incorrect step; one kind is missing.")


def labeled_steps(chain: Chain) -> list[int]:
    """Return the steps of a training chain that a row labels, in order."""
    return [step for step, target in enumerate(chain.targets) if not math.isnan(target)]


def choose_thresholds(dev: Sequence[ScoredChain]) -> dict[str, float]:
    """Choose the thresholds of the best `f1` and `process_bench` on chains that `check_labels` accepts."""
    scores, correct = _steps(dev)
    first = [chain.first_incorrect for chain in dev]
    chains = [chain.scores for chain in dev]
    return {"f1": best_f1_threshold(scores, correct), "process_bench": best_process_bench_threshold(chains, first)}


def evaluate_domains(chains: Sequence[ScoredChain], thresholds: dict[str, float]) -> dict[str, dict]:
    """Compute the measures of `evaluate`.

    Returns:
        `all`: over all chains; `domains`: for each domain, by name, whatever the name is.
    """
    names = sorted({chain.domain for chain in chains})
    parts = {name: [chain for chain in chains if chain.domain == name] for name in names}
    return {
        "all": evaluate(chains, thresholds),
        "domains": {name: evaluate(part, thresholds) for name, part in parts.items()},
    }


def evaluate(chains: Sequence[ScoredChain], thresholds: dict[str, float]) -> dict:
    """Measure how well the scores tell correct steps from incorrect ones; NaN where one kind is missing.

    Returns:
        `chains`, `steps`; `positive_rate`: the share of correct steps, which is also the
        `average_precision` of chance; `auc`, `average_precision`, `f1`, `process_bench`; `calibration_error`, which
        compares scores with accuracies.
    """
    scores, correct = _steps(chains)
    return {
        "chains": len(chains),
        "steps": len(scores),
        "positive_rate": float(correct.mean()),
        "auc": auc(scores, correct),
        "average_precision": average_precision(scores, correct),
        "f1": f1(scores, correct, thresholds["f1"]),
        "process_bench": process_bench(
            [chain.scores for chain in chains],
            [chain.first_incorrect for chain in chains],
            thresholds["process_bench"],
        ),
        "calibration_error": expected_calibration_error(scores, [a for chain in chains for a in chain.accuracies]),
    }


def results_table(results: dict[str, dict]) -> Table:
    """Make a table of what `evaluate_domains` found: all first, then a domain a row; `–` where nothing is defined."""
    table = new_table("step scores against labels (PB: ProcessBench, finding the first incorrect step)")
    table.add_column("domain", overflow="fold")
    for name in ("steps", "correct", "AUC", "avg. precision", "F1", "PB error", "PB correct", "PB F1", "calib. error"):
        table.add_column(name, justify="right")
    table.add_row("all domains", *_cells(results["all"]))
    table.add_section()
    for domain, found in results["domains"].items():
        table.add_row(printable(domain, one_line=True), *_cells(found))
    return table


def _cells(found: dict) -> list[str]:
    """The numbers of a row of the table."""
    bench = found["process_bench"]
    values = [found[name] for name in ("positive_rate", "auc", "average_precision", "f1")]
    values += [bench["error"], bench["correct"], bench["f1"], found["calibration_error"]]
    return [str(found["steps"]), *("–" if math.isnan(value) else f"{value:.3f}" for value in values)]


def _steps(chains: Sequence[ScoredChain]) -> tuple[np.ndarray, np.ndarray]:
    """Scores, and whether it is correct, of each labeled step."""
    scores = np.array([score for chain in chains for score in chain.scores])
    return scores, np.array([correct for chain in chains for correct in chain.correct], bool)
