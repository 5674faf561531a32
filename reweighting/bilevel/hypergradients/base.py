"""The protocol that every method for the hypergradient implements, and the arithmetic that methods share.

Notation, here and in the other files of this package:

    P, phi    the trained parameters as one flat vector [P]; phi_n: after optimizer step n of a window
    K, w      the domains and their weights [K]
    N, M      optimizer steps in a window; micro-batches in a step, each of one domain
    g_nk      gradient [P] of the unweighted loss of one of step n's micro-batches, of domain k, divided by M
    g_n       sum over step n's micro-batches of w_k g_nk: the step's gradient, before clipping
    v         dL_meta / dphi_N [P], the meta gradient at the end of the window
    u_n       dL_meta / dg_n [P]

The lower loss is linear in the weights, hence so is every step's gradient, and

    dL_meta / dw_k  =  sum over the window's micro-batches of domain k of < u_n , g_nk >

The methods differ in how they find these products. All leave out that g_n itself depends on phi_(n-1) (the Hessian of
the lower loss): a term of second order in the learning rate.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from reweighting.bilevel.label_correction import LabelSlopes
from reweighting.modeling.collate import Batch

FetchBatch = Callable[
    [int], tuple[int, Batch]
]  # number of a micro-step, from 0 -> (domain, micro-batch), the same each time


@dataclass(frozen=True)
class WindowSize:
    """The sizes that a method's memory depends on.

    Attributes:
        vector: Bytes of one vector [P], or of the part of it that one process holds.
        steps: Optimizer steps in a window, N.
        micro_batches: Micro-batches in a step, M.
        batch: Bytes of one micro-batch with its image features.
        partial: Whether a process's gradients are of its part of each batch only, so that the sum over processes is a
            vector of its own.
        clipped: Whether steps are clipped.
        device: Type of the device that computes, "cpu" or "cuda".
    """

    vector: int
    steps: int
    micro_batches: int
    batch: int = 0
    partial: bool = False
    clipped: bool = False
    device: str = "cpu"


class WindowMemory(NamedTuple):
    """Bytes that a method takes on one process.

    Attributes:
        kept: At the end of a window, beside model and optimizer.
        compute: For a moment in `compute`, beside `kept`, the meta gradient and the forward passes.
    """

    kept: int
    compute: int


class Hypergradient(Protocol):
    """How the meta loss at the end of a window of optimizer steps depends on the domain weights.

    The lower level reports each micro-batch and each step; the upper level asks for the result. Add a method as a file
    of its own and a line in `hypergradients/__init__.py`.

    Attributes:
        times_met: After `compute`, how often the window met each chain, [C] int64 on the CPU; None where domains
            have the weights.
        label_slopes: After `compute`, those of the labels; None where labels are not corrected.
    """

    times_met: Tensor | None = None
    label_slopes: LabelSlopes | None = None

    @abstractmethod
    def add_micro_batch(self, micro_step: int, domain: int, batch: Batch, gradient: Sequence[Tensor]) -> None:
        """Take note of a micro-batch of the current step.

        Args:
            micro_step: Its number in the run, from 0.
            domain: Its domain, from 0 to K - 1.
            batch: This process's part of it.
            gradient: w_k g_nk of this process's part, a tensor for each parameter.
        """

    @abstractmethod
    def close_step(self, gradient: Tensor, clip_factor: float, learning_rate: float) -> None:
        """End the current step, after the optimizer has made it.

        Args:
            gradient: g_n [P] of all processes, before clipping. Its memory is used again: copy what is kept.
            clip_factor: What clipping multiplied it with, at most 1.
            learning_rate: The step's learning rate.
        """

    @abstractmethod
    def drop_step(self) -> None:
        """Forget the micro-batches of the current step, which the optimizer does not make."""

    @abstractmethod
    def compute(self, v: Tensor, weights: Tensor) -> Tensor:
        """Return the hypergradient and begin the next window.

        Args:
            v: dL_meta / dphi_N [P], of all processes; may be overwritten.
            weights: The weights that held in the window: of the domains [K], or of the chains [C].

        Returns:
            dL_meta / dw, as long as `weights`, the same in every process.
        """

    @abstractmethod
    def state(self) -> dict:
        """Return the window so far as plain containers of tensors and numbers, between two steps.

        It is complete on rank 0, for any number of processes to resume from. Every process calls it.
        """

    @abstractmethod
    def load(self, state: dict, fetch_batch: FetchBatch) -> None:
        """Continue the window of a state, on as many processes as there are now.

        Args:
            state: From `state`.
            fetch_batch: Gives the micro-batches of its steps again.

        Raises:
            ValueError: Another method has written it.
        """

    @abstractmethod
    def memory_bytes(self, window: WindowSize) -> WindowMemory:
        """Return what the method takes with windows of this size."""


def steps_in_state(state: dict, key: str) -> list[dict]:
    """Return the saved steps under a method's own key.

    Raises:
        ValueError: The state has no such key: another method has written it.
    """
    if key not in state:
        raise ValueError("--hypergradient can be changed between windows only, and this is inside one")
    return state[key]


def through_clipping(products: Tensor, along: Tensor, clip_factor: float, weights: Tensor | float = 1.0) -> Tensor:
    """Differentiate through gradient clipping.

    Clipping scales g_n by max_norm / |g_n|, and |g_n| depends on the weights too.

    Args:
        products: < dL_meta / d clipped g_n , g > for each weighted gradient g that a clipped step sums, [n].
        along: < g_n , g > for each of them, [n]; any multiple of it will do.
        clip_factor: max_norm / |g_n|.
        weights: What the sum multiplies each g with, [n]; 1 where g is w_k g_nk already.

    Returns:
        < u_n , g >, [n]. Multiplied with the weights they sum to 0: a larger g_n of the same direction makes the same
        step.
    """
    return clip_factor * (products - along * (weights * products).sum() / (weights * along).sum())


def sum_by_domain(products: Tensor, domains: Sequence[int], weights: Tensor) -> Tensor:
    """Sum the products of a window's micro-batches over each domain.

    Args:
        products: < u_n , w_k g_nk > for each micro-batch of the window.
        domains: The domain of each of them.
        weights: The domain weights [K] that held in the window.

    Returns:
        dL_meta / dw [K]. It is 0 for a weight that has become 0 to the last bit: its raw parameter has no slope either.
    """
    sums = products.new_zeros(len(weights))
    for domain, product in zip(domains, products, strict=True):  # in a fixed order: the same bits on every rank
        sums[domain] += product
    weights = weights.detach().to(products.dtype)
    return torch.where(weights > 0, sums / weights, 0)
