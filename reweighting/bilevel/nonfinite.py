"""What a run watches about itself: numbers that are not finite, and domain weights that collapse."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from reweighting.data.chains import Chain
from reweighting.distributed import collectives
from reweighting.files import atomic_write_text


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
    def collect(cls, level: str, micro_batches: Sequence[MicroBatch], gradients: dict[str, Tensor]) -> "NonFinite":
        """What there is to say about micro-batches and the sum of their gradients, {parameter: gradient}. Every process
        calls it: the losses are those of all."""
        bad = [chain for one in micro_batches if not one.finite for chain in one.chains]
        return cls(
            level,
            [str(collectives.all_reduce_sum(one.loss).item()) for one in micro_batches],
            [chain.source_location for chain in bad],
            [str(chain.image) for chain in bad if chain.image is not None],
            [name for name, gradient in gradients.items() if not gradient.isfinite().all()],
        )

    @classmethod
    def merge(cls, faults: Sequence["NonFinite"]) -> "NonFinite":
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
        atomic_write_text(path, json.dumps({"step": step, **asdict(self), **more}, indent=1) + "\n")

    def __str__(self) -> str:
        what = "training loss or its gradient" if self.level == "lower" else "meta loss or its hypergradient"
        return f"the {what} is not finite ({', '.join(self.losses)}) with {'; '.join(self.rows)}"
