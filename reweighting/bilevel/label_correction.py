"""Labels that the upper level corrects, after DreamPRM-Code (arXiv 2512.15000).

A Monte Carlo label p of a step is the share of some rollouts that were correct: an estimate of the chance that a
rollout is correct. The upper level moves it to where the meta loss falls, within bounds:

    interval    the 95 % confidence interval of that chance (Wilson, 1927): labels of many rollouts hardly move
    published   from 0 to 1, as in the paper, whose labels are free parameters

The last step of an answer is no estimate: a label of 0 or 1 there is whether the answer is correct, and does not move.
Some chains end before their answer. Their last label is an estimate as all others: it is known by more than one rollout
behind a step that states no answer.

Both losses of a step are linear in p but for a term without phi. Hence the slope of the label is the derivative of one
more number of the step along the direction that gives the weights their slopes (`losses.label_costs`).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from scipy.special import ndtri
from torch import Tensor, nn

from reweighting.bilevel.evidence import CONFIDENCE
from reweighting.bilevel.instance_evidence import InstanceEvidence
from reweighting.data.answers import final_answer
from reweighting.data.chains import Chain
from reweighting.modeling.collate import Batch

LabelBounds = Literal["interval", "published"]


class LabelSlopes(NamedTuple):
    """What a window tells of the labels.

    Attributes:
        gradient: dL_meta / dp, [L]; 0 for labels that the window has not met.
        times_met: How often it has met each of them, [L] int64 on the CPU.
    """

    gradient: Tensor
    times_met: Tensor


def wilson_interval(labels: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the confidence interval of the chance that a rollout is correct.

    Args:
        labels: Shares of correct rollouts, [L] float64.
        times: The numbers of rollouts, [L] float64.

    Returns:
        Its lower and upper ends, [L]; the label lies between them.
    """
    z = float(ndtri((1 + CONFIDENCE) / 2))
    # Numerator and denominator are times n: no quotient overflows, however small or large n is.
    middle = labels * times + z * z / 2
    half = z * (labels * (1 - labels) * times + z * z / 4).sqrt()
    low, high = (middle - half) / (times + z * z), (middle + half) / (times + z * z)
    return low.clamp(min=0).minimum(labels), high.clamp(max=1).maximum(labels)


def states_verdict(chain: Chain, times: float) -> bool:
    """Tell whether the last label of a chain is whether its answer is correct, and not the share of some rollouts.

    Args:
        chain: A training chain.
        times: The rollouts behind its last label; NaN where they are not known.

    Returns:
        True for a label of 0 or 1, unless it is known of several rollouts and its step states no answer: after a step
        that does, all rollouts are the same.
    """
    if chain.targets[-1] not in (0, 1):
        return False
    return not times > 1 or final_answer(chain.steps[-1]) is not None


def training_ids(batch: Batch) -> Tensor:
    """Return the numbers of a batch's chains among all training chains, [B] int64 on the CPU.

    Raises:
        ValueError: The batch does not say them.
    """
    if batch.chain_ids is None:
        raise ValueError("the batch does not say which training chains it holds")
    return batch.chain_ids


