"""`--hypergradient auto`: the most exact way that the device's memory allows.

    window              keeps a gradient [P] for each micro-batch of a window: P trained parameters in float32
    jvp                 keeps the micro-batches and finds slopes in forward mode (`replay.py`)
    finite_difference   the same from two forward passes, where the model's kernels have no forward mode
"""

from collections.abc import Callable

from reweighting.memory_estimate import FLOAT, MemoryEstimate

SPARE = 0.9  # of the free memory may be planned for
PLENTY = 0.25  # of it: where the kept gradients take no more, nothing needs to be estimated


def has_forward_mode(attention: str, base_4bit: bool) -> bool:
    """Whether forward-mode differentiation can go through a model: through plain arithmetic, to which sdpa falls back,
    but neither through flash attention's kernels nor through those for 4-bit weights."""
    return attention in ("sdpa", "eager") and not base_4bit


def plan_hypergradient(
    trained: int,
    vectors: int,
    optimizer: str,
    free: int,
    forward_mode: bool,
    rest: Callable[[], MemoryEstimate],
) -> tuple[str, str]:
    """The way and the reason, in words.

    trained: parameters. vectors: that a window keeps. free: bytes of the device that are not taken, the weights
    being there already. forward_mode: whether there is one. rest: gives the estimate of the run without kept
    gradients; asked for only where it may matter.
    """
    kept = FLOAT * trained * (vectors + (2 if optimizer == "adamw" else 0))
    words = f"{vectors} kept gradients take {_amount(kept)} of {_amount(free)} that are free"
    if kept <= PLENTY * free:
        return "window", words
    estimate = rest()
    others = estimate.total - estimate.weights
    words += f", and the rest of the run {_amount(others)}"
    if kept + others <= SPARE * free:
        return "window", words
    if forward_mode:
        return "jvp", words
    return "finite_difference", f"{words}; there is no forward mode through this model's kernels"


def _amount(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
