"""Measures of step scores against labels: ranking, thresholds, the first incorrect step, calibration.

A higher score means "more probably correct". Arrays are one-dimensional; a measure is NaN where it is not defined.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from sklearn.metrics import average_precision_score, f1_score, precision_recall_curve, roc_auc_score

BINS = 10  # of the calibration


def auc(scores: ArrayLike, correct: ArrayLike) -> float:
    """Compute the probability that a correct one scores higher than an incorrect one.

    Args:
        scores: [n], floats; ties count half.
        correct: [n], bools.

    Returns:
        The area under the ROC curve in [0, 1]; NaN unless both kinds are there.
    """
    correct = np.asarray(correct, bool)
    return float(roc_auc_score(correct, scores)) if correct.any() and not correct.all() else float("nan")


def average_precision(scores: ArrayLike, correct: ArrayLike) -> float:
    """Compute the mean precision over the correct ones, taken from the highest score down.

    Args:
        scores: [n], floats; equal ones are taken together.
        correct: [n], bools.

    Returns:
        A number in [0, 1]; NaN if none is correct.
    """
    correct = np.asarray(correct, bool)
    return float(average_precision_score(correct, scores)) if correct.any() else float("nan")


def f1(scores: ArrayLike, correct: ArrayLike, threshold: float) -> float:
    """Compute F1 of calling correct what scores at least the threshold.

    Args:
        scores: [n], floats.
        correct: [n], bools.
        threshold: in the scores' unit.

    Returns:
        The harmonic mean of precision and recall in [0, 1]; NaN if none is correct.
    """
    correct = np.asarray(correct, bool)
    return float(f1_score(correct, np.asarray(scores) >= threshold)) if correct.any() else float("nan")


def best_f1_threshold(scores: ArrayLike, correct: ArrayLike) -> float:
    """Choose the threshold of the greatest F1.

    Args:
        scores: [n], floats; at least one.
        correct: [n], bools; at least one true.

    Returns:
        One of the scores; of equally good ones the highest.
    """
    precision, recall, thresholds = precision_recall_curve(np.asarray(correct, bool), scores)  # thresholds ascend
    values = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
    return float(thresholds[_last_argmax(values[:-1])])  # the last point of the curve has no threshold


def first_incorrect(scores: Sequence[float], threshold: float) -> int:
    """Return the index of the first step that scores below the threshold, -1 if none does."""
    return next((step for step, score in enumerate(scores) if score < threshold), -1)


def process_bench(chains: Sequence[Sequence[float]], first: Sequence[int], threshold: float) -> dict[str, float]:
    """Compute ProcessBench's measure (Zheng et al. 2024, arXiv 2412.06559) of finding the first incorrect step.

    Args:
        chains: the step scores of each chain.
        first: the index of each chain's first incorrect step, -1 where all are correct.
        threshold: a step that scores below it is called incorrect; NaN: there is none, and no measure.

    Returns:
        `error`: the share of chains with an incorrect step in which exactly the first one is found; `correct`: the
        share of the others in which none is found; `f1`: their harmonic mean. NaN where there are no such chains.
    """
    if np.isnan(threshold):
        return dict.fromkeys(("error", "correct", "f1"), float("nan"))
    starts = np.asarray(first)
    found = np.array([first_incorrect(scores, threshold) for scores in chains]) == starts
    error, correct = (
        float(part.mean()) if len(part) else float("nan") for part in (found[starts >= 0], found[starts < 0])
    )
    total = error + correct
    return {"error": error, "correct": correct, "f1": 2 * error * correct / total if total else 0.0}


def best_process_bench_threshold(chains: Sequence[Sequence[float]], first: Sequence[int]) -> float:
    """Choose the threshold of the greatest `process_bench` F1; takes time n log n in the steps.

    Args:
        chains: the step scores of each chain.
        first: the index of each chain's first incorrect step, -1 where all are correct.

    Returns:
        One of the scores, or 2.0 (every step is called incorrect); of equally good ones the highest.

    Raises:
        ValueError: unless both kinds of chain are there.
    """
    # A chain is judged as it is by thresholds above `low` up to `high`: no step before the first incorrect one scores
    # below them, and the incorrect one does.
    starts = np.asarray(first)
    if (starts < 0).all() or (starts >= 0).all():
        raise ValueError("chains with and without an incorrect step are needed")
    low = np.array([-np.inf if f < 0 else c[f] for c, f in zip(chains, starts, strict=True)])
    high = np.array([min(c if f < 0 else c[:f], default=np.inf) for c, f in zip(chains, starts, strict=True)])
    thresholds = np.unique(np.r_[[s for c in chains for s in c], 2.0])

    def share(kind: np.ndarray) -> np.ndarray:
        """For each threshold the share of these chains that are judged as they are."""
        lows, highs = low[kind & (low < high)], high[kind & (low < high)]
        begun = np.searchsorted(np.sort(lows), thresholds, "left")  # low < threshold
        ended = np.searchsorted(np.sort(highs), thresholds, "left")  # high < threshold
        return (begun - ended) / kind.sum()

    error, correct = share(starts >= 0), share(starts < 0)
    values = 2 * error * correct / np.maximum(error + correct, 1e-300)
    return float(thresholds[_last_argmax(values)])


def reliability(scores: ArrayLike, truth: ArrayLike) -> list[dict[str, float]]:
    """Group scores into ten bins of equal width over [0, 1].

    scikit-learn's `calibration_curve` takes labels of two kinds only; these are accuracies in [0, 1].

    Args:
        scores: [n], in [0, 1].
        truth: [n], what the scores estimate, in [0, 1].

    Returns:
        For each bin that is not empty: mean `score`, mean `truth`, and `count`.
    """
    scores, truth = np.asarray(scores, float), np.asarray(truth, float)
    bins = np.minimum((scores * BINS).astype(int), BINS - 1)
    return [
        {"score": float(scores[b].mean()), "truth": float(truth[b].mean()), "count": int(b.sum())}
        for b in (bins == index for index in np.unique(bins))
    ]


def expected_calibration_error(scores: ArrayLike, truth: ArrayLike) -> float:
    """Compute the mean distance of mean score and mean truth over the bins of `reliability`, weighted by count."""
    bins = reliability(scores, truth)
    gaps = [b["count"] * abs(b["score"] - b["truth"]) for b in bins]
    return sum(gaps) / sum(b["count"] for b in bins)


def _last_argmax(values: np.ndarray) -> int:
    """The last index of the greatest value."""
    return len(values) - 1 - int(values[::-1].argmax())
