"""The window hypergradient: how the meta loss after a window of optimizer steps depends on the domain weights.

Notation: P trainable parameters as one flat vector phi, K domains, N optimizer steps in the window, phi_n the
parameters after step n, g_n the gradient that step n's optimizer received, v = dL_meta / dphi_N.

The lower loss is linear in the weights, so a step's gradient is g_n = sum over its micro-batches of w_k g_nk, with
g_nk the unweighted gradient of one domain's micro-batch, which the backward pass has already made. Hence

    dL_meta / dw_k = sum_n < u_n , g_nk >      with  u_n = dL_meta / dg_n ,

and u_n follows from v by running the optimizer's elementwise arithmetic backwards over the window. Neither an extra
forward pass nor a second derivative of the model is needed. What is left out is how g_n itself depends on phi_(n-1)
(the Hessian): a term of second order in the learning rate. Against autograd through the unrolled optimizer see
`tests/test_hypergradient.py`.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor


def flatten(tensors) -> Tensor:
    """One vector [P] of all entries, in order."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def unflatten(vector: Tensor, like) -> list[Tensor]:
    """Views of a vector [P] in the shapes of the tensors `like`."""
    pieces = vector.split([tensor.numel() for tensor in like])
    return [piece.view_as(tensor) for piece, tensor in zip(pieces, like, strict=True)]


@dataclass
class StepRecord:
    """What one optimizer step leaves behind for the adjoint; vectors are [P].

    domain_grads: (domain, weight * gradient) for each micro-batch.
    grad: the summed gradient before clipping. clip: the factor (at most 1) that clipping multiplied it with.
    lr: the step's learning rate. state: the optimizer's own vectors after the step; count: its step number.
    """

    domain_grads: list[tuple[int, Tensor]]
    grad: Tensor
    clip: float
    lr: float
    state: dict[str, Tensor] = field(default_factory=dict)
    count: int = 0


class Window:
    """The optimizer steps since the last update of the weights.

    optimizer: torch.optim.SGD or AdamW with one parameter group and no amsgrad, nesterov or maximize.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        if len(optimizer.param_groups) != 1:
            raise ValueError("the window hypergradient expects an optimizer with one parameter group")
        self.optimizer, self.records = optimizer, []
        self._adamw = isinstance(optimizer, torch.optim.AdamW)
        self._pending: list[tuple[int, Tensor]] = []

    def add_micro_batch(self, domain: int, grad: Tensor) -> None:
        """Keep a micro-batch's share of the step's gradient: weight * g_nk, [P]."""
        self._pending.append((domain, grad))

    def close_step(self, grad: Tensor, clip: float, lr: float) -> None:
        """Call right after optimizer.step(), with the gradient before clipping and the learning rate it used."""
        record = StepRecord(self._pending, grad, clip, lr)
        params = self.optimizer.param_groups[0]["params"]
        if self._adamw:
            states = [self.optimizer.state[p] for p in params]
            record.state = {name: flatten(s[name] for s in states) for name in ("exp_avg", "exp_avg_sq")}
            record.count = int(states[0]["step"])
        self.records.append(record)
        self._pending = []

    def drop_step(self) -> None:
        """Forget the micro-batches of a step that was not made."""
        self._pending = []

    def clear(self) -> None:
        """Forget the window."""
        self.records, self._pending = [], []

    def state(self) -> list[dict]:
        """The steps so far, between two steps, as plain containers of tensors and numbers."""
        return [dict(vars(record)) for record in self.records]

    def load(self, state: list[dict], device: torch.device | str) -> None:
        """Go on from what `state` gave."""
        self.clear()
        for saved in state:
            grads = [(domain, grad.to(device)) for domain, grad in saved["domain_grads"]]
            vectors = {name: vector.to(device) for name, vector in saved["state"].items()}
            self.records.append(
                StepRecord(grads, saved["grad"].to(device), saved["clip"], saved["lr"], vectors, saved["count"])
            )

    @torch.no_grad()
    def hypergradient(self, v: Tensor, weights: Tensor) -> Tensor:
        """dL_meta / dw [K] from the meta gradient v [P] at the window's end and the weights [K] that held in it."""
        backwards = self._adamw_adjoint(v) if self._adamw else self._sgd_adjoint(v)
        result = v.new_zeros(len(weights))
        for record, u in backwards:
            u = _through_clipping(u, record)
            for domain, grad in record.domain_grads:
                result[domain] += torch.dot(u, grad)
        weights = weights.to(v.dtype)
        # A weight that has become 0 to the last bit does not come back: its raw parameter's slope is 0 as well.
        return torch.where(weights > 0, result / weights, 0)

    def _sgd_adjoint(self, v: Tensor):
        """(record, dL_meta / d clipped gradient [P]) from the newest step to the oldest."""
        group = self.optimizer.param_groups[0]
        phi, buffer = v.clone(), torch.zeros_like(v)  # adjoints of the parameters and of the momentum buffer
        for record in reversed(self.records):
            buffer.sub_(phi, alpha=record.lr)  # phi_n = phi_(n-1) - lr * b_n
            # b_n = momentum * b_(n-1) + (1 - dampening) * (g_n + weight_decay * phi_(n-1)); torch starts with b = g
            grad = buffer * (1 - group["dampening"])
            phi.add_(grad, alpha=group["weight_decay"])
            yield record, grad
            buffer.mul_(group["momentum"])

    def _adamw_adjoint(self, v: Tensor):
        """(record, dL_meta / d clipped gradient [P]) from the newest step to the oldest."""
        group = self.optimizer.param_groups[0]
        (beta1, beta2), eps = group["betas"], group["eps"]
        phi, first, second = v.clone(), torch.zeros_like(v), torch.zeros_like(v)  # adjoints of phi, m and v
        for record in reversed(self.records):
            bias1, bias2 = 1 - beta1**record.count, 1 - beta2**record.count
            m, root = record.state["exp_avg"], (record.state["exp_avg_sq"] / bias2).sqrt()
            # phi_n = (1 - lr * decay) * phi_(n-1) - lr * (m_n / bias1) / (root + eps)
            first.addcdiv_(phi, root + eps, value=-record.lr / bias1)
            slope = record.lr * (m / bias1) / ((root + eps).square() * 2 * root * bias2)
            second.add_(torch.where(root > 0, phi * slope, 0))
            # m_n = beta1 * m_(n-1) + (1 - beta1) * g_n,  v_n = beta2 * v_(n-1) + (1 - beta2) * g_n ** 2
            yield record, (1 - beta1) * first + 2 * (1 - beta2) * record.clip * record.grad * second
            first.mul_(beta1)
            second.mul_(beta2)
            phi.mul_(1 - record.lr * group["weight_decay"])


def _through_clipping(u: Tensor, record: StepRecord) -> Tensor:
    """dL_meta / dg_n from dL_meta / d(clipped g_n): clipping scales by max_norm / |g_n|, which depends on g_n too."""
    if record.clip == 1.0:
        return u
    direction = record.grad / record.grad.norm()
    return record.clip * (u - direction * torch.dot(direction, u))
