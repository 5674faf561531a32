"""Step scores against step labels: per domain and over all, with thresholds that come from other questions."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from reweighting.data.chains import Chain
from reweighting.data.load_chains import LabelledChain
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
        positions: the place of each labeled step in its answer, from 0.
        accuracies: the Monte Carlo accuracies that the scores estimate, one for each labeled step.
        correct: whether each labeled step is correct.
    """

    domain: str
    scores: list[float]
    positions: list[int]
    accuracies: list[float]
    correct: list[bool]

    @property
    def first_incorrect(self) -> int:
        """The first labeled step that is not correct, -1 if all are."""
        return self.correct.index(False) if False in self.correct else -1


def split_dev(chains: Sequence[LabelledChain]) -> tuple[list[LabelledChain], list[LabelledChain]]:
    """Split off about a third of the questions, to choose thresholds on.

    A question's part depends on its domain, text and image names only, not on the order of the chains.

    Returns:
        The chains of that third, and the others.
    """
    dev: list[LabelledChain] = []
    rest: list[LabelledChain] = []
    for labelled in chains:
        part = dev if hashlib.sha256(labelled.key.encode()).digest()[0] % 3 == 0 else rest
        part.append(labelled)
    return dev, rest


def score_chains(model: ProcessRewardModel, chains: Sequence[LabelledChain], batch_size: int) -> list[ScoredChain]:
    """Score the labelled steps of chains.

    Args:
        model: the reward model; the caller sets autocast.
        chains: the chains.
        batch_size: chains in a forward pass.

    Raises:
        UserError: as `ProcessRewardModel.chain_logits` does.
    """
    logits, _ = model.chain_logits([labelled.chain for labelled in chains], batch_size)  # [chains, S]
    scores = logits.double().sigmoid().tolist()
    return [
        ScoredChain(
            labelled.domain,
            [own[step] for step in labeled_steps(labelled.chain)],
            labeled_steps(labelled.chain),
            labelled.accuracies,
            labelled.correct,
        )
        for labelled, own in zip(chains, scores, strict=True)
    ]


def check_labels(chains: Sequence[LabelledChain], source: str) -> str | None:
    """Check that thresholds can be chosen on these chains, before anything is scored.

    Returns:
        Why there will be no measure of ProcessBench, if one kind of chain is missing.

    Raises:
        UserError: if one kind of step is missing; it names `source`.
    """
    steps = [one for labelled in chains for one in labelled.correct]
    if all(steps) or not any(steps):
        kind = "correct" if any(steps) else "incorrect"
        raise UserError(f"{source}: all {len(steps)} steps to choose thresholds on are {kind}; both kinds are needed.")
    if len({all(labelled.correct) for labelled in chains}) == 1:
        return (f"{source}: ProcessBench's measure needs answers with and without an incorrect step to choose its "
                "threshold on; one kind is missing, so it is left out")  # fmt: skip
    return None


def labeled_steps(chain: Chain) -> list[int]:
    """Return the steps of a training chain that a row labels, in order."""
    return [step for step, target in enumerate(chain.targets) if not math.isnan(target)]


def choose_thresholds(dev: Sequence[ScoredChain]) -> dict[str, float]:
    """Choose the thresholds of the best `f1` and `process_bench` on chains that `check_labels` accepts.

    That of `process_bench` is NaN where `check_labels` says that there is none.
    """
    scores, correct = _steps(dev)
    first = [chain.first_incorrect for chain in dev]
    chains = [chain.scores for chain in dev]
    both = len({place < 0 for place in first}) == 2
    return {
        "f1": best_f1_threshold(scores, correct),
        "process_bench": best_process_bench_threshold(chains, first) if both else math.nan,
    }


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
        `average_precision` of chance; `auc`; `position_auc`: that of a score that knows only the number of the step
        and falls from step to step, which labels of the first error alone reward; `average_precision`, `f1`,
        `process_bench`; `calibration_error`, which compares scores with accuracies.
    """
    scores, correct = _steps(chains)
    positions = np.array([position for chain in chains for position in chain.positions])
    return {
        "chains": len(chains),
        "steps": len(scores),
        "positive_rate": float(correct.mean()),
        "auc": auc(scores, correct),
        "position_auc": auc(-positions, correct),
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
    table = new_table(
        "step scores against labels (by position: the AUC of the step's number alone; PB: ProcessBench, finding the "
        "first incorrect step)"
    )
    table.add_column("domain", overflow="fold")
    for name in (
        "steps",
        "correct",
        "AUC",
        "by position",
        "avg. precision",
        "F1",
        "PB error",
        "PB correct",
        "PB F1",
        "calib. error",
    ):
        table.add_column(name, justify="right")
    table.add_row("all domains", *_cells(results["all"]))
    table.add_section()
    for domain, found in results["domains"].items():
        table.add_row(printable(domain, one_line=True), *_cells(found))
    return table


def _cells(found: dict) -> list[str]:
    """The numbers of a row of the table."""
    bench = found["process_bench"]
    values = [found[name] for name in ("positive_rate", "auc", "position_auc", "average_precision", "f1")]
    values += [bench["error"], bench["correct"], bench["f1"], found["calibration_error"]]
    return [str(found["steps"]), *("–" if math.isnan(value) else f"{value:.3f}" for value in values)]


def _steps(chains: Sequence[ScoredChain]) -> tuple[np.ndarray, np.ndarray]:
    """Scores, and whether it is correct, of each labeled step."""
    scores = np.array([score for chain in chains for score in chain.scores])
    return scores, np.array([correct for chain in chains for correct in chain.correct], bool)
