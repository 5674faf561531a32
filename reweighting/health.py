"""What a run watches about itself: numbers that are not finite, and domain weights that collapse."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from reweighting import processes
from reweighting.chains import Chain
from reweighting.folders import write_whole

LEAST_WEIGHT = 0.05  # a domain below takes no part any more


@dataclass(frozen=True)
class MicroBatch:
    """The chains of a micro-batch, its loss (a scalar) and whether loss and gradient are finite (a bool scalar)."""

    chains: Sequence[Chain]
    loss: Tensor
    finite: Tensor


@dataclass(frozen=True)
class NonFinite:
    """A step of a level ("lower" or "upper") that was left out because a loss or gradient was not finite.

    losses: of its micro-batches, as text since JSON has no NaN. rows: where the chains of those that are not finite
    come from; images: their images. parameters: the parameters whose gradient is not finite.
    """

    level: str
    losses: list[str]
    rows: list[str]
    images: list[str]
    parameters: list[str]

    @classmethod
    def found(cls, level: str, micro_batches: Sequence[MicroBatch], gradients: dict[str, Tensor]) -> "NonFinite":
        """What there is to say about micro-batches and the sum of their gradients, {parameter: gradient}. Every process
        calls it: the losses are those of all."""
        bad = [chain for one in micro_batches if not one.finite for chain in one.chains]
        return cls(
            level,
            [str(processes.summed(one.loss).item()) for one in micro_batches],
            [chain.place for chain in bad],
            [str(chain.image) for chain in bad if chain.image is not None],
            [name for name, gradient in gradients.items() if not gradient.isfinite().all()],
        )

    @classmethod
    def together(cls, faults: Sequence["NonFinite"]) -> "NonFinite":
        """One of all processes' faults in the same step, each of which knows its own share of the chains."""
        first = faults[0]
        names = ("rows", "images", "parameters")
        joined = {name: list(dict.fromkeys(item for one in faults for item in getattr(one, name))) for name in names}
        return cls(first.level, first.losses, **joined)

    def file_name(self, step: int) -> Path:
        """Its file in the output folder."""
        return Path("diagnostics") / f"nonfinite-{step:08d}-{self.level}.json"

    def write(self, path: Path, step: int, more: dict) -> None:
        """Write all of it, and `more`, as JSON."""
        path.parent.mkdir(exist_ok=True)
        write_whole(path, json.dumps({"step": step, **asdict(self), **more}, indent=1) + "\n")

    def __str__(self) -> str:
        what = "training loss or its gradient" if self.level == "lower" else "meta loss or its hypergradient"
        return f"the {what} is not finite ({', '.join(self.losses)}) with {'; '.join(self.rows)}"


def collapsed(weights: dict[str, float]) -> dict[str, str]:
    """What is wrong, in words, with each domain whose weight (mean 1) has all but lost or won everything."""
    half = len(weights) / 2
    words = {}
    for domain, weight in weights.items():
        if weight < LEAST_WEIGHT:
            words[domain] = f"{domain} has all but no weight ({weight:.3f})"
        elif weight > half and len(weights) > 2:  # of two domains, one always has half or more
            words[domain] = f"{domain} has more than half of all the weight ({weight:.2f} of {len(weights)})"
    return words
