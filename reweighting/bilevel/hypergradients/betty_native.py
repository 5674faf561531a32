"""Betty's own hypergradient, for comparison: `darts` looks at the last micro-batch of a window and at no other.

It differentiates that micro-batch's loss along the meta gradient by central differences, as in "DARTS: Differentiable
Architecture Search" (arXiv 1806.09055), as though the optimizer had made one step of plain gradient descent.
"""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace

from betty.configs import Config
from betty.hypergradient.darts import darts
from torch import Tensor

from reweighting.bilevel.hypergradients.base import FetchBatch, Hypergradient, WindowMemory, WindowSize
from reweighting.bilevel.losses import LossFunction
from reweighting.distributed import collectives
from reweighting.distributed.flat_vectors import unflatten
from reweighting.modeling.collate import Batch


class BettyNative(Hypergradient):
    """The last micro-batch of the window, for Betty's `darts`.

    Args:
        params: {name: trained parameter}; moved for a moment, and back up to rounding.
        loss: What each of this process's chains adds to a micro-batch's unweighted loss at given parameters, without
            dropout.
    """

    def __init__(self, params: Mapping[str, Tensor], loss: LossFunction):
        self.params, self.loss = params, loss
        self._pending: tuple[int, Batch] | None = None
        self._last: tuple[int, Batch] | None = None

    def add_micro_batch(self, micro_step: int, domain: int, batch: Batch, gradient: Sequence[Tensor]) -> None:
        """Remember the micro-batch until the next one."""
        self._pending = domain, batch

    def close_step(self, gradient: Tensor, clip_factor: float, learning_rate: float) -> None:
        """Take the step's last micro-batch for the window's."""
        self._last = self._pending

    def drop_step(self) -> None:
        """Forget the micro-batch of a step that is not made."""
        self._pending = self._last

    def compute(self, v: Tensor, weights: Tensor) -> Tensor:
        """Return what Betty's `darts` makes of the last micro-batch, [K]."""
        if self._last is None:  # every step was left out
            return v.new_zeros(len(weights))
        domain, last_batch = self._last
        weights = weights.detach().clone().requires_grad_()
        params = list(self.params.values())
        # Betty asks its problems for no more than this.
        lower = SimpleNamespace(
            config=Config(),
            _strategy="default",
            cur_batch=last_batch,
            meta_trainable_parameters=lambda: params,
            training_step_exec=lambda batch: weights[domain] * self.loss(self.params, batch).sum(),
        )
        upper = SimpleNamespace(trainable_parameters=lambda: [weights])
        (gradient,) = darts(unflatten(v, params), lower, upper, sync=False)
        self._pending = self._last = None
        return collectives.all_reduce_sum(gradient.detach())

    def state(self) -> dict:
        """Return nothing: the last micro-batch of a window is always still to come."""
        return {}

    def load(self, state: dict, fetch_batch: FetchBatch) -> None:
        """Begin in the middle of any window."""
        self._pending = self._last = None

    def memory_bytes(self, window: WindowSize) -> WindowMemory:
        """Return the last micro-batch."""
        return WindowMemory(window.batch, 0)
