"""metrics.py and bootstrap.py against the slow, obvious way."""

import math

import numpy as np
import pytest

from reweighting.inference.bootstrap import StreamingBootstrap
from reweighting.inference.metrics import (
    auc,
    average_precision,
    best_f1_threshold,
    best_process_bench_threshold,
    expected_calibration_error,
    f1,
    process_bench,
    reliability,
)

RNG = np.random.default_rng(0)
# Scores with ties, and the truth.
CASES = [(RNG.integers(0, levels, 40) / levels, RNG.random(40) < 0.4) for levels in (3, 10, 1000) for _ in range(5)]


@pytest.mark.parametrize(("scores", "correct"), CASES)
def test_auc_average_precision_and_f1(scores, correct):
    pairs = [(a > b) + (a == b) / 2 for a in scores[correct] for b in scores[~correct]]
    assert auc(scores, correct) == pytest.approx(np.mean(pairs))

    precision = recall_before = 0.0
    for threshold in sorted(set(scores), reverse=True):
        called = scores >= threshold
        recall = (called & correct).sum() / correct.sum()
        precision += (recall - recall_before) * (called & correct).sum() / called.sum()
        recall_before = recall
    assert average_precision(scores, correct) == pytest.approx(precision)

    values = {t: f1(scores, correct, t) for t in scores}
    assert f1(scores, correct, best_f1_threshold(scores, correct)) == max(values.values())
    assert best_f1_threshold(scores, correct) == max(t for t, v in values.items() if v == max(values.values()))


def test_numbers_that_are_not_defined():
    assert math.isnan(auc([1, 2], [True, True])) and math.isnan(average_precision([1, 2], [False, False]))
    assert math.isnan(f1([1, 2], [False, False], 0.5))
    assert math.isnan(process_bench([[0.5]], [-1], 0.5)["error"])
    with pytest.raises(ValueError, match="with and without"):
        best_process_bench_threshold([[0.5]], [-1])


def test_f1_by_hand():
    assert f1([0.9, 0.8, 0.3, 0.2], [True, False, True, False], 0.5) == pytest.approx(0.5)


def test_process_bench_by_hand():
    chains = [[0.9, 0.8, 0.1], [0.9, 0.2, 0.1], [0.3, 0.9], [0.9, 0.7], [0.9, 0.4]]
    first = [2, 1, 1, -1, -1]
    # At 0.5 the first two are found, the third is called incorrect a step too early, and so is the last.
    assert process_bench(chains, first, 0.5) == pytest.approx({"error": 2 / 3, "correct": 1 / 2, "f1": 4 / 7})


def test_the_process_bench_threshold_is_the_best_of_all():
    for levels in (4, 100):
        chains = [(RNG.integers(0, levels, RNG.integers(1, 6)) / levels).tolist() for _ in range(60)]
        first = [int(RNG.integers(-1, len(chain))) for chain in chains]
        best = best_process_bench_threshold(chains, first)
        thresholds = {score for chain in chains for score in chain} | {2.0}
        values = [process_bench(chains, first, t)["f1"] for t in thresholds]
        assert process_bench(chains, first, best)["f1"] == pytest.approx(max(values)) and max(values) > 0


def test_calibration_by_hand():
    scores, truth = [0.05, 0.05, 0.95, 1.0], [0.0, 0.5, 1.0, 1.0]
    assert reliability(scores, truth) == [
        {"score": pytest.approx(0.05), "truth": 0.25, "count": 2},
        {"score": pytest.approx(0.975), "truth": 1.0, "count": 2},
    ]
    assert expected_calibration_error(scores, truth) == pytest.approx((2 * 0.2 + 2 * 0.025) / 4)


def test_bootstrap_intervals_are_as_wide_as_theory_says_and_repeat():
    values = RNG.normal(3.0, 2.0, 1000)

    def result() -> dict:
        bootstrap = StreamingBootstrap(replicates=2000)
        for value in values:
            bootstrap.add({"x": value, "constant": 1.0})
        return bootstrap.result()

    found = result()
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert found["x"]["mean"] == pytest.approx(values.mean())
    assert found["x"]["low"] == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert found["x"]["high"] == pytest.approx(values.mean() + half, abs=0.15 * half)
    assert found["constant"] == pytest.approx({"mean": 1, "low": 1, "high": 1})
    assert found == result()
