"""A Betty problem that keeps the module, optimizer and data that it was given."""

from collections import deque
from collections.abc import Callable

import torch
from betty.configs import Config
from betty.problems import ImplicitProblem
from torch import Tensor

from reweighting.bilevel.nonfinite import NonFinite
from reweighting.devices import autocast
from reweighting.distributed import collectives
from reweighting.distributed.sharding import Replicated


class BettyProblemAdapter(ImplicitProblem):
    """A Betty problem that keeps the module, optimizer and data that it was given.

    draw: micro-step (from 0) -> batch on the device. A `training_step` leaves the loss to report in `self.loss`;
    `losses` are those since the last `mean_loss()`. nonfinite: what made the last step be left out, None if nothing.
    layout: how the module lies on the processes, `Replicated` if it is not given.
    """

    def __init__(
        self,
        name: str,
        config: Config,
        module,
        optimizer,
        draw: Callable[[int], object],
        layout: Replicated | None = None,
    ):
        super().__init__(name, config, module, optimizer)
        self.layout = layout or Replicated(module)
        self.draw, self.prepared, self.losses = draw, deque(), []
        self.nonfinite: NonFinite | None = None

    def patch_module(self) -> None:
        """Keep ours, where it is: moved, a sharded module's parameters would not be the optimizer's any more."""

    def patch_optimizer(self) -> None:
        """Keep ours."""

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        """The parameters that are not frozen."""
        return list(self.named_trainables().values())

    def named_trainables(self) -> dict[str, torch.nn.Parameter]:
        """{name: parameter} of those that are not frozen; of one that is cut into parts, the part that is here."""
        return self.layout.trainables()

    def named_gradients(self) -> dict[str, Tensor]:
        """{name: gradient} of the parameters that have one."""
        return {name: p.grad for name, p in self.named_trainables().items() if getattr(p, "grad", None) is not None}

    def prepare(self, micro_steps: int) -> None:
        """Draw the batches of the next micro-steps: what cannot be read is known before the step begins."""
        while len(self.prepared) < micro_steps:
            self.prepared.append(self.draw(self._count + len(self.prepared)))

    def get_batch(self):
        """The batch of this micro-step; Betty has counted it already."""
        return self.prepared.popleft() if self.prepared else self.draw(self._count - 1)

    def training_step_exec(self, batch) -> Tensor:
        """The loss, under autocast where `--precision bf16` asks for it, on any device."""
        with autocast(torch.device(self.device), self.precision):
            return self.training_step(batch)

    def get_loss(self, batch) -> tuple[Tensor, dict]:
        """As Betty's, without waiting for the device."""
        loss = self.training_step_exec(batch)
        self.losses.append(self.loss)
        return loss / self.gas, {}

    def state_dict(self) -> dict:
        """Trained parameters, the optimizer's state, the losses not yet reported and the count of micro-steps, between
        two steps: of all processes together, in the main one. Every process calls it."""
        names = list(self.named_trainables())
        module = {name: self.layout.gather_full(name, p.detach()) for name, p in self.named_trainables().items()}
        optimizer = self._in_optimizer(self.layout.gather_full, self.optimizer.state_dict()["state"], names)
        losses = [collectives.all_reduce_sum(loss) for loss in self.losses]
        return {"module": module, "optimizer": optimizer, "count": self._count, "losses": losses}

    @staticmethod
    def _in_optimizer(change: Callable[[str, Tensor], Tensor], state: dict, names: list[str]) -> dict:
        """An optimizer's state with `change` made to what has a parameter's shape; names: in the optimizer's order."""
        return {
            index: {key: value if _is_count(value) else change(names[index], value) for key, value in kept.items()}
            for index, kept in state.items()
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from what `state_dict` gave. The optimizer's settings stay what they are now.

        Raises ValueError if other parameters are trained now.
        """
        params = self.named_trainables()  # what is frozen was loaded with the backbone
        if different := sorted(params.keys() ^ state["module"].keys()):
            raise ValueError(f"{different[0]} is trained in one of them and not in the other")
        for name, param in params.items():
            saved = self.layout.local_shard(name, state["module"][name])
            if saved.shape != param.shape:
                raise ValueError(f"{name} has the shape {tuple(saved.shape)} in it and {tuple(param.shape)} here")
            param.data.copy_(saved)
        groups = self.optimizer.state_dict()["param_groups"]
        kept = self._in_optimizer(self.layout.local_shard, state["optimizer"], list(params))
        self.optimizer.load_state_dict({"state": kept, "param_groups": groups})
        self._count = state["count"]
        # Each is a sum over processes: the others add nothing to what the main one has.
        self.losses = [loss.to(self.device) * float(collectives.is_rank0()) for loss in state["losses"]]

    def mean_loss(self) -> float | None:
        """The mean of the losses since the last call, without those that are no numbers; None if there are none.
        Waits for the device, and for every process."""
        losses = collectives.all_reduce_sum(torch.stack(self.losses)) if self.losses else torch.zeros(0)
        self.losses = []
        losses = losses[losses.isfinite()]
        return losses.mean().item() if len(losses) else None


def _is_count(value: object) -> bool:
    """Whether an entry of an optimizer's state is one number, like AdamW's `step`, and not as large as a parameter."""
    return not isinstance(value, Tensor) or value.dim() == 0
