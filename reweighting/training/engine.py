"""The training loop, on Betty's engine, and what a run writes while it goes.

One iteration is one optimizer step of the lower level. Every `unroll_steps` iterations make a window; at its end Betty
steps the upper level, and a line of history is written. Between two steps the run is complete: it can be saved, stopped
and resumed there, inside a window too.

Several processes make each step together. Before a step they agree on whether its files could be read, after it on
whether to stop; rank 0 writes.
"""

import json
import logging
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from betty.configs import EngineConfig
from betty.engine import Engine
from betty.logging import get_logger
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from reweighting.bilevel.domain_weights import collapsed
from reweighting.bilevel.nonfinite import NonFinite
from reweighting.bilevel.problems import DomainReweighting, PRMFineTuning
from reweighting.distributed import collectives
from reweighting.errors import UnreadableImage, UserError
from reweighting.files import atomic_write_text, open_append
from reweighting.progress import Progress
from reweighting.training.checkpoints import HISTORY_FILE, remove_old, save_checkpoint
from reweighting.training.last_step import LastWholeStep
from reweighting.training.random_states import own_random_states, random_states
from reweighting.training.signals import STDERR, Stopped, StopSignals
from reweighting.training.validation import Validation

get_logger().setLevel(logging.WARNING)  # Betty logs twenty lines of set-up

T = TypeVar("T")
READ_ATTEMPTS = 4  # to read a file: shared storage may be away for a moment
FIRST_PAUSE = 0.5  # seconds before the second attempt; doubles each time


