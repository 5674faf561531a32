"""Numbers about scores: ranking, thresholds, the first wrong step, calibration, and means with intervals.

Everywhere a higher score means "more probably right". NumPy only; one-dimensional arrays unless a shape is given.
"""

from collections.abc import Sequence

import numpy as np

BINS = 10  # of the calibration
BLOCK = 256  # values that the bootstrap draws for at a time


def ranks(values) -> np.ndarray:
    """Ranks from 1; equal values share the mean of theirs."""
    _, places, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[places]


def spearman(x, y) -> float:
    """Spearman's rank correlation, ties given their mean rank; NaN if either side is constant."""
    x, y = (r - r.mean() for r in (ranks(x), ranks(y)))
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 0 else float("nan")


def auc(scores, right) -> float:
    """The probability that a right one scores higher than a wrong one (ties count half); NaN without both."""
    right = np.asarray(right, bool)
    positive, negative = int(right.sum()), int((~right).sum())
    if not positive or not negative:
        return float("nan")
    return float((ranks(scores)[right].sum() - positive * (positive + 1) / 2) / (positive * negative))


def _precision_recall(scores, right) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Thresholds from the highest down, and precision and recall of calling right what scores at least that."""
    scores, right = np.asarray(scores, float), np.asarray(right, bool)
    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order], right[order].cumsum()
    last = np.r_[scores[1:] != scores[:-1], True]  # equal scores are taken together
    return scores[last], (hits / np.arange(1, len(hits) + 1))[last], (hits / max(1, hits[-1]))[last]


def average_precision(scores, right) -> float:
    """The mean precision over the right ones, taken from the highest score down; NaN if none is right."""
    if not np.any(right):
        return float("nan")
    _, precision, recall = _precision_recall(scores, right)
    return float((np.diff(recall, prepend=0) * precision).sum())


def f1(scores, right, threshold: float) -> float:
    """Harmonic mean of precision and recall of calling right what scores at least `threshold`; NaN if none is right."""
    called, right = np.asarray(scores) >= threshold, np.asarray(right, bool)
    return float(2 * (called & right).sum() / (called.sum() + right.sum())) if right.any() else float("nan")


def best_f1_threshold(scores, right) -> float:
    """The threshold of the greatest F1, of equals the highest. At least one score."""
    thresholds, precision, recall = _precision_recall(scores, right)
    values = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
    return float(thresholds[values.argmax()])


def first_wrong(scores: Sequence[float], threshold: float) -> int:
    """The first step that scores below the threshold, -1 if none does."""
    return next((step for step, score in enumerate(scores) if score < threshold), -1)


def process_bench(chains: Sequence[Sequence[float]], first: Sequence[int], threshold: float) -> dict[str, float]:
    """ProcessBench's measure (Zheng et al. 2024, arXiv 2412.06559) of finding each chain's first wrong step.

    chains: the step scores of each. first: the first wrong step of each, -1 where all are right.
    Returns `error`, the share of chains with a wrong step in which exactly the first is found; `correct`, the share of
    the others in which none is; `f1`, their harmonic mean. NaN where there are no such chains.
    """
    first = np.asarray(first)
    found = np.array([first_wrong(scores, threshold) for scores in chains]) == first
    return _two_shares(found[first >= 0], found[first < 0])


def best_process_bench_threshold(chains: Sequence[Sequence[float]], first: Sequence[int]) -> float:
    """The threshold of the greatest `process_bench` F1, of equals the highest; all but linear in the steps.

    Raises ValueError if not both kinds of chain are there.
    """
    # For thresholds above `low` up to `high` a chain is judged as it is: below no step before the first wrong one,
    # and above the wrong one itself.
    first = np.asarray(first)
    if (first < 0).all() or (first >= 0).all():
        raise ValueError("chains with and without a wrong step are needed")
    low = np.array([-np.inf if f < 0 else c[f] for c, f in zip(chains, first, strict=True)])
    high = np.array([min(c if f < 0 else c[:f], default=np.inf) for c, f in zip(chains, first, strict=True)])
    thresholds = np.unique(np.r_[[s for c in chains for s in c], 2.0])

    def share(kind: np.ndarray) -> np.ndarray:
        """For each threshold the share of these chains that are judged as they are."""
        lows, highs = low[kind & (low < high)], high[kind & (low < high)]
        begun = np.searchsorted(np.sort(lows), thresholds, "left")  # low < threshold
        ended = np.searchsorted(np.sort(highs), thresholds, "left")  # high < threshold
        return (begun - ended) / kind.sum()

    error, correct = share(first >= 0), share(first < 0)
    values = 2 * error * correct / np.maximum(error + correct, 1e-300)
    return float(thresholds[len(values) - 1 - values[::-1].argmax()])


def _two_shares(error: np.ndarray, correct: np.ndarray) -> dict[str, float]:
    shares = [float(part.mean()) if len(part) else float("nan") for part in (error, correct)]
    total = sum(shares)
    return {"error": shares[0], "correct": shares[1], "f1": 2 * shares[0] * shares[1] / total if total else 0.0}


def reliability(scores, truth) -> list[dict[str, float]]:
    """Ten bins of equal width over [0, 1], without empty ones: mean `score`, mean `truth`, and `count`."""
    scores, truth = np.asarray(scores, float), np.asarray(truth, float)
    places = np.minimum((scores * BINS).astype(int), BINS - 1)
    return [
        {"score": float(scores[b].mean()), "truth": float(truth[b].mean()), "count": int(b.sum())}
        for b in (places == place for place in np.unique(places))
    ]


def expected_calibration_error(scores, truth) -> float:
    """The mean over `reliability`'s bins, by their counts, of how far mean score and mean truth are apart."""
    bins = reliability(scores, truth)
    gaps = [b["count"] * abs(b["score"] - b["truth"]) for b in bins]
    return sum(gaps) / sum(b["count"] for b in bins)


class Bootstrap:
    """Means of several numbers a question, with 95 % intervals over questions, in memory that does not grow.

    Each of the replicates counts a question Poisson(1) times: the usual bootstrap, for data that come as a stream. The
    same seed and the same questions in the same order give the same intervals.
    """

    def __init__(self, replicates: int = 1000, seed: int = 0):
        self.replicates, self.seed = replicates, seed
        self.names: list[str] = []
        self.count = 0
        self._waiting: list[list[float]] = []
        self._blocks = 0

    def add(self, values: dict[str, float]) -> None:
        """One question's numbers; every question has the same names."""
        if not self.count:
            self.names = list(values)
            self._total = np.zeros(len(values))
            self._sums = np.zeros((self.replicates, len(values)))
            self._weights = np.zeros(self.replicates)
        self.count += 1
        self._waiting.append([values[name] for name in self.names])
        if len(self._waiting) == BLOCK:
            self._draw()

    def result(self) -> dict[str, dict[str, float]]:
        """For each name `mean`, `low` and `high`. At least one question."""
        self._draw()
        drawn = self._weights > 0
        means = self._sums[drawn] / self._weights[drawn, None]  # [replicates, names]
        low, high = np.percentile(means, (2.5, 97.5), axis=0)
        columns = zip(self.names, self._total / self.count, low, high, strict=True)
        return {name: {"mean": float(m), "low": float(a), "high": float(b)} for name, m, a, b in columns}

    def _draw(self) -> None:
        if not self._waiting:
            return
        values = np.array(self._waiting)  # [block, names]
        times = np.random.default_rng((self.seed, self._blocks)).poisson(1.0, (self.replicates, len(values)))
        self._total += values.sum(0)
        self._sums += times @ values
        self._weights += times.sum(1)
        self._blocks += 1
        self._waiting = []
