"""The Betty engine of this project: its loop, and what a run writes while it goes.

One iteration is one optimizer step of the lower level; every `unroll_steps` iterations make a window, at whose end
Betty steps the upper level. History, progress and checkpoints are written at window ends only.
"""

import json
import logging
import time
from pathlib import Path

import torch
from betty.configs import EngineConfig
from betty.engine import Engine
from betty.logging import get_logger
from tqdm import tqdm

from reweighting.checkpoints import random_states, save_checkpoint, set_random_states
from reweighting.problems import DomainReweighting, PRMFineTuning, check_finite

get_logger().setLevel(logging.WARNING)  # Betty tells of its set-up in twenty lines

LOWER_REMEDY = "lower --lr, set --max_grad_norm, or use --precision fp32"


class ReweightingEngine(Engine):
    """Runs the two levels and leaves `history.jsonl` and `checkpoints/` in `folder`.

    lower, upper: the problems; upper None for plain fine-tuning. domains: their names, in the order of the weights.
    device: where the modules are. iterations: optimizer steps in all; save_every: between two checkpoints.
    settings: what goes into each checkpoint beside the state.
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
    ):
        self._device = device
        self.domains, self.folder, self.save_every, self.settings = domains, folder, save_every, settings
        self.seconds = 0.0
        problems = [lower] if upper is None else [upper, lower]
        edges = {} if upper is None else {"u2l": {upper: [lower]}, "l2u": {lower: [upper]}}
        super().__init__(problems, EngineConfig(train_iters=iterations), {"u2l": {}, "l2u": {}} | edges)

    def configure_systems(self) -> dict:
        """One process on the given device."""
        self.device = self._device
        self._world_size, self._rank, self._local_rank = 1, 0, 0
        return {"strategy": "default", "backend": None, "world_size": 1, "rank": 0, "local_rank": 0}

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

    def run(self) -> None:
        """Train from the current step to the last. Raises UserError if a loss or weight is no longer finite."""
        self.train()
        unroll, saved = self.lower.config.unroll_steps, self.global_step
        history = self._open_history()
        started = time.monotonic() - self.seconds
        bar = tqdm(total=self.train_iters, initial=self.global_step, unit="step", dynamic_ncols=True)
        with history, bar:
            while self.global_step < self.train_iters:
                self.global_step += 1
                self.train_step()
                bar.update()
                if self.global_step % unroll and self.global_step < self.train_iters:
                    continue
                self.seconds = time.monotonic() - started
                self._end_window(history, bar)
                if self.global_step - saved >= self.save_every or self.global_step == self.train_iters:
                    history.flush()
                    saved = self.global_step
                    save_checkpoint(self.folder / "checkpoints", saved, self.state_dict())

    def _end_window(self, history, bar: tqdm) -> None:
        """Write a line of history and show where the run is."""
        line = {"step": self.global_step, "train_loss": self.lower.mean_loss()}
        check_finite("the training loss", line["train_loss"], self.global_step, LOWER_REMEDY)
        shown = {"train": f"{line['train_loss']:.4f}"}
        weights = self.weights()
        if self.reweights:
            line["meta_loss"] = self.upper.mean_loss()
            check_finite("the meta loss", line["meta_loss"], self.global_step, LOWER_REMEDY)
            for domain, weight in weights.items():
                check_finite(f"the weight of {domain}", weight, self.global_step, "lower --meta_lr")
            least, most = min(weights, key=weights.get), max(weights, key=weights.get)
            shown |= {"meta": f"{line['meta_loss']:.4f}"}
            shown |= {"low": f"{least} {weights[least]:.2f}", "high": f"{most} {weights[most]:.2f}"}
        line |= {"weights": weights, "rows_seen": self.lower.rows_seen, "seconds": round(self.seconds, 3)}
        history.write(json.dumps(line) + "\n")
        bar.set_postfix(shown)

    def _open_history(self):
        """The history file, without lines past the current step."""
        path = self.folder / "history.jsonl"
        # The last line may have been cut off by a kill; it is past the checkpoint then.
        lines = path.read_text(encoding="utf-8").splitlines() if self.global_step and path.exists() else []
        kept = lines[: sum(line.endswith("}") and json.loads(line)["step"] <= self.global_step for line in lines)]
        path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        return open(path, "a", buffering=1, encoding="utf-8")

    def state_dict(self) -> dict:
        """Everything that the rest of the run depends on, at a window's end."""
        return {
            "step": self.global_step,
            "seconds": self.seconds,
            "settings": self.settings,
            "random": random_states(),
            "problems": {problem.name: problem.state_dict() for problem in self.problems},
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from what `state_dict` gave."""
        self.global_step, self.seconds = state["step"], state["seconds"]
        for problem in self.problems:
            problem.load_state_dict(state["problems"][problem.name])
        set_random_states(state["random"])