class StepLabels(nn.Module):
    """The labels of all steps of the training chains, [L], one chain after the other; 0 for unlabelled steps.

    Args:
        chains: All training chains.
        bounds: How far the labels may move.
        default_times: Rollouts behind the labels of which that is not known.

    Attributes:
        labels: As they are now.
        start: As the data have them.
        low, high: Bounds of each; equal where a label is certain or there is none.
        first: The place of each chain's first step, [C] on the CPU.
        times: The rollouts behind each, [L] on the CPU; NaN where they are not known.
        unknown: The places of labels that have no bounds, since the rollouts behind them are not known.
        movable: How many labels are estimates.
    """

    start: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, chains: Sequence[Chain], bounds: LabelBounds, default_times: float | None = None):
        super().__init__()
        nan = float("nan")
        lengths = torch.tensor([len(chain.steps) for chain in chains])
        self.first = lengths.cumsum(0) - lengths
        start = torch.tensor([target for chain in chains for target in chain.targets], dtype=torch.float64)
        times = [n for chain in chains for n in chain.times or [nan] * len(chain.steps)]
        times = torch.tensor(times, dtype=torch.float64).nan_to_num(nan=default_times or nan)
        last = self.first + lengths - 1  # [C]
        free = ~start.isnan()
        pairs = zip(chains, times[last].tolist(), strict=True)
        free[last] &= torch.tensor([not states_verdict(chain, n) for chain, n in pairs], dtype=torch.bool)
        if bounds == "interval":
            low, high = wilson_interval(start, times)
        else:
            low, high = torch.zeros_like(start), torch.ones_like(start)
        start, self.times = start.nan_to_num(nan=0.0), times
        self.unknown = (free & low.isnan()).nonzero().squeeze(1)
        self.movable = int(free.sum())
        self.labels = nn.Parameter(start.float())
        self.start = nn.Buffer(start.float(), persistent=False)
        # Rounding must not put a label outside its own bounds.
        self.low = nn.Buffer(torch.where(free, low, start).float().minimum(self.start), persistent=False)
        self.high = nn.Buffer(torch.where(free, high, start).float().maximum(self.start), persistent=False)

    def __len__(self) -> int:
        """Return L."""
        return len(self.labels)

    def places(self, batch: Batch) -> Tensor:
        """Find the labels of a batch of training chains: their places in [L], [B, S] int64 on the CPU; -1 for none."""
        return torch.where(batch.target_mask.cpu(), self._step_places(batch), -1)

    def corrected(self, batch: Batch) -> Batch:
        """Return a batch of training chains with the labels as they are now."""
        places = self._step_places(batch).clamp(max=len(self) - 1).to(batch.targets.device)  # [B, S]
        labels = self.labels.detach()[places].to(batch.targets.dtype)
        return replace(batch, targets=torch.where(batch.target_mask, labels, batch.targets))

    def _step_places(self, batch: Batch) -> Tensor:
        """The places of a batch's steps, [B, S] on the CPU; behind a chain's last step, those of others."""
        return self.first[training_ids(batch)][:, None] + torch.arange(batch.targets.shape[1])

    @torch.no_grad()
    def bound_(self) -> None:
        """Move each label to the nearest place within its bounds."""
        self.labels.copy_(self.labels.maximum(self.low).minimum(self.high))


class LabelCorrection:
    """How the labels follow the windows' slopes.

    Args:
        table: The labels.
        optimizer: Over them: each window adds a step, from which a label is moved back to its bounds. None for the calm
            rule: a label is a function of all windows so far, and moves half of the way to the end of its interval for
            each standard deviation of the true slopes that its own is estimated at (`instance_evidence.py`).
    """

    def __init__(self, table: StepLabels, optimizer: torch.optim.Optimizer | None):
        self.table, self.optimizer = table, optimizer
        self.evidence = InstanceEvidence(torch.zeros(len(table), dtype=torch.int64))

    def add(self, slopes: LabelSlopes) -> None:
        """Count a window whose slopes are finite."""
        self.evidence.add(slopes.gradient, slopes.times_met)
        self.table.labels.grad = slopes.gradient.to(self.table.labels)

    @torch.no_grad()
    def step(self) -> None:
        """Move the labels after `add`."""
        table = self.table
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        else:
            share = (self.evidence.true_slopes() / 2).clamp(-1, 1).to(table.labels)  # [L], of the way to either end
            way = torch.where(share > 0, table.high - table.start, table.start - table.low)
            table.labels.copy_(table.start + share * way)
        table.bound_()

    def state_dict(self) -> dict[str, Any]:
        """Return labels, evidence and the optimizer's state as plain containers of tensors."""
        optimizer = {} if self.optimizer is None else self.optimizer.state_dict()["state"]
        return {
            "labels": self.table.labels.detach().cpu(),
            "evidence": self.evidence.state_dict(),
            "optimizer": optimizer,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave.

        Raises:
            ValueError: It is of other labels.
        """
        labels = state["labels"]
        if labels.shape != self.table.labels.shape:
            raise ValueError(f"it has {len(labels)} labels, and the data have {len(self.table)}")
        self.table.labels.copy_(labels)
        self.evidence.load_state_dict(state["evidence"])
        if self.optimizer is not None:
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})
