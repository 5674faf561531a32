"""What every method for the hypergradient does, and the arithmetic that they share."""

from typing import get_args

import pytest
import torch

from reweighting.bilevel.hypergradients import METHODS, make_hypergradient
from reweighting.bilevel.hypergradients.base import Hypergradient, sum_by_domain, through_clipping
from reweighting.bilevel.hypergradients.betty_native import BettyNative
from reweighting.bilevel.hypergradients.optimizer_adjoint import adamw_adjoint, sgd_adjoint
from reweighting.config.training import HypergradientName
from tests.bilevel.unrolling import Case


def test_the_flag_names_the_methods():
    assert {*METHODS, "auto"} == set(get_args(HypergradientName))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_offers_the_whole_protocol(method):
    case = Case("adamw")
    hypergradient = make_hypergradient(method, case.model, case.optimizer)
    assert Hypergradient in type(hypergradient).__mro__  # whose methods are abstract: none is missing


def test_clipping_is_differentiated():
    """Against autograd: products with the clipped gradient in, products with the gradient out."""
    gradients = torch.randn(3, 7, dtype=torch.float64)  # w_k g_nk of three micro-batches
    u_clipped = torch.randn(7, dtype=torch.float64)
    scale = torch.ones(3, dtype=torch.float64, requires_grad=True)
    total = scale @ gradients
    factor = 0.3 / total.norm()
    exact = torch.autograd.grad((u_clipped * total * factor).sum(), scale)[0]
    total = total.detach()
    found = through_clipping(gradients @ u_clipped, gradients @ total, factor.item())
    torch.testing.assert_close(found, exact)
    torch.testing.assert_close(through_clipping(gradients @ u_clipped, 5 * gradients @ total, factor.item()), exact)


def test_products_are_summed_by_domain():
    weights = torch.tensor([2.0, 0.0, 0.5, 1.0])
    found = sum_by_domain(torch.tensor([1.0, 3.0, 4.0, 8.0]), [0, 2, 0, 1], weights)
    assert found.tolist() == [2.5, 0.0, 6.0, 0.0]  # none for a weight of 0, and for a domain that was not seen


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_backwards_is_autograd(momentum):
    learning_rates, group = [0.1, 0.2, 0.05], {"momentum": momentum, "dampening": 0.1, "weight_decay": 0.03}
    gradients = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    v, phi, buffer = torch.randn(5, dtype=torch.float64), 0, torch.randn(5, dtype=torch.float64)
    for lr, gradient in zip(learning_rates, gradients, strict=True):
        buffer = momentum * buffer + 0.9 * (gradient + 0.03 * phi)
        phi = phi - lr * buffer
    exact = torch.autograd.grad(v @ phi, gradients)[0]
    torch.testing.assert_close(torch.stack([*sgd_adjoint(v, group, learning_rates)]).flip(0), exact)


def test_adamw_backwards_with_a_constant_second_moment_is_autograd():
    learning_rates = [0.1, 0.2, 0.05]
    group = {"betas": (0.8, 0.99), "eps": 1e-8, "weight_decay": 0.03}
    gradients = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    v, phi, m = torch.randn(5, dtype=torch.float64), 0, torch.randn(5, dtype=torch.float64)
    for step, (lr, gradient) in enumerate(zip(learning_rates, gradients, strict=True), start=7):
        m = 0.8 * m + 0.2 * gradient
        phi = (1 - lr * 0.03) * phi - lr * m / (1 - 0.8**step)
    exact = torch.autograd.grad(v @ phi, gradients)[0]
    found = torch.stack([*adamw_adjoint(v, group, learning_rates, newest_step=9)]).flip(0)
    torch.testing.assert_close(found, exact)


def test_bettys_darts_differentiates_the_last_micro_batch_along_v():
    case = Case("sgd", clip=0.05)
    hypergradient = BettyNative(case.params, case.loss)
    _, v = case.window(hypergradient)
    domain, batch = case.batches[-1][-1]
    gradient = torch.autograd.grad(case.loss(case.params, batch).sum(), list(case.params.values()))
    exact = torch.zeros(4, dtype=torch.float64)
    exact[domain] = -torch.cat([piece.reshape(-1) for piece in gradient]) @ v
    before = [param.detach().clone() for param in case.params.values()]
    found = hypergradient.compute(v, case.weights)
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-8)
    torch.testing.assert_close([param.detach() for param in case.params.values()], before)
    assert torch.equal(hypergradient.compute(v, case.weights), torch.zeros(4, dtype=torch.float64)), "an empty window"