class ReweightingEngine(Engine):
    """Run the two levels, and write `history.jsonl`, `checkpoints/` and `diagnostics/` into the output folder.

    Args:
        lower: the lower problem.
        upper: the upper problem; None for plain fine-tuning.
        domains: the K domain names, in the order of the weights.
        device: where the modules are.
        folder: the output folder.
        iterations: optimizer steps in all.
        save_every: optimizer steps between two checkpoints.
        settings: the run's settings, which every checkpoint remembers.
        keep: newest checkpoints to keep, besides the best one.
        max_skipped_steps: steps that may be skipped because they are not finite.
        validation: the measure by which the best checkpoint is chosen; None chooses it by the meta loss.
        persistent: whether the folder outlives the run, so that the run can be resumed; a dry run's does not.
    """

    # Set by Betty: the problems under their names, and what starts as None in its code.
    lower: PRMFineTuning
    upper: DomainReweighting
    device: torch.device

    def __init__(
        self,
        lower: PRMFineTuning,
        upper: DomainReweighting | None,
        domains: list[str],
        device: torch.device,
        folder: Path,
        iterations: int,
        save_every: int,
        settings: dict[str, Any],
        *,
        keep: int = 2,
        max_skipped_steps: int = 0,
        validation: Validation | None = None,
        persistent: bool = True,
    ):
        self._device = device
        self.domains, self.folder, self.save_every, self.settings = domains, folder, save_every, settings
        self.keep, self.max_skipped_steps = keep, max_skipped_steps
        self.validation, self.persistent = validation, persistent
        # The name that checkpoints carry tells the rows it was measured on by their digest: scores on other rows are
        # not compared with it. The label is for people.
        kind = "best-of-N accuracy on" if validation else "minus the meta loss"
        self.score_name = f"{kind} {settings['validation'][:8]}" if validation else kind
        self.score_label = f"{kind} {validation.source}" if validation else kind
        self.seconds = 0.0
        self.saved = 0  # step of the last checkpoint
        self.scored = 0  # step of the last checkpoint that was due, not forced by a signal or a fault
        self.skipped = 0  # steps that were skipped
        self.meta_losses: list[float] = []  # since the last checkpoint with a score
        self.warned: set[str] = set()  # domains whose collapse was reported
        problems = [lower] if upper is None else [upper, lower]
        edges = {} if upper is None else {"u2l": {upper: [lower]}, "l2u": {lower: [upper]}}
        super().__init__(problems, EngineConfig(train_iters=iterations), {"u2l": {}, "l2u": {}} | edges)

    def configure_systems(self) -> dict[str, Any]:
        """Use this process and the given device; our collectives, not Betty's, talk to the other processes."""
        self.device = self._device
        self._world_size, self._rank, self._local_rank = 1, collectives.rank(), 0
        return {"strategy": "default", "backend": None, "world_size": 1, "rank": self._rank, "local_rank": 0}

    @property
    def reweights(self) -> bool:
        """Whether there is an upper level."""
        return len(self.problems) == 2

    @property
    def updates(self) -> int:
        """How often the weights have been updated."""
        return self.upper.count if self.reweights else 0

    @torch.no_grad()
    def weights(self) -> dict[str, float]:
        """Return the weights that the lower level trains with now: {domain: weight}, mean 1."""
        return dict(zip(self.domains, self.lower.domain_weights().tolist(), strict=True))

    def train_step(self) -> None:
        """Make one optimizer step: as many micro-steps of the lower problem as it accumulates gradients over."""
        for _ in range(self.lower.gas):
            self.lower.step(global_step=self.global_step)

    def run(self, stop: StopSignals | None = None) -> None:
        """Train from the current step to the last.

        Args:
            stop: where a signal is noted that asks the run to end.

        Raises:
            Stopped: after a signal; the run is saved.
            UserError: if a file can no longer be read, memory runs out or more than `max_skipped_steps` steps are not
                finite (the run is saved first, see `LastWholeStep`), if a weight is not finite, or if a checkpoint
                cannot be written.
        """
        self.train()
        history = self.folder / HISTORY_FILE
        if not collectives.is_rank0():
            history = Path(os.devnull)
        elif not self.global_step:
            atomic_write_text(history, "")
        started = time.monotonic() - self.seconds
        self.progress = Progress(self.train_iters, self.global_step, disable=not collectives.is_rank0(), file=STDERR)
        with open_append(history) as self.history, self.progress, LastWholeStep(self) as last_step:
            while self.global_step < self.train_iters:
                self._prepare_step()
                self.global_step += 1
                self.train_step()
                last_step.leave()
                self.progress.update()
                self.seconds = time.monotonic() - started
                if self._at_window_end():
                    self._end_window()
                self._report_nonfinite()
                last_step.mark()
                due = self.global_step // self.save_every > self.scored // self.save_every and self._at_window_end()
                if due or self.global_step == self.train_iters:
                    self.save(scored=True)
                if stop is not None and (signum := collectives.all_reduce_max(stop.received or 0)):
                    self.save()
                    raise Stopped(signum, f"stopped and saved at step {self.global_step} of {self.train_iters}")

    def _at_window_end(self) -> bool:
        return self.global_step % self.lower.config.unroll_steps == 0 or self.global_step == self.train_iters

    def _prepare_step(self) -> None:
        """Fetch the batches of the next step, so that unreadable files are found before the step begins."""

        def prepare() -> None:
            self.lower.prefetch(self.lower.gas)
            if self.reweights and self.lower.ends_window(self.global_step + 1):
                self.upper.prefetch(1)

        self._read_with_retries(prepare)

    def _read_with_retries(self, read: Callable[[], T]) -> T:
        """Return what `read` gives; every process calls it. An unreadable image is retried, then ends all of them."""
        retrying = Retrying(
            retry=retry_if_exception_type(UnreadableImage),
            stop=stop_after_attempt(READ_ATTEMPTS),
            wait=wait_exponential(FIRST_PAUSE),
            reraise=True,
        )
        error, results = None, []
        try:
            results.append(retrying(read))
        except UnreadableImage as unreadable:
            error = str(unreadable)
        if collectives.all_reduce_max(error is not None):
            errors = filter(None, collectives.all_gather_object(error))
            self._end_with(f"{'; '.join(dict.fromkeys(errors))}; tried {READ_ATTEMPTS} times")
        return results[0]

    def _report_nonfinite(self) -> None:
        """Report a step that was skipped, and end the run if there were too many."""
        for problem in self.problems:
            fault, problem.nonfinite = problem.nonfinite, None
            if fault is None:
                continue
            fault = NonFinite.merge(collectives.all_gather_object(fault))
            self.skipped += 1
            details = {"learning_rate": self.lower.learning_rate(self.global_step - 1), "weights": self.weights()}
            path = self.folder / fault.file_name(self.global_step)
            if collectives.is_rank0() and self.persistent:
                fault.write(path, self.global_step, details)
            see = f"; see {path}" if self.persistent else ""
            self.progress.write(f"warning: step {self.global_step} is skipped: {fault}{see}")
            if self.skipped > self.max_skipped_steps:
                self._end_with(
                    f"step {self.global_step}: {fault}. The step was skipped and no parameter changed{see}. Fix "
                    "these rows, lower --lr, set --max_grad_norm or use --precision fp32; or raise --max_skipped_steps "
                    f"(now {self.max_skipped_steps})"
                )

    def _end_with(self, message: str) -> NoReturn:
        """Save a checkpoint if the run can be resumed, and raise UserError."""
        if not self.persistent:
            raise UserError(f"{message}. A dry run keeps nothing")
        if self.global_step > self.saved:
            self.save()
        saved = (
            f"The run is saved at step {self.saved}: --resume continues from there"
            if self.saved
            else "No step was made"
        )
        raise UserError(f"{message}. {saved}")

    def save(self, scored: bool = False) -> None:
        """Write a checkpoint of this moment, unless there is one; every process calls it.

        Args:
            scored: whether to measure the score by which the best checkpoint is kept.
        """
        if self.global_step == self.saved:
            return
        score = None
        if scored and self.validation is not None:
            score = self.validation.accuracy(self._read_with_retries(self.validation.score_share))
        elif scored and self.meta_losses:
            score, self.meta_losses = -sum(self.meta_losses) / len(self.meta_losses), []
        self.saved = self.global_step
        self.scored = self.global_step if scored else self.scored
        self.history.flush()
        state, save_model = self.state_dict(), self.model_saver()
        if collectives.is_rank0():
            save_checkpoint(
                self.folder / "checkpoints",
                self.global_step,
                state,
                self.folder / HISTORY_FILE,
                save_model,
                None if score is None else (self.score_name, score),
            )
            remove_old(self.folder / "checkpoints", self.keep, self.score_name)
        collectives.barrier()  # nobody continues, or ends, before the checkpoint is complete

    def model_saver(self) -> Callable[[Path], None]:
        """Return what writes the reward model into a folder, on rank 0; every process calls this."""
        weights = self.lower.layout.full_state_dict()
        return lambda folder: self.lower.module.save_pretrained(folder, weights)

    def _end_window(self) -> None:
        """Write a line of history, show the losses and weights, and report domains that collapse."""
        weights = self.weights()
        line: dict[str, Any] = {"step": self.global_step, "train_loss": self.lower.mean_loss()}
        shown = {"train": _short(line["train_loss"])}
        if self.reweights and not self.lower.warming_up:
            line["meta_loss"] = self.upper.mean_loss()
            if line["meta_loss"] is not None and self.validation is None:
                self.meta_losses.append(line["meta_loss"])
            if not all(map(math.isfinite, weights.values())):
                raise UserError(f"a domain weight is not finite at step {self.global_step}: lower --meta_lr")
            for domain, words in collapsed(weights).items():
                if domain not in self.warned:
                    self.warned.add(domain)
                    self.progress.write(f"warning: at step {self.global_step} {words}")
            lowest, highest = min(weights, key=weights.__getitem__), max(weights, key=weights.__getitem__)
            if (slopes := self.upper.window_slopes) is not None:
                line["slopes"] = dict(zip(self.domains, slopes.tolist(), strict=True))
            shown |= {"meta": _short(line["meta_loss"])}
            shown |= {"low": f"{lowest} {weights[lowest]:.2f}", "high": f"{highest} {weights[highest]:.2f}"}
        line |= {"weights": weights, "rows_seen": self.lower.rows_seen, "seconds": round(self.seconds, 3)}
        self.history.write(json.dumps(line) + "\n")
        self.progress.show(**shown)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the rest of the run depends on, between two steps; every process calls it.

        Complete on rank 0, and independent of the number of processes.
        """
        states = collectives.all_gather_object(random_states())
        return {
            "step": self.global_step,
            "seconds": self.seconds,
            "domains": self.domains,
            "scored": self.scored,
            "skipped": self.skipped,
            "meta_losses": self.meta_losses,
            "warned": sorted(self.warned),
            "settings": self.settings,
            "random": states[0],
            "random_of_others": states[1:],
            "problems": {problem.name: problem.state_dict() for problem in self.problems},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave.

        Raises:
            UserError: if it does not fit this model or these settings.
        """
        try:
            if state["domains"] != self.domains:
                raise ValueError(f"its domains are {', '.join(state['domains'])}")
            for problem in self.problems:
                problem.load_state_dict(state["problems"][problem.name])
        except (KeyError, ValueError, RuntimeError, IndexError, TypeError, AttributeError) as error:
            raise UserError(
                f"the checkpoint does not fit the settings or the data of this run ({error}): the domains, what is "
                "trained and the optimizer cannot change within a run"
            ) from error
        self.global_step = self.saved = state["step"]
        self.seconds, self.skipped, self.scored = state["seconds"], state["skipped"], state["scored"]
        self.meta_losses, self.warned = list(state["meta_losses"]), set(state["warned"])
        own_random_states([state["random"], *state["random_of_others"]])


def _short(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"
