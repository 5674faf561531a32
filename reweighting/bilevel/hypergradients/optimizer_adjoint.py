"""The optimizer's elementwise arithmetic, run backwards over a window of steps.

Both functions yield u_n = dL_meta / d(clipped g_n), from the newest step to the oldest, for parameters whose meta
gradient is `v`. They are elementwise, so `v` may be a part of all parameters, or a single number.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer


class AdamWStep(NamedTuple):
    """AdamW's moments after a step, and the gradient that it received, all shaped like `v`."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    gradient: Tensor


def check_optimizer(optimizer: Optimizer) -> None:
    """Refuse an optimizer that the functions below do not describe.

    Raises:
        ValueError: It is not SGD or AdamW with one parameter group and without amsgrad, nesterov and maximize.
    """
    if not isinstance(optimizer, SGD | AdamW):
        raise ValueError(f"the hypergradient expects SGD or AdamW, not {type(optimizer).__name__}")
    if len(optimizer.param_groups) != 1:
        raise ValueError("the hypergradient expects an optimizer with one parameter group")
    for option in ("amsgrad", "nesterov", "maximize"):
        if optimizer.param_groups[0].get(option):
            raise ValueError(f"the hypergradient expects an optimizer without {option}")


def sgd_adjoint(v: Tensor, group: dict, learning_rates: Sequence[float]) -> Iterator[Tensor]:
    """Run SGD's steps backwards.

    Args:
        v: dL_meta / dphi_N of some parameters.
        group: The optimizer's parameter group (momentum, dampening, weight_decay).
        learning_rates: Of the steps, oldest first.

    Yields:
        u_n in the shape of `v`, newest step first.
    """
    phi, buffer = v.clone(), torch.zeros_like(v)  # adjoints of the parameters and of the momentum buffer
    for learning_rate in reversed(learning_rates):
        buffer.sub_(phi, alpha=learning_rate)  # phi_n = phi_(n-1) - lr * b_n
        # b_n = momentum * b_(n-1) + (1 - dampening) * (g_n + weight_decay * phi_(n-1)); torch starts with b = g
        gradient = buffer * (1 - group["dampening"])
        phi.add_(gradient, alpha=group["weight_decay"])
        yield gradient
        buffer.mul_(group["momentum"])


def adamw_adjoint(
    v: Tensor,
    group: dict,
    learning_rates: Sequence[float],
    newest_step: int,
    steps: list[AdamWStep] | None = None,
) -> Iterator[Tensor]:
    """Run AdamW's steps backwards.

    Args:
        v: dL_meta / dphi_N of some parameters.
        group: The optimizer's parameter group (betas, eps, weight_decay).
        learning_rates: Of the steps, oldest first.
        newest_step: How many steps AdamW has made at the end of the window; sets the bias corrections.
        steps: Moments and gradient of each step, oldest first; emptied. None takes the second moment as constant and
            `v` as already divided by its root.

    Yields:
        u_n in the shape of `v`, newest step first.
    """
    (beta1, beta2), eps = group["betas"], group["eps"]
    first, second = torch.zeros_like(v), torch.zeros_like(v)  # adjoints of the moments m_n and v_n
    decay = 1.0  # the adjoint of phi_n is v times this: phi_n = (1 - lr * weight_decay) * phi_(n-1) - lr * update
    for back, learning_rate in enumerate(reversed(learning_rates)):
        step = newest_step - back
        bias1, root2 = 1 - beta1**step, math.sqrt(1 - beta2**step)
        if steps is None:
            first.sub_(v, alpha=decay * learning_rate / bias1)
            yield first * (1 - beta1)
        else:
            m, square, gradient = steps.pop()
            # update = (m_n / bias1) / denominator,  denominator = root / root2 + eps,  root = sqrt(v_n). Where root is
            # 0, so are m_n and every gradient so far: there it may be any number.
            root = square.sqrt_().clamp_(min=torch.finfo(square.dtype).tiny)
            denominator = root + eps * root2
            slope = v / denominator  # scalar factors are applied below
            first.sub_(slope, alpha=decay * learning_rate * root2 / bias1)
            # d denominator / d v_n = 1 / (2 * root * root2)
            slope.mul_(m).div_(denominator).div_(root)
            second.add_(slope, alpha=decay * learning_rate * root2 / (2 * bias1))
            # m_n = beta1 * m_(n-1) + (1 - beta1) * g_n,  v_n = beta2 * v_(n-1) + (1 - beta2) * g_n ** 2
            yield (first * (1 - beta1)).addcmul_(gradient, second, value=2 * (1 - beta2))
        first.mul_(beta1)
        second.mul_(beta2)
        decay *= 1 - learning_rate * group["weight_decay"]
