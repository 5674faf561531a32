"""Aggregates against their definitions, step by step."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reweighting.modeling.aggregation import AGGREGATIONS, aggregate

logit_lists = st.lists(st.floats(-8, 8), min_size=1, max_size=6)


def expected(name: str, logits: list[float]) -> float:
    """The definition, as a probability, from step scores."""
    scores = [1 / (1 + math.exp(-z)) for z in logits]
    odds = [math.log(s / (1 - s)) for s in scores]
    values = {
        "mean": sum(scores) / len(scores),
        "min": min(scores),
        "max": max(scores),
        "product": math.prod(scores),
        "last": scores[-1],
        "mean_logit": 1 / (1 + math.exp(-sum(odds) / len(odds))),
        "sum_logit": 1 / (1 + math.exp(-sum(odds))),
    }
    return values[name]


@pytest.mark.parametrize("name", AGGREGATIONS)
@settings(deadline=None, derandomize=True, max_examples=60)
@given(chains=st.lists(logit_lists, min_size=1, max_size=4))
def test_aggregates_equal_their_definitions_whatever_the_padding(name, chains):
    width = max(map(len, chains))
    logits = torch.full((len(chains), width), 99.0, dtype=torch.float64)  # padding must not count
    mask = torch.zeros(len(chains), width, dtype=torch.bool)
    for row, chain in enumerate(chains):
        logits[row, : len(chain)] = torch.tensor(chain, dtype=torch.float64)
        mask[row, : len(chain)] = True
    values = aggregate(logits, mask, name).sigmoid().tolist()
    assert values == pytest.approx([expected(name, chain) for chain in chains], rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_gradients_are_finite_at_extreme_scores(name):
    logits = torch.tensor([[60.0, 60.0], [-60.0, -60.0], [60.0, 0.0]], requires_grad=True)
    mask = torch.tensor([[True, True], [True, True], [True, False]])
    values = aggregate(logits, mask, name)
    values.sigmoid().sum().backward()
    assert values.isfinite().all() and logits.grad.isfinite().all()
