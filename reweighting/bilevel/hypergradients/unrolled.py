"""The window hypergradient: how the meta loss after a window of optimizer steps depends on the domain weights.

Notation: P trainable parameters as one flat vector phi, K domains, N optimizer steps in the window, phi_n the
parameters after step n, g_n the gradient that step n's optimizer received, v = dL_meta / dphi_N.

The lower loss is linear in the weights, so a step's gradient is g_n = sum over its micro-batches of w_k g_nk, with
g_nk the unweighted gradient of one domain's micro-batch, which the backward pass has already made. Hence

    dL_meta / dw_k = sum_n < u_n , g_nk >      with  u_n = dL_meta / dg_n ,

and u_n follows from v by running the optimizer's elementwise arithmetic backwards over the window. Neither an extra
forward pass nor a second derivative of the model is needed. What is left out is how g_n itself depends on phi_(n-1)
(the Hessian): a term of second order in the learning rate. Against autograd through the unrolled optimizer see
`tests/bilevel/test_unrolled.py`.

Of several processes each keeps its own share of every g_nk: the products are linear in it, and summed over processes.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from reweighting.distributed import collectives
from reweighting.distributed.flat_vectors import flatten

# Parameters that the adjoint is run over at a time: what a processor core's cache holds, one part on each core; on a
# GPU, few large kernels.
PARTS = {"cpu": 2**17}
LARGE_PART = 2**24


@dataclass
class StepRecord:
    """What one optimizer step leaves behind for the adjoint.

    domain_grads: (domain, weight * gradient [P]) for each micro-batch. clip: the factor (at most 1) that clipping
    multiplied their sum with. lr: the step's learning rate. whole: the sum over all processes' micro-batches [P], where
    it is not that of these.
    """

    domain_grads: list[tuple[int, Tensor]]
    clip: float
    lr: float
    whole: Tensor | None = None

    def unclipped(self, part: slice = slice(None)) -> Tensor:
        """The step's gradient before clipping, of these parameters."""
        if self.whole is not None:
            return self.whole[part]
        grads = [grad[part] for _, grad in self.domain_grads]
        if len(grads) == 1:
            return grads[0]
        total = grads[0] + grads[1]
        for grad in grads[2:]:
            total += grad
        return total

    def gradient(self, part: slice) -> Tensor:
        """What the optimizer received, of these parameters."""
        total = self.unclipped(part)
        return total if self.clip == 1.0 else total * self.clip


