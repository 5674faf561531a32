"""`UnrolledHypergradient` against autograd through the unrolled optimizer, in float64."""

import pytest
import torch
from torch import nn

from reweighting.bilevel.hypergradients import unrolled
from reweighting.bilevel.hypergradients.base import WindowSize
from reweighting.bilevel.hypergradients.unrolled import UnrolledHypergradient
from reweighting.distributed.sharding import Replicated
from reweighting.training.fake_tensor_memory import LiveMemory
from tests.bilevel.unrolling import Case, cosine_and_ratio


def make(case: Case) -> UnrolledHypergradient:
    return UnrolledHypergradient(case.optimizer, Replicated(case.model))


@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize(("kind", "momentum"), [("sgd", 0.0), ("sgd", 0.9), ("adamw", 0.0)])
@pytest.mark.parametrize(("seed", "loss"), [(0, "mse"), (1, "mse"), (2, "mse"), (0, "bce"), (1, "bce")])
def test_it_equals_autograd_through_the_optimizer(kind, momentum, count, accumulation, clip, seed, loss, monkeypatch):
    monkeypatch.setitem(unrolled.CHUNK, "cpu", 50)  # of the 193 parameters
    case = Case(kind, momentum, count=count, accumulation=accumulation, clip=clip, seed=seed, loss_name=loss)
    hypergradient = make(case)
    exact, v = case.window(hypergradient)
    found = hypergradient.compute(v, case.weights)
    if clip and accumulation == 1 and exact.norm() < 1e-9:  # a clipped gradient of one domain has no weight in it
        assert found.norm() < 1e-9
        return
    cosine, ratio = cosine_and_ratio(exact, found)
    assert cosine >= 0.999 and 0.98 <= ratio <= 1.02


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_window_knows_nothing_of_the_one_before(kind):
    results = []
    for reported in (True, False):
        case = Case(kind, before=5, clip=0.05)
        hypergradient, v = make(case), torch.ones(193, dtype=torch.float64)
        for number in range(5):
            case.step(number, hypergradient if reported else None)
        if reported:
            hypergradient.compute(v, case.weights)
        for number in range(5, 10):
            case.step(number, hypergradient)
        results.append(hypergradient.compute(v, case.weights))
    assert torch.equal(*results) and results[0].norm() > 0


def test_an_optimizer_that_the_adjoint_does_not_describe_is_refused():
    layer = nn.Linear(2, 1)
    groups = [{"params": [layer.weight]}, {"params": [layer.bias]}]
    for optimizer, message in (
        (torch.optim.AdamW(groups), "one parameter group"),
        (torch.optim.AdamW(layer.parameters(), amsgrad=True), "without amsgrad"),
        (torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, nesterov=True), "without nesterov"),
        (torch.optim.RMSprop(layer.parameters()), "SGD or AdamW, not RMSprop"),
    ):
        with pytest.raises(ValueError, match=message):
            UnrolledHypergradient(optimizer, Replicated(layer))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_window_whose_steps_were_all_left_out_moves_no_weight(optimizer):
    layer = nn.Linear(2, 1)
    hypergradient = UnrolledHypergradient(optimizer(layer.parameters(), lr=0.1), Replicated(layer))
    hypergradient.add_micro_batch(0, 0, None, [torch.full((1, 2), torch.nan), torch.full((1,), torch.nan)])
    hypergradient.drop_step()
    assert torch.equal(hypergradient.compute(torch.ones(3), torch.ones(2)), torch.zeros(2))


def clipped_window(count: int, size: int) -> UnrolledHypergradient:
    """One clipped step of `count` micro-batches, of a model with `size` parameters."""
    layer = nn.Linear(size, 1, bias=False)
    hypergradient = UnrolledHypergradient(torch.optim.SGD(layer.parameters(), lr=0.1), Replicated(layer))
    for domain in range(count):
        hypergradient.add_micro_batch(domain, domain, None, [torch.randn(1, size)])
    hypergradient.close_step(torch.zeros(size), 0.5, 0.1)
    return hypergradient


def test_clipping_takes_one_more_vector_at_a_time():
    hypergradient, vector = clipped_window(5, 10_000), 4 * 10_000
    v, gradients = torch.randn(10_000), [gradient for _, gradient in hypergradient.steps[0].domain_grads]
    with LiveMemory([v, *gradients]) as live:
        hypergradient.compute(v, torch.ones(5))
    assert vector <= live.peak < 1.2 * vector


def test_it_takes_the_memory_that_it_names():
    """Kept: to the byte. For a moment: no more than named."""
    size, steps = 3 * 2**17, 4
    layer = nn.Linear(size, 1, bias=False)
    hypergradient = UnrolledHypergradient(torch.optim.AdamW(layer.parameters()), Replicated(layer))
    gradient, v = torch.randn(1, size), torch.randn(size)
    kept, compute = hypergradient.memory_bytes(WindowSize(vector=4 * size, steps=steps, micro_batches=2, clipped=True))
    with LiveMemory([gradient, v]) as live:
        for step in range(steps):
            for domain in range(2):
                hypergradient.add_micro_batch(2 * step + domain, domain, None, [gradient])
            hypergradient.close_step(gradient[0], 0.5, 0.1)
        assert live.now == kept == 4 * size * (2 * steps + 2)
        hypergradient.compute(v, torch.ones(2))
    assert kept < live.peak <= kept + compute


def test_memory_of_earlier_windows_is_used_again():
    hypergradient = clipped_window(3, 100)
    before = {gradient.data_ptr() for _, gradient in hypergradient.steps[0].domain_grads}
    hypergradient.compute(torch.randn(100), torch.ones(3))
    hypergradient.add_micro_batch(3, 0, None, [torch.ones(1, 100)])
    hypergradient.drop_step()
    for domain in range(3):
        hypergradient.add_micro_batch(4 + domain, domain, None, [torch.full((1, 100), float(domain))])
    hypergradient.close_step(torch.zeros(100), 1.0, 0.1)
    gradients = [gradient for _, gradient in hypergradient.steps[0].domain_grads]
    assert {gradient.data_ptr() for gradient in gradients} == before
    assert [gradient.unique().tolist() for gradient in gradients] == [[0.0], [1.0], [2.0]]
