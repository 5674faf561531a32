"""The window hypergradient against autograd through the unrolled optimizer, in float64."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from reweighting.bilevel.hypergradients import unrolled as hypergradient
from reweighting.bilevel.hypergradients.unrolled import UnrolledHypergradient
from reweighting.distributed.flat_vectors import flatten, unflatten
from reweighting.training.fake_tensor_memory import LiveMemory

DOMAINS, DECAY = 4, 0.01
LR = {"sgd": 0.02, "adamw": 1e-3}


def toy_loss(model, params, batch):
    inputs, targets = batch
    return (functional_call(model, params, (inputs,)).squeeze(1).sigmoid() - targets).square().mean()


def toy_batch():
    return torch.randn(8, 10, dtype=torch.float64), torch.rand(8, dtype=torch.float64)


def norm_of(grads):
    return torch.sqrt(sum(g.square().sum() for g in grads))


def unrolled(kind, model, params, state, weights, steps, clip, momentum):
    """The parameters after the steps as a differentiable function of the weights: the optimizers by hand."""
    for micro_batches in steps:
        loss = sum(weights[d] * toy_loss(model, params, batch) for d, batch in micro_batches) / len(micro_batches)
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        factor = torch.clamp(clip / norm_of(grads), max=1.0) if clip else 1.0
        new = {}
        for (name, value), grad in zip(params.items(), grads, strict=True):
            own, grad = state[name], grad * factor
            if kind == "sgd":
                grad = grad + DECAY * value
                if momentum:
                    grad = own["momentum_buffer"] = momentum * own["momentum_buffer"] + grad
                new[name] = value - LR[kind] * grad
            else:
                own["step"] = own["step"] + 1
                t = own["step"].item()
                own["exp_avg"] = 0.9 * own["exp_avg"] + 0.1 * grad
                own["exp_avg_sq"] = 0.999 * own["exp_avg_sq"] + 0.001 * grad.square()
                denominator = (own["exp_avg_sq"] / (1 - 0.999**t)).sqrt() + 1e-8
                decayed = value * (1 - LR[kind] * DECAY)
                new[name] = decayed - LR[kind] * own["exp_avg"] / (1 - 0.9**t) / denominator
        params = new
    return params


@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize(("kind", "momentum"), [("sgd", 0.0), ("sgd", 0.9), ("adamw", 0.0)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_window_equals_autograd_through_the_optimizer(kind, momentum, count, accumulation, clip, seed, monkeypatch):
    monkeypatch.setitem(hypergradient.PARTS, "cpu", 50)  # of the 193 parameters
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    params = list(model.parameters())
    weights = torch.rand(DOMAINS, dtype=torch.float64) + 0.5
    if kind == "sgd":
        optimizer = torch.optim.SGD(params, lr=LR[kind], momentum=momentum, weight_decay=DECAY)
    else:
        optimizer = torch.optim.AdamW(params, lr=LR[kind], weight_decay=DECAY)
    window = UnrolledHypergradient(optimizer)

    def draw(step):
        return [((step * accumulation + i) % DOMAINS, toy_batch()) for i in range(accumulation)]

    def step(micro_batches):
        shares = []
        for domain, batch in micro_batches:
            loss = weights[domain] * toy_loss(model, dict(model.named_parameters()), batch) / accumulation
            shares.append(flatten(torch.autograd.grad(loss, params)))
            window.add_micro_batch(domain, shares[-1])
        grad = torch.stack(shares).sum(0)
        factor = min(1.0, clip / grad.norm().item()) if clip else 1.0
        for param, piece in zip(params, unflatten(grad * factor, params), strict=True):
            param.grad = piece
        optimizer.step()
        window.close_step(factor, LR[kind])

    for number in range(10):  # so that the optimizer's state is not at its start
        step(draw(number))
    window.clear()
    start = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    state = {name: copy.deepcopy(optimizer.state[p]) for name, p in model.named_parameters()}
    steps, meta = [draw(10 + number) for number in range(count)], toy_batch()

    exact_weights = weights.clone().requires_grad_()
    after = unrolled(kind, model, start, state, exact_weights, steps, clip, momentum)
    exact = torch.autograd.grad(toy_loss(model, after, meta), exact_weights)[0]

    for micro_batches in steps:
        step(micro_batches)
    for name, param in model.named_parameters():  # the hand-made optimizer is torch's
        torch.testing.assert_close(param.detach(), after[name].detach(), rtol=0, atol=1e-12)
    v = flatten(torch.autograd.grad(toy_loss(model, dict(model.named_parameters()), meta), params))
    ours = window.hypergradient(v, weights)

    if clip and accumulation == 1 and exact.norm() < 1e-9:  # a clipped gradient of one domain has no weight in it
        assert ours.norm() < 1e-9
        return
    assert torch.cosine_similarity(exact, ours, dim=0) >= 0.999
    assert 0.98 <= ours.norm() / exact.norm() <= 1.02


def test_window_wants_one_parameter_group():
    layer = nn.Linear(2, 1)
    groups = [{"params": [layer.weight]}, {"params": [layer.bias]}]
    with pytest.raises(ValueError, match="one parameter group"):
        UnrolledHypergradient(torch.optim.AdamW(groups))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_window_whose_steps_were_all_left_out_moves_no_weight(optimizer):
    layer = nn.Linear(2, 1)
    window = UnrolledHypergradient(optimizer(layer.parameters(), lr=0.1))
    window.add_micro_batch(0, torch.full((3,), torch.nan))
    window.drop_step()
    assert torch.equal(window.hypergradient(torch.ones(3), torch.ones(2)), torch.zeros(2))


def test_clipping_takes_one_more_vector_at_a_time():
    parameter = nn.Parameter(torch.zeros(10_000))
    window, vector = UnrolledHypergradient(torch.optim.SGD([parameter], lr=0.1)), 4 * 10_000
    for domain in range(5):
        window.add_micro_batch(domain, torch.randn(10_000))
    window.close_step(0.5, 0.1)
    v, grads = torch.randn(10_000), [grad for _, grad in window.records[0].domain_grads]
    with LiveMemory([v, *grads]) as live:
        window.hypergradient(v, torch.ones(5))
    assert vector <= live.peak < 1.2 * vector