class UnrolledHypergradient:
    """The optimizer steps since the last update of the weights: their gradients, and AdamW's state before them.

    The state after each step follows from these. It is computed anew when it is needed, for a part of the parameters
    at a time, since everything but the dot products is elementwise: kept, it would take more memory than the gradients.

    optimizer: torch.optim.SGD or AdamW with one parameter group and no amsgrad, nesterov or maximize.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        if len(optimizer.param_groups) != 1:
            raise ValueError("the window hypergradient expects an optimizer with one parameter group")
        self.optimizer = optimizer
        self._adamw = isinstance(optimizer, torch.optim.AdamW)
        self.records: list[StepRecord] = []
        self._pending: list[tuple[int, Tensor]] = []
        self._free: list[Tensor] = []
        self.clear()

    def clear(self) -> None:
        """Forget the window."""
        self._free += [grad for record in self.records for _, grad in record.domain_grads]
        self.records = []
        self.drop_step()
        self._start: dict[str, Tensor] = {}  # AdamW's moments before the first step, [P] each
        self._count = 0  # AdamW's steps before the first one

    def storage(self) -> Tensor | None:
        """A vector [P] of an earlier window to write the next gradient into, if there is one: memory that is new to
        the process costs more time than the copy."""
        return self._free.pop() if self._free else None

    def add_micro_batch(self, domain: int, grad: Tensor) -> None:
        """Keep a micro-batch's share of the step's gradient: weight * g_nk, [P]. It stays the window's."""
        if self._adamw and not self.records and not self._pending:
            self._note_start(grad)
        self._pending.append((domain, grad))

    def _note_start(self, like: Tensor) -> None:
        states = [self.optimizer.state[p] for p in self.optimizer.param_groups[0]["params"]]
        self._count = int(states[0].get("step", 0))
        for name in ("exp_avg", "exp_avg_sq"):
            self._start[name] = flatten(s[name] for s in states) if self._count else torch.zeros_like(like)

    def close_step(self, clip: float, lr: float, whole: Tensor | None = None) -> None:
        """Call once a step: `clip` is what clipping multiplied its gradient with, `lr` its learning rate, `whole` its
        gradient [P], where that is not the sum of this process's micro-batches."""
        self.records.append(StepRecord(self._pending, clip, lr, whole))
        self._pending = []

    def drop_step(self) -> None:
        """Forget the micro-batches of a step that was not made."""
        self._free += [grad for _, grad in self._pending]
        self._pending = []

    def state(self, layout) -> dict:
        """The steps so far, between two steps, as plain containers of tensors and numbers, of all processes together.

        layout: how the parameters lie on the processes, see `sharding.py`.
        """
        steps = []
        for record in self.records:
            grads = [(domain, layout.gather_local_gradient(grad)) for domain, grad in record.domain_grads]
            steps.append({"domain_grads": grads, "clip": record.clip, "lr": record.lr})
        start = {name: layout.gather_full_vector(vector) for name, vector in self._start.items()}
        return {"steps": steps, "start": start, "count": self._count}

    def load(self, state: dict, layout, device: torch.device | str) -> None:
        """Go on from what `state` gave, on as many processes as there are now."""
        self.clear()
        self._start = {name: layout.local_shard_vector(vector).to(device) for name, vector in state["start"].items()}
        self._count = state["count"]
        for saved in state["steps"]:
            whole = [(domain, layout.local_shard_vector(grad).to(device)) for domain, grad in saved["domain_grads"]]
            grads = [(domain, layout.split_local_gradient(grad)) for domain, grad in whole]
            total = None if grads[0][1] is whole[0][1] else torch.stack([grad for _, grad in whole]).sum(0)
            self.records.append(StepRecord(grads, saved["clip"], saved["lr"], total))

    def hypergradient(self, v: Tensor, weights: Tensor) -> Tensor:
        """dL_meta / dw [K] from the meta gradient v [P] at the window's end and the weights [K] that held in it."""
        if not self.records:  # every step was left out
            return v.new_zeros(len(weights))
        size = PARTS.get(v.device.type, LARGE_PART)
        parts = [slice(start, start + size) for start in range(0, max(len(v), 1), size)]
        workers = torch.get_num_threads() if v.device.type == "cpu" else 1
        with ThreadPoolExecutor(workers) as pool:
            dots = collectives.all_reduce_sum(torch.stack(list(pool.map(partial(self._products, v), parts))).sum(0))
        result, counts = v.new_zeros(len(weights)), [len(record.domain_grads) for record in self.records]
        for record, products in zip(self.records, dots.split(counts), strict=True):
            products = _through_clipping(products, record)
            for (domain, _), product in zip(record.domain_grads, products, strict=True):
                result[domain] += product
        weights = weights.detach().to(v.dtype)
        # A weight that has become 0 to the last bit does not come back: its raw parameter's slope is 0 as well.
        return torch.where(weights > 0, result / weights, 0)

    @torch.no_grad()
    def _products(self, v: Tensor, part: slice) -> Tensor:
        """< u_n , g_nk > over a part of the parameters, an entry for each micro-batch of the window."""
        adjoint, products = self._adamw_adjoint if self._adamw else self._sgd_adjoint, []
        for record, u in zip(reversed(self.records), adjoint(v[part], part), strict=True):
            products += [torch.dot(u, grad[part]) for _, grad in reversed(record.domain_grads)]
        return torch.stack(products[::-1])

    def _sgd_adjoint(self, v: Tensor, part: slice):
        """dL_meta / d clipped gradient of these parameters, from the newest step to the oldest."""
        group = self.optimizer.param_groups[0]
        phi, buffer = v.clone(), torch.zeros_like(v)  # adjoints of the parameters and of the momentum buffer
        for record in reversed(self.records):
            buffer.sub_(phi, alpha=record.lr)  # phi_n = phi_(n-1) - lr * b_n
            # b_n = momentum * b_(n-1) + (1 - dampening) * (g_n + weight_decay * phi_(n-1)); torch starts with b = g
            grad = buffer * (1 - group["dampening"])
            phi.add_(grad, alpha=group["weight_decay"])
            yield grad
            buffer.mul_(group["momentum"])

    def _adamw_adjoint(self, v: Tensor, part: slice):
        """dL_meta / d clipped gradient of these parameters, from the newest step to the oldest."""
        group = self.optimizer.param_groups[0]
        (beta1, beta2), eps = group["betas"], group["eps"]
        m, square, after = self._start["exp_avg"][part], self._start["exp_avg_sq"][part], []
        for record in self.records:
            grad = record.gradient(part)
            m, square = m.lerp(grad, 1 - beta1), (square * beta2).addcmul_(grad, grad, value=1 - beta2)
            after.append((m, square, grad))
        first, second = torch.zeros_like(v), torch.zeros_like(v)  # adjoints of m and v
        decay = 1.0  # the adjoint of phi_n is v times this: phi_n = (1 - lr * weight_decay) * phi_(n-1) - lr * step
        for record, count in zip(reversed(self.records), range(self._count + len(self.records), 0, -1), strict=False):
            m, square, grad = after.pop()
            bias1, root2 = 1 - beta1**count, math.sqrt(1 - beta2**count)
            # step = (m_n / bias1) / denominator,  denominator = root / root2 + eps,  root = sqrt(v_n). Where root is
            # 0, so are m_n and every gradient so far: there it may be any number.
            root = square.sqrt_().clamp_(min=torch.finfo(square.dtype).tiny)
            denominator = root + eps * root2
            slope = v / denominator  # up to numbers
            first.sub_(slope, alpha=decay * record.lr * root2 / bias1)
            # d denominator / d v_n = 1 / (2 * root * root2)
            slope.mul_(m).div_(denominator).div_(root)
            second.add_(slope, alpha=decay * record.lr * root2 / (2 * bias1))
            # m_n = beta1 * m_(n-1) + (1 - beta1) * g_n,  v_n = beta2 * v_(n-1) + (1 - beta2) * g_n ** 2
            yield (first * (1 - beta1)).addcmul_(grad, second, value=2 * (1 - beta2))
            first.mul_(beta1)
            second.mul_(beta2)
            decay *= 1 - record.lr * group["weight_decay"]


def _through_clipping(products: Tensor, record: StepRecord) -> Tensor:
    """< dL_meta / dg_n , g_nk > from the same with the clipped g_n: clipping scales by max_norm / |g_n|, and |g_n|
    depends on g_n too. One entry for each micro-batch, before and after; their sums are the products with g_n."""
    if record.clip == 1.0:
        return products
    total = record.unclipped()
    along = collectives.all_reduce_sum(torch.stack([grad @ total for _, grad in record.domain_grads]))  # < g_n , g_nk >
    return record.clip * (products - along * products.sum() / along.sum())
