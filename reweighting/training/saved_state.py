"""The form of a checkpoint's `state.pt` and `history.jsonl`: what is loaded must have it.

Right checksums do not prove that a run wrote the files: anyone can compute them.
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, JsonValue, NonNegativeInt, PositiveInt
from torch import Tensor

from reweighting.training.random_states import check_random_states

Seconds = Annotated[FiniteFloat, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, arbitrary_types_allowed=True)


class EvidenceState(_Strict):
    """What `SlopeEvidence` saves; its `load_state_dict` checks the shapes."""

    count: NonNegativeInt
    total: Tensor
    squares: Tensor
    lagged: Tensor
    first: Tensor
    last: Tensor


class InstancesState(_Strict):
    """What `InstanceEvidence` saves; its `load_state_dict` checks the shapes."""

    count: Tensor
    total: Tensor
    squares: Tensor


class LabelsState(_Strict):
    """What `LabelCorrection` saves; its `load_state_dict` checks the shapes."""

    labels: Tensor
    evidence: InstancesState
    optimizer: dict[int, dict[str, Any]]


class ProblemState(_Strict):
    """What both levels save; `BettyProblemAdapter.load_state_dict` checks names and shapes."""

    module: dict[str, Tensor]
    optimizer: dict[int, dict[str, Any]]
    count: NonNegativeInt
    losses: list[Tensor]
    rows_seen: NonNegativeInt = 0
    micro_steps: PositiveInt = 1
    window: dict[str, Any] = {}
    evidence: EvidenceState | None = None
    instances: InstancesState | None = None
    observations: dict[str, Tensor] = {}  # `InstanceNet.load_observations` checks the shapes
    labels: LabelsState | None = None


class SavedState(_Strict):
    """What `ReweightingEngine.state_dict` gives."""

    step: NonNegativeInt
    seconds: Seconds
    domains: list[str]
    scored: NonNegativeInt
    skipped: NonNegativeInt
    meta_losses: list[FiniteFloat]
    warned: list[str]
    settings: dict[str, JsonValue]
    random: dict[str, Any]
    random_of_others: list[dict[str, Any]]
    problems: dict[str, ProblemState]


class HistoryLine(_Strict):
    """A line of `history.jsonl`, one a window."""

    step: NonNegativeInt
    train_loss: FiniteFloat | None
    meta_loss: FiniteFloat | None = None
    weights: dict[str, FiniteFloat]
    slopes: dict[str, FiniteFloat] | None = None
    rows_seen: NonNegativeInt
    seconds: Seconds


def check_state(state: Any, step: int) -> None:
    """Check what was loaded from `state.pt`.

    Args:
        state: the loaded object.
        step: the optimizer step that the manifest names.

    Raises:
        Exception: of one of many kinds, if a run does not write such a state.
    """
    SavedState.model_validate(state)
    if state["step"] != step:
        raise ValueError(f"it is of step {state['step']}, the manifest of step {step}")
    for random in (state["random"], *state["random_of_others"]):
        check_random_states(random)


def check_history(content: bytes, step: int) -> None:
    """Check the content of `history.jsonl`.

    Raises:
        ValueError: if a line is not what a run writes, or later than the checkpoint's `step`.
    """
    lines = [HistoryLine.model_validate_json(line) for line in content.decode().removesuffix("\n").split("\n") if line]
    if lines and lines[-1].step > step:
        raise ValueError(f"it goes up to step {lines[-1].step}, the checkpoint to step {step}")
