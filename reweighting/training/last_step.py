"""What an error in a run leaves: a checkpoint of the last whole step."""

import traceback
from types import TracebackType
from typing import TYPE_CHECKING

from torch.utils.hooks import RemovableHandle

from reweighting.distributed import collectives
from reweighting.errors import UserError
from reweighting.out_of_memory import describe_out_of_memory, is_out_of_memory
from reweighting.terminal import printable
from reweighting.training.random_states import random_states, set_random_states
from reweighting.training.signals import STDERR, Stopped

if TYPE_CHECKING:
    from reweighting.training.engine import ReweightingEngine

LESS_MEMORY = (
    "Lower --batch_size, --meta_batch_size, --max_length or --max_image_side, or give --gradient_checkpointing (a "
    "resumed run needs --allow_changed_settings for that)"
)


class LastWholeStep:
    """While this context is open, any error first saves the last whole step, if there is one and it is not saved.

    A step is whole when its optimizers have run and its history is written. Until the next step's first optimizer runs,
    only counters, random states and what the weights have noted of chains move, and these are set back: what the
    micro-batches of the unfinished step have added up is no part of a checkpoint. From the optimizer's start to the end
    of the step nothing can be saved.

    An error that comes in one of several processes cannot be saved: the others wait for it.

    Args:
        engine: the engine that trains.
    """

    def __init__(self, engine: "ReweightingEngine"):
        self._engine = engine
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> "LastWholeStep":
        self._hooks = [problem.optimizer.register_step_pre_hook(self.leave) for problem in self._engine.problems]
        self.mark()
        return self

    def mark(self) -> None:
        """Note that the engine is between two steps."""
        engine, lower = self._engine, self._engine.lower
        self._engine_now = {"global_step": engine.global_step, "skipped": engine.skipped}
        self._lower_now = {"_count": lower._count, "rows_seen": lower.rows_seen}
        self._observations = lower.weights.observations()
        self._losses, self._updates, self._random = len(lower.losses), engine.updates, random_states()
        self._whole = True

    def leave(self, *_: object) -> None:
        """Note that the step can no longer be undone; its optimizers call this before they change a parameter."""
        self._whole = False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        if error is None or isinstance(error, Stopped):
            return
        out_of_memory = is_out_of_memory(error)
        if out_of_memory:  # the failed step's tensors hang in the frames that its error has passed through
            traceback.clear_frames(trace)
        words = self._save()
        if out_of_memory:
            raise UserError(f"{describe_out_of_memory(error)}. {LESS_MEMORY}. {words}".rstrip()) from error
        if isinstance(error, UserError) and words:
            raise type(error)(f"{error}. {words}") from error
        if words:
            print(f"\n{printable(words)}", file=STDERR)

    def _save(self) -> str:
        """Save the last whole step, and say what is saved; nothing is said where nothing has changed."""
        engine = self._engine
        if not engine.persistent or engine.global_step == engine.saved:
            return ""
        if collectives.world_size() > 1 or not self._whole or engine.updates != self._updates:
            return f"The last checkpoint is of step {engine.saved}" if engine.saved else "No step is saved"
        for name, value in self._engine_now.items():
            setattr(engine, name, value)
        for name, value in self._lower_now.items():
            setattr(engine.lower, name, value)
        engine.lower.weights.load_observations(self._observations)
        del engine.lower.losses[self._losses :]
        set_random_states(self._random)
        try:
            engine.save()
        except UserError as error:  # the error that came first counts
            return f"Saving the run failed: {error}"
        return f"The run is saved at step {engine.saved}: --resume continues from there" if engine.saved else ""
