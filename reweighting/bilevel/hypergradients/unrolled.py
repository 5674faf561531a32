"""Keeps the gradient of every micro-batch of a window: the most exact method.

The backward pass of the lower level has already made w_k g_nk, and u_n follows from v by running the optimizer's
elementwise arithmetic backwards over the window (`optimizer_adjoint.py`). Neither an extra forward pass nor a second
derivative of the model is needed. `tests/bilevel/test_unrolled.py` compares with autograd through the unrolled
optimizer.

Of several processes each keeps its own part of every gradient: the products are linear in it and summed over processes.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from reweighting.bilevel.hypergradients.base import (
    FetchBatch,
    Hypergradient,
    WindowMemory,
    WindowSize,
    steps_in_state,
    sum_by_domain,
    through_clipping,
)
from reweighting.bilevel.hypergradients.optimizer_adjoint import (
    AdamWStep,
    adamw_adjoint,
    check_optimizer,
    sgd_adjoint,
)
from reweighting.distributed import collectives
from reweighting.distributed.flat_vectors import flatten
from reweighting.distributed.sharding import Replicated
from reweighting.modeling.collate import Batch

# Entries that the adjoint is run over at a time: on a CPU what a core's cache holds, one chunk on each core; on a GPU,
# few large kernels.
CHUNK = {"cpu": 2**17, "cuda": 2**24}


@dataclass
class UnrolledStep:
    """What one optimizer step leaves behind.

    Attributes:
        domain_grads: (domain, w_k g_nk [P]) for each micro-batch.
        clip_factor: What clipping multiplied their sum with, at most 1.
        learning_rate: The step's learning rate.
        total: g_n [P] of all processes, where it is not the sum of `domain_grads`.
    """

    domain_grads: list[tuple[int, Tensor]]
    clip_factor: float
    learning_rate: float
    total: Tensor | None = None

    def gradient(self, chunk: slice = slice(None)) -> Tensor:
        """Return g_n of these parameters, before clipping."""
        if self.total is not None:
            return self.total[chunk]
        grads = [grad[chunk] for _, grad in self.domain_grads]
        if len(grads) == 1:
            return grads[0]
        total = grads[0] + grads[1]
        for grad in grads[2:]:
            total += grad
        return total

    def clipped_gradient(self, chunk: slice) -> Tensor:
        """Return what the optimizer received, of these parameters."""
        gradient = self.gradient(chunk)
        return gradient if self.clip_factor == 1.0 else gradient * self.clip_factor


class UnrolledHypergradient(Hypergradient):
    """The gradients of the window's micro-batches, and AdamW's moments before the first of its steps.

    The moments after each step follow from these. They are computed again in `compute`, for a chunk of the parameters
    at a time: kept, they would take more memory than the gradients.

    Args:
        optimizer: The lower level's, SGD or AdamW, see `check_optimizer`.
        layout: How the trained parameters lie on the processes.

    Raises:
        ValueError: The optimizer is another one.
    """

    def __init__(self, optimizer: Optimizer, layout: Replicated):
        check_optimizer(optimizer)
        self.optimizer, self.layout = optimizer, layout
        self.steps: list[UnrolledStep] = []
        self._pending: list[tuple[int, Tensor]] = []
        self._buffers: list[Tensor] = []  # of earlier windows: memory that is new to a process costs more than a copy
        self._begin()

    @property
    def _adamw(self) -> bool:
        return isinstance(self.optimizer, AdamW)

    @property
    def _group(self) -> dict:
        return self.optimizer.param_groups[0]

    def _begin(self) -> None:
        """Begin an empty window."""
        self._buffers += [grad for step in self.steps for _, grad in step.domain_grads]
        self.steps = []
        self.drop_step()
        self._moments: dict[str, Tensor] = {}  # AdamW's before the first step, [P] each
        self._count = 0  # AdamW's steps before the first one

    def add_micro_batch(self, micro_step: int, domain: int, batch: Batch, gradient: Sequence[Tensor]) -> None:
        """Keep the gradient as one vector."""
        if self._adamw and not self.steps and not self._pending:
            self._keep_moments()
        self._pending.append((domain, flatten(gradient, self._buffers.pop() if self._buffers else None)))

    def _keep_moments(self) -> None:
        params = self._group["params"]
        states = [self.optimizer.state[param] for param in params]
        self._count = int(states[0].get("step", 0))
        for name in ("exp_avg", "exp_avg_sq"):  # there are none before the first step
            tensors = [state.get(name, torch.zeros_like(param)) for state, param in zip(states, params, strict=True)]
            self._moments[name] = flatten(tensors)

    def close_step(self, gradient: Tensor, clip_factor: float, learning_rate: float) -> None:
        """Keep the step's scalars, and its gradient where that is a sum over processes."""
        total = gradient.clone() if self.layout.partial_gradients else None
        self.steps.append(UnrolledStep(self._pending, clip_factor, learning_rate, total))
        self._pending = []

    def drop_step(self) -> None:
        """Forget the gradients of a step that is not made."""
        self._buffers += [grad for _, grad in self._pending]
        self._pending = []

    def state(self) -> dict:
        """Return gradients, moments and scalars of the window so far, of all processes together."""
        steps = []
        for step in self.steps:
            grads = [(domain, self.layout.gather_local_gradient(grad)) for domain, grad in step.domain_grads]
            steps.append({"domain_grads": grads, "clip": step.clip_factor, "lr": step.learning_rate})
        start = {name: self.layout.gather_full_vector(vector) for name, vector in self._moments.items()}
        return {"steps": steps, "start": start, "count": self._count}

    def load(self, state: dict, fetch_batch: FetchBatch) -> None:
        """Continue the window of a state; each process takes its part of it."""
        self._begin()
        saved_steps = steps_in_state(state, "steps")
        device = self._group["params"][0].device
        shard = self.layout.local_shard_vector
        self._moments = {name: shard(vector).to(device) for name, vector in state["start"].items()}
        self._count = state["count"]
        for saved in saved_steps:
            full = [(domain, shard(grad).to(device)) for domain, grad in saved["domain_grads"]]
            grads = [(domain, self.layout.split_local_gradient(grad)) for domain, grad in full]
            total = torch.stack([grad for _, grad in full]).sum(0) if self.layout.partial_gradients else None
            self.steps.append(UnrolledStep(grads, saved["clip"], saved["lr"], total))

    def compute(self, v: Tensor, weights: Tensor) -> Tensor:
        """Return dL_meta / dw [K] from the kept gradients, and begin the next window."""
        if not self.steps:  # every step was left out
            return v.new_zeros(len(weights))
        size = CHUNK.get(v.device.type, CHUNK["cuda"])
        chunks = [slice(start, start + size) for start in range(0, max(len(v), 1), size)]
        workers = torch.get_num_threads() if v.device.type == "cpu" else 1
        with ThreadPoolExecutor(workers) as pool:
            products = torch.stack(list(pool.map(partial(self._products, v), chunks))).sum(0)
        products = collectives.all_reduce_sum(products).split([len(step.domain_grads) for step in self.steps])
        products = torch.cat([self._through_clipping(*pair) for pair in zip(products, self.steps, strict=True)])
        domains = [domain for step in self.steps for domain, _ in step.domain_grads]
        self._begin()
        return sum_by_domain(products, domains, weights)

    @torch.no_grad()
    def _products(self, v: Tensor, chunk: slice) -> Tensor:
        """< dL_meta / d clipped g_n , w_k g_nk > over a chunk of the parameters, for each micro-batch of the window."""
        learning_rates, products = [step.learning_rate for step in self.steps], []
        if self._adamw:
            newest = self._count + len(self.steps)
            adjoint = adamw_adjoint(v[chunk], self._group, learning_rates, newest, self._adamw_steps(chunk))
        else:
            adjoint = sgd_adjoint(v[chunk], self._group, learning_rates)
        for step, u in zip(reversed(self.steps), adjoint, strict=True):
            products += [torch.dot(u, grad[chunk]) for _, grad in reversed(step.domain_grads)]
        return torch.stack(products[::-1])

    def _adamw_steps(self, chunk: slice) -> list[AdamWStep]:
        """AdamW's moments after each step, computed again from those before the window."""
        beta1, beta2 = self._group["betas"]
        m, square, steps = self._moments["exp_avg"][chunk], self._moments["exp_avg_sq"][chunk], []
        for step in self.steps:
            grad = step.clipped_gradient(chunk)
            m, square = m.lerp(grad, 1 - beta1), (square * beta2).addcmul_(grad, grad, value=1 - beta2)
            steps.append(AdamWStep(m, square, grad))
        return steps

    def _through_clipping(self, products: Tensor, step: UnrolledStep) -> Tensor:
        """< u_n , w_k g_nk > for each micro-batch of a step, [M]."""
        if step.clip_factor == 1.0:
            return products
        total = step.gradient()
        along = torch.stack([grad @ total for _, grad in step.domain_grads])
        return through_clipping(products, collectives.all_reduce_sum(along), step.clip_factor)

    def memory_bytes(self, window: WindowSize) -> WindowMemory:
        """Return what the kept gradients take, and the chunks that the adjoint is run over."""
        gradients = window.steps * (window.micro_batches + window.partial)
        moments = 2 if self._adamw else 0
        chunks = torch.get_num_threads() if window.device == "cpu" else 1
        entry = torch.float32.itemsize
        chunk = min(window.vector, entry * CHUNK.get(window.device, CHUNK["cuda"]) * chunks)
        # Of a chunk: both moments and the gradient after each step, and the adjoints. Of a clipped step: its gradient.
        compute = max(chunk * (3 * window.steps + 8), window.vector if window.clipped else 0)
        return WindowMemory(window.vector * (gradients + moments), compute)
