"""The Betty engine of this project: its loop, and what a run writes while it goes.

One iteration is one optimizer step of the lower level; every `unroll_steps` iterations make a window, at whose end
Betty steps the upper level and a line of history is written. Between two steps the run is whole: there it can be saved,
stopped and continued, inside a window too.

Several processes make each step together and agree before it on whether its files could be read, and after it on
whether to stop; only the main one writes.
"""

import json
import logging
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
from betty.configs import EngineConfig
from betty.engine import Engine
from betty.logging import get_logger
from tqdm import tqdm

from reweighting.bilevel.domain_weights import collapsed
from reweighting.bilevel.nonfinite import NonFinite
from reweighting.bilevel.problems import DomainReweighting, PRMFineTuning
from reweighting.distributed import collectives
from reweighting.errors import UnreadableImage, UserError
from reweighting.files import atomic_write_text
from reweighting.training.checkpoints import HISTORY_FILE, remove_old, save_checkpoint
from reweighting.training.random_states import own_random_states, random_states
from reweighting.training.signals import STDERR, Stopped, StopSignals
from reweighting.training.validation import Validation

get_logger().setLevel(logging.WARNING)  # Betty tells of its set-up in twenty lines

T = TypeVar("T")
READ_ATTEMPTS = 4  # of a file that cannot be read: shared storage has moments of absence
FIRST_PAUSE = 0.5  # seconds before the second attempt, doubled each time


