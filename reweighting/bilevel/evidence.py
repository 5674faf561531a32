"""How sure a run is of what each domain does to the meta loss.

Every window gives the hypergradient dL_meta / dw [K]. The *slope* of a domain is what it says about that domain against
the others: the fall of the meta loss for each unit of weight, less the mean over domains, divided by the root mean
square over domains of this window. Divided, so that every window counts alike: hypergradients shrink with the learning
rate, and grow tenfold within a run of the demo, as the model fits its rows more closely.

The mean over n windows has the standard error s / sqrt(n_eff), with s the standard deviation between windows, as if two
more had contradicted each other (of two domains, few windows often agree exactly by chance), and

    n_eff  =  min( n (1 - rho) / (1 + rho),  W - 1 )

- rho is the correlation of neighbouring windows, over all domains, as the model of an autoregression of order 1 has it.
- W is the number of windows in one pass over the different meta answers. More windows than W repeat these answers:
  their average approaches the slope on this meta set, not on all answers that it was drawn from. A window holds a
  1/W of the set, so that its variance is about (W - 1) times that of the whole set.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from scipy.special import stdtrit
from torch import Tensor

Verdict = Literal["helps", "hurts", "cannot be told"]

CONFIDENCE = 0.95  # of each domain's interval, hence of each domain's verdict
MIN_WINDOWS = 4  # below, a standard deviation means nothing
DOUBT = 2  # windows that are taken to contradict each other
ROUNDING = 1e-6  # of a hypergradient, relative to the largest: it is computed in float32


@dataclass(frozen=True)
class Slopes:
    """What the windows so far tell, all [K] in float64.

    Attributes:
        mean: The mean slope; positive where more weight lowers the meta loss.
        standard_error: Of the mean; infinite where it cannot be told.
        half_width: Half of the confidence interval's length.
    """

    mean: Tensor
    standard_error: Tensor
    half_width: Tensor

    @property
    def verdicts(self) -> list[Verdict]:
        """What each domain does, at the confidence level."""
        pairs = zip(self.mean.tolist(), self.half_width.tolist(), strict=True)
        return ["cannot be told" if abs(m) <= half else "helps" if m > 0 else "hurts" for m, half in pairs]

    def by_domain(self, domains: list[str]) -> dict[str, dict[str, Any]]:
        """Return slope, standard error, t, interval and verdict of each domain, as JSON has them.

        Args:
            domains: The K domain names.

        Returns:
            {domain: {"slope", "standard_error", "t", "interval", "verdict"}}; what cannot be told is None.
        """
        columns = (self.mean, self.standard_error, self.half_width)
        rows = zip(domains, *(column.tolist() for column in columns), self.verdicts, strict=True)
        table = {}
        for domain, slope, error, half, verdict in rows:
            known = math.isfinite(error)
            table[domain] = {
                "slope": slope,
                "standard_error": error if known else None,
                "t": slope / error if known and error > 0 else None,
                "interval": [slope - half, slope + half] if known else None,
                "verdict": verdict,
            }
        return table


def divide_by_scale_(slopes: Tensor, largest: Tensor) -> bool:
    """Divide the slopes of a window, in place, by their root mean square, so that every window counts alike.

    Args:
        slopes: Less the mean that they are compared with.
        largest: The largest slope before that, a scalar.

    Returns:
        Whether they tell anything; slopes that differ by rounding only are left as they are.
    """
    scale = slopes.square().mean().sqrt()
    if scale <= ROUNDING * largest:
        return False
    slopes /= scale
    return True


class SlopeEvidence:
    """Running statistics of the windows' slopes.

    Args:
        domains: The number of domains, K.
        windows_per_pass: W, windows in one pass over the different meta answers; at 1 or less, every window holds all
            of them, and nothing can be told.
    """

    def __init__(self, domains: int, windows_per_pass: float):
        self.windows_per_pass = windows_per_pass
        self.count = 0  # windows, n
        zeros = torch.zeros(domains, dtype=torch.float64)
        # Of the slopes x_1 to x_n: the sums of x_i, x_i^2 and x_i x_(i-1), the first and the last.
        self.sums = {name: zeros.clone() for name in ("total", "squares", "lagged", "first", "last")}

    def add(self, hypergradient: Tensor) -> Tensor:
        """Count a window, unless its domains differ by rounding only: then it tells nothing.

        Args:
            hypergradient: dL_meta / dw [K], finite.

        Returns:
            The window's slopes [K], float64 on the CPU: of mean 0 and mean square 1, or all 0 if it is not counted.
        """
        x = -hypergradient.detach().to("cpu", torch.float64)
        largest = x.abs().max()
        x -= x.mean()
        if not divide_by_scale_(x, largest):
            return torch.zeros_like(x)
        sums = self.sums
        sums["total"] += x
        sums["squares"] += x.square()
        sums["lagged"] += x * sums["last"]
        if self.count == 0:
            sums["first"] = x
        sums["last"] = x
        self.count += 1
        return x

    @property
    def mean(self) -> Tensor:
        """The mean slope [K]."""
        return self.sums["total"] / max(self.count, 1)

    @property
    def mean_square(self) -> Tensor:
        """The mean of the squared slopes [K]."""
        return self.sums["squares"] / max(self.count, 1)

    def correlation(self) -> float:
        """Return the correlation of neighbouring windows, over all domains, at least 0.

        The estimate from n windows is too small by about (1 + 4 rho) / n (Marriott and Pope, 1954), which is added.
        """
        n, m, sums = self.count, self.mean, self.sums
        spread = (sums["squares"] - n * m.square()).sum().item()
        if n < MIN_WINDOWS or spread <= 0:
            return 0.0
        neighbours = sums["lagged"] - m * (2 * sums["total"] - sums["first"] - sums["last"]) + (n - 1) * m.square()
        rho = neighbours.sum().item() / spread
        return min(max(rho + (1 + 4 * rho) / n, 0.0), 0.99)

    def independent_windows(self) -> float:
        """Return n (1 - rho) / (1 + rho): so many independent windows would tell as much about this meta set."""
        rho = self.correlation()
        return self.count * (1 - rho) / (1 + rho)

    def effective_windows(self) -> float:
        """Return n_eff, bounded by what the meta set can tell; 0 where it tells nothing."""
        return max(min(self.independent_windows(), self.windows_per_pass - 1), 0.0)

    def slopes(self) -> Slopes:
        """Return each domain's mean slope with its standard error and confidence interval."""
        n, effective, freedom = self.count, self.effective_windows(), self.independent_windows() - 1
        unknown = torch.full_like(self.mean, torch.inf)
        if n < MIN_WINDOWS or effective <= 0 or freedom <= 0:
            return Slopes(self.mean, unknown, unknown)
        doubt = DOUBT * self.mean_square  # the squares of windows that contradict each other
        variance = ((self.mean_square - self.mean.square()).clamp(min=0) * n + doubt) / (n - 1)
        standard_error = (variance / effective).sqrt()
        return Slopes(self.mean, standard_error, standard_error * float(stdtrit(freedom, (1 + CONFIDENCE) / 2)))

    def state_dict(self) -> dict[str, Any]:
        """Return the statistics as tensors and a number."""
        return {"count": self.count, **self.sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave.

        Raises:
            ValueError: It is of another number of domains.
        """
        sums = {name: state[name] for name in self.sums}
        for name, value in sums.items():
            if value.shape != self.sums[name].shape or value.dtype != torch.float64:
                raise ValueError(f"the evidence's {name} is {value.dtype} of shape {tuple(value.shape)}")
        self.count, self.sums = state["count"], {name: value.clone() for name, value in sums.items()}
