"""What the windows tell of single chains: a mean slope for each, shrunk by how much the slopes of a chain scatter.

A window meets some of the chains. The slope x of a chain in it is what more weight on the chain would have done to the
meta loss, -dL_meta / dw, against the other chains. It is divided by how often the window met the chain: chains of small
domains come more often, and would differ from the others by that alone. Then the mean of the chain's group in this
window is taken off, and all is divided by the root mean square over all chains of the window, so that every window
counts alike. A chain that is the only one of its group in a window cannot be compared, and the window does not count
for it.

A chain is met a few times only. Its mean slope m over n windows says little by itself, but all chains together tell how
much of the spread of the means is real. The model is the random-effects analysis of variance: chain i has a true slope
of variance tau^2 among chains, and a window adds noise of variance s^2. Then the best guess of the true slope is

    m  n tau^2 / (n tau^2 + s^2)

s^2 comes from the scatter of each chain's windows around their mean, tau^2 from what the means scatter beyond s^2 / n.
Chance alone makes the means scatter more than that now and then. What it would add, `CHANCE` standard errors, is always
taken off tau^2, also where the differences are real: below it tau^2 is 0, and so is every guess; just above it tau^2 is
nearly 0. This soft threshold makes tau^2 too small, and so shrinks the guesses more than the model asks; in return the
weights leave 1 gradually, and do not jump in the window in which chance no longer explains the scatter. With more
windows the part taken off becomes small.
"""

import math
from typing import Any

import torch
from torch import Tensor

from reweighting.bilevel.evidence import divide_by_scale_

CHANCE = 2.0  # standard errors of the variance ratio


class InstanceEvidence:
    """Running sums over the windows so far; on the CPU, in float64.

    Args:
        group_of: The group of each chain, [C] int64: a chain's slope is compared with the group's others.

    Attributes:
        count: In how many windows each chain was met and compared, [C].
        total: The sum of its slopes, [C].
        squares: The sum of all squared slopes, a scalar.
    """

    def __init__(self, group_of: Tensor):
        self.group_of = group_of
        self.count = torch.zeros(len(group_of), dtype=torch.float64)
        self.total = torch.zeros(len(group_of), dtype=torch.float64)
        self.squares = torch.zeros((), dtype=torch.float64)

    def add(self, hypergradient: Tensor, times_met: Tensor) -> None:
        """Count a window.

        Args:
            hypergradient: dL_meta / dw of each chain, [C]; 0 for the chains that the window has not met.
            times_met: How often it has met each of them, [C] on the CPU.
        """
        hypergradient = hypergradient.detach().to("cpu", torch.float64) / times_met.clamp(min=1)
        met = hypergradient.nonzero().squeeze(1)
        sizes = torch.bincount(self.group_of[met])  # [G]
        met = met[sizes[self.group_of[met]] > 1]  # [m]
        if not len(met):
            return
        x, groups = -hypergradient[met], self.group_of[met]
        x -= (torch.zeros(len(sizes), dtype=x.dtype).index_add_(0, groups, x) / sizes)[groups]
        if not divide_by_scale_(x, hypergradient.abs().max()):
            return
        self.count[met] += 1
        self.total[met] += x
        self.squares += x.square().sum()

    @property
    def mean(self) -> Tensor:
        """The mean slope of each chain, [C]; 0 for those never compared."""
        return self.total / self.count.clamp(min=1)

    def true_slopes(self) -> Tensor:
        """Return the best guess of each chain's true slope in units of tau, [C]; 0 for those never compared."""
        seen = self.count > 0
        count, mean = self.count[seen], self.mean[seen]
        chains, windows = len(count), count.sum().item()
        guesses = torch.zeros_like(self.total)
        if chains < 2 or windows - chains < 2:
            return guesses
        between = (count * mean.square()).sum().item()
        noise = (self.squares.item() - between) / (windows - chains)  # s^2
        chance = 1 + CHANCE * math.sqrt(2 / (chains - 1) + 2 / (windows - chains))
        usual_count = (windows - count.square().sum().item() / windows) / (chains - 1)
        variance = (between / (chains - 1) - chance * noise) / usual_count  # tau^2
        if variance > 0:
            guesses[seen] = mean * count * math.sqrt(variance) / (count * variance + noise)
        return guesses

    def state_dict(self) -> dict[str, Any]:
        """Return the sums."""
        return {"count": self.count, "total": self.total, "squares": self.squares}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave.

        Raises:
            ValueError: It is of another number of chains.
        """
        for name, value in self.state_dict().items():
            if state[name].shape != value.shape or state[name].dtype != value.dtype:
                raise ValueError(f"{name} of the instances is {state[name].dtype} of shape {tuple(state[name].shape)}")
            value.copy_(state[name])
