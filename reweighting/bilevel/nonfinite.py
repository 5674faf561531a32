"""Steps that are left out because a loss or a gradient is not finite: what is known of them."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from reweighting.data.chains import Chain
from reweighting.distributed import collectives
from reweighting.files import atomic_write_text


@dataclass(frozen=True)
class MicroBatch:
    """What is known of a micro-batch after its backward pass.

    Attributes:
        chains: Its chains on this process.
        loss: Its loss, a scalar.
        finite: Whether loss and gradient are finite on this process, a bool scalar.
    """

    chains: Sequence[Chain]
    loss: Tensor
    finite: Tensor


@dataclass(frozen=True)
class NonFinite:
    """A step that was left out.

    Attributes:
        level: "lower" or "upper".
        losses: The losses of its micro-batches, as text since JSON has no NaN.
        rows: Where the chains of its non-finite micro-batches come from.
        images: Their images.
        parameters: The parameters whose gradient is not finite.
    """

    level: str
    losses: list[str]
    rows: list[str]
    images: list[str]
    parameters: list[str]

    @classmethod
    def collect(cls, level: str, micro_batches: Sequence[MicroBatch], gradients: dict[str, Tensor]) -> "NonFinite":
        """Describe a step from what this process knows. Every process calls it, since losses are summed over them.

        Args:
            level: "lower" or "upper".
            micro_batches: Those of the step.
            gradients: {parameter: gradient} of the step.
        """
        bad = [chain for one in micro_batches if not one.finite for chain in one.chains]
        return cls(
            level,
            losses=[str(collectives.all_reduce_sum(one.loss).item()) for one in micro_batches],
            rows=[chain.source_location for chain in bad],
            images=[str(image) for chain in bad for image in chain.images],
            parameters=[name for name, gradient in gradients.items() if not gradient.isfinite().all()],
        )

    @classmethod
    def merge(cls, faults: Sequence["NonFinite"]) -> "NonFinite":
        """Merge what the processes know of the same step, each of its own part of the chains."""
        first = faults[0]
        names = ("rows", "images", "parameters")
        merged = {name: list(dict.fromkeys(item for one in faults for item in getattr(one, name))) for name in names}
        return cls(first.level, first.losses, **merged)

    def file_name(self, step: int) -> Path:
        """Return the path of its file in the output folder."""
        return Path("diagnostics") / f"nonfinite-{step:08d}-{self.level}.json"

    def write(self, path: Path, step: int, more: dict[str, Any]) -> None:
        """Write it and `more` as JSON."""
        path.parent.mkdir(exist_ok=True)
        atomic_write_text(path, json.dumps({"step": step, **asdict(self), **more}, indent=1) + "\n")

    def __str__(self) -> str:
        what = "training loss or its gradient" if self.level == "lower" else "meta loss or its hypergradient"
        return f"the {what} is not finite ({', '.join(self.losses)}) with {'; '.join(self.rows)}"