class ReweightingEngine(Engine):
    """Runs the two levels and leaves `history.jsonl`, `checkpoints/` and `diagnostics/` in `folder`.

    lower, upper: the problems; upper None for plain fine-tuning. domains: their names, in the order of the weights.
    device: where the modules are. iterations: optimizer steps in all; save_every: between two checkpoints; keep: how
    many of them stay, besides the best. max_skipped_steps: steps that may be left out because they are not finite.
    settings: what goes into each checkpoint beside the state. validation: by what the best checkpoint is chosen; None
    to choose it by the meta loss. persistent: whether `folder` stays when the run has ended, so that it can go on.
    """

    def __init__(
        self,
        lower: PRMFineTuning,
        upper: DomainReweighting | None,
        domains: list[str],
        device: torch.device,
        folder: Path,
        iterations: int,
        save_every: int,
        settings: dict,
        *,
        keep: int = 2,
        max_skipped_steps: int = 0,
        validation: Validation | None = None,
        persistent: bool = True,
    ):
        self._device = device
        self.domains, self.folder, self.save_every, self.settings = domains, folder, save_every, settings
        self.keep, self.max_skipped_steps, self.validation, self.persistent = (
            keep,
            max_skipped_steps,
            validation,
            persistent,
        )
        # With the rows it was measured on: scores on other rows are not compared with it.
        self.score_name = f"best-of-N accuracy on {settings['validation'][:8]}" if validation else "minus the meta loss"
        self.seconds = 0.0
        self.saved = 0  # step of the last checkpoint
        self.scored = 0  # step of the last one that was not asked for by a signal or a fault
        self.skipped = 0  # steps that were left out
        self.meta_losses: list[float] = []  # since the last checkpoint with a score
        self.warned: set[str] = set()
        problems = [lower] if upper is None else [upper, lower]
        edges = {} if upper is None else {"u2l": {upper: [lower]}, "l2u": {lower: [upper]}}
        super().__init__(problems, EngineConfig(train_iters=iterations), {"u2l": {}, "l2u": {}} | edges)

    def configure_systems(self) -> dict:
        """This process on the given device. What the processes tell each other is not left to Betty."""
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
        """The weights that the lower level trains with now: {domain: weight}, mean 1."""
        return dict(zip(self.domains, self.lower.domain_weights().tolist(), strict=True))

    def train_step(self) -> None:
        """One optimizer step: as many micro-steps of the lower problem as it accumulates gradients over."""
        for _ in range(self.lower.gas):
            self.lower.step(global_step=self.global_step)

    def run(self, stop: StopSignals | None = None) -> None:
        """Train from the current step to the last.

        Raises Stopped after a signal, and UserError if a file can no longer be read or more than `max_skipped_steps`
        steps are not finite: a persistent run is saved first. Raises UserError too if a weight is not finite, or a
        checkpoint cannot be written.
        """
        self.train()
        history = self.folder / HISTORY_FILE
        if not collectives.is_rank0():
            history = os.devnull
        elif not self.global_step:
            atomic_write_text(history, "")
        started = time.monotonic() - self.seconds
        bar = tqdm(total=self.train_iters, initial=self.global_step, unit="step", dynamic_ncols=True, file=STDERR,
                   disable=not collectives.is_rank0())  # fmt: skip
        with open(history, "a", buffering=1, encoding="utf-8") as self.history, bar:
            while self.global_step < self.train_iters:
                self._prepare_step()
                self.global_step += 1
                self.train_step()
                bar.update()
                self.seconds = time.monotonic() - started
                if self._at_window_end():
                    self._end_window(bar)
                self._leave_out_nonfinite()
                due = self.global_step // self.save_every > self.scored // self.save_every and self._at_window_end()
                if due or self.global_step == self.train_iters:
                    self.save(scored=True)
                if stop is not None and (signum := collectives.all_reduce_max(stop.received or 0)):
                    self.save()
                    raise Stopped(signum, f"stopped and saved at step {self.global_step} of {self.train_iters}")

    def _at_window_end(self) -> bool:
        return self.global_step % self.lower.config.unroll_steps == 0 or self.global_step == self.train_iters

    def _prepare_step(self) -> None:
        """Draw the batches of the next step."""

        def prepare() -> None:
            self.lower.prepare(self.lower.gas)
            if self.reweights and self.lower.ends_window(self.global_step + 1):
                self.upper.prepare(1)

        self._try_reading(prepare)

    def _try_reading(self, read: Callable[[], T]) -> T:
        """What `read` gives. An image that cannot be read now is tried again, then named; every process calls it, and
        each hears of the others'."""
        for attempt in range(READ_ATTEMPTS):
            try:
                result, trouble = read(), None
                break
            except UnreadableImage as error:
                trouble = str(error)
            if attempt < READ_ATTEMPTS - 1:
                time.sleep(FIRST_PAUSE * 2**attempt)
        if collectives.all_reduce_max(trouble is not None):
            troubles = filter(None, collectives.all_gather_object(trouble))
            self._end_with(f"{'; '.join(dict.fromkeys(troubles))}; tried {READ_ATTEMPTS} times")
        return result

    def _leave_out_nonfinite(self) -> None:
        """Tell of a step that was left out, and end the run if that has happened too often."""
        for problem in self.problems:
            fault, problem.nonfinite = problem.nonfinite, None
            if fault is None:
                continue
            fault = NonFinite.merge(collectives.all_gather_object(fault))
            self.skipped += 1
            more = {"learning_rate": self.lower.learning_rate(self.global_step - 1), "weights": self.weights()}
            path = self.folder / fault.file_name(self.global_step)
            if collectives.is_rank0() and self.persistent:
                fault.write(path, self.global_step, more)
            see = f"; see {path}" if self.persistent else ""
            tqdm.write(f"warning: step {self.global_step} is left out: {fault}{see}", file=STDERR)
            if self.skipped > self.max_skipped_steps:
                self._end_with(
                    f"step {self.global_step}: {fault}. The step was left out and no parameter touched{see}. Mend "
                    "these rows, lower --lr, set --max_grad_norm or use --precision fp32; or raise --max_skipped_steps "
                    f"(now {self.max_skipped_steps})"
                )

    def _end_with(self, trouble: str) -> NoReturn:
        """Save what there is, if it stays, and raise UserError."""
        if not self.persistent:
            raise UserError(f"{trouble}. Of a dry run nothing is kept")
        if self.global_step > self.saved:
            self.save()
        saved = (
            f"The run is saved at step {self.saved}: --resume goes on from there" if self.saved else "No step was made"
        )
        raise UserError(f"{trouble}. {saved}")

    def save(self, scored: bool = False) -> None:
        """Write a checkpoint of this moment, unless there is one; `scored`: with the score it may be kept for."""
        if self.global_step == self.saved:
            return
        score = None
        if scored and self.validation is not None:
            score = self.validation.accuracy(self._try_reading(self.validation.score_share))
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
        collectives.barrier()  # none goes on, or ends the run, before the checkpoint is whole

    def model_saver(self) -> Callable[[Path], None]:
        """What writes the reward model into a folder, in the main process; every process calls this."""
        weights = self.lower.layout.full_state_dict()
        return lambda folder: self.lower.module.save_pretrained(folder, weights)

    def _end_window(self, bar: tqdm) -> None:
        """Write a line of history and show where the run is."""
        line = {"step": self.global_step, "train_loss": self.lower.mean_loss()}
        shown = {"train": _short(line["train_loss"])}
        weights = self.weights()
        if self.reweights and not self.lower.warming_up:
            line["meta_loss"] = self.upper.mean_loss()
            if line["meta_loss"] is not None and self.validation is None:
                self.meta_losses.append(line["meta_loss"])
            if not all(map(math.isfinite, weights.values())):
                raise UserError(f"a domain weight is no number at step {self.global_step}: lower --meta_lr")
            for domain, words in collapsed(weights).items():
                if domain not in self.warned:
                    self.warned.add(domain)
                    tqdm.write(f"warning: at step {self.global_step} {words}", file=STDERR)
            least, most = min(weights, key=weights.get), max(weights, key=weights.get)
            shown |= {"meta": _short(line["meta_loss"])}
            shown |= {"low": f"{least} {weights[least]:.2f}", "high": f"{most} {weights[most]:.2f}"}
        line |= {"weights": weights, "rows_seen": self.lower.rows_seen, "seconds": round(self.seconds, 3)}
        self.history.write(json.dumps(line) + "\n")
        bar.set_postfix(shown)

    def state_dict(self) -> dict:
        """Everything that the rest of the run depends on, between two steps: whole in the main process, for any number
        of them to go on from. Every process calls it."""
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

    def load_state_dict(self, state: dict) -> None:
        """Go on from what `state_dict` gave. Raises UserError if it does not fit this model or these settings."""
        try:
            if state["domains"] != self.domains:
                raise ValueError(f"its domains are {', '.join(state['domains'])}")
            for problem in self.problems:
                problem.load_state_dict(state["problems"][problem.name])
        except (KeyError, ValueError, RuntimeError, IndexError) as error:
            raise UserError(f"the checkpoint does not fit the settings or the data of this run ({error}): the domains, "
                            "what is trained and the optimizer cannot be changed on the way") from error  # fmt: skip
        self.global_step = self.saved = state["step"]
        self.seconds, self.skipped, self.scored = state["seconds"], state["skipped"], state["scored"]
        self.meta_losses, self.warned = list(state["meta_losses"]), set(state["warned"])
        own_random_states([state["random"], *state.get("random_of_others", [])])


def _short(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"
