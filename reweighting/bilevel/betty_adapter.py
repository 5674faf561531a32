"""A Betty problem that keeps the module, optimizer and data that it was given.

Betty 0.2.1 rebuilds optimizers and schedulers from their defaults, trains frozen parameters, knows bf16 on CUDA only,
waits for the device at every loss and leaves counters out of its state. `BettyProblemAdapter` overrides these parts.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from betty.configs import Config
from betty.problems import ImplicitProblem
from torch import Tensor, nn
from torch.optim import Optimizer

from reweighting.bilevel.nonfinite import NonFinite
from reweighting.devices import autocast
from reweighting.distributed import collectives
from reweighting.distributed.sharding import Replicated


class BettyProblemAdapter(ImplicitProblem):
    """Base of both levels.

    Args:
        name: "lower" or "upper"; Betty makes each level an attribute of the other by this name.
        config: Betty's.
        module: What the level trains.
        optimizer: Over its trained parameters in the module's order, in one group or several.
        fetch_batch: (micro-step from 0) -> batch on the device.
        layout: How the module's parameters lie on the processes; by default each process holds all of them.

    Attributes:
        cur_batch: Betty's: the batch of the current micro-step.
        loss: The newest loss to report, a scalar; every `training_step` sets it.
        losses: Those since the last `mean_loss()`.
        nonfinite: Why the newest step was left out; None if it was made.
    """

    optimizer: Optimizer
    device: torch.device
    cur_batch: Any
    loss: Tensor

    def __init__(
        self,
        name: str,
        config: Config,
        module: nn.Module,
        optimizer: Optimizer,
        fetch_batch: Callable[[int], Any],
        layout: Replicated | None = None,
    ):
        super().__init__(name, config, module, optimizer)
        self.layout = layout or Replicated(module)
        self.fetch_batch = fetch_batch
        self.losses: list[Tensor] = []
        self.nonfinite: NonFinite | None = None
        self._prefetched: deque[Any] = deque()

    def patch_module(self) -> None:
        """Keep the module on its device: once moved, a sharded module's parameters are not the optimizer's."""

    def patch_optimizer(self) -> None:
        """Keep the optimizer."""

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that are not frozen; of a sharded one, this process's shard."""
        return list(self.named_trainable_parameters().values())

    def named_trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Return {name: parameter} of those that are not frozen; of a sharded one, this process's shard."""
        return self.layout.trainable_parameters()

    def named_gradients(self) -> dict[str, Tensor]:
        """Return {name: gradient} of the parameters that have one."""
        named = {name: getattr(param, "grad", None) for name, param in self.named_trainable_parameters().items()}
        return {name: gradient for name, gradient in named.items() if gradient is not None}

    def prefetch(self, micro_steps: int) -> None:
        """Fetch the batches of the next micro-steps, so that a file that cannot be read is known before the step."""
        while len(self._prefetched) < micro_steps:
            self._prefetched.append(self.fetch_batch(self._count + len(self._prefetched)))

    def get_batch(self) -> Any:
        """Return the batch of this micro-step, which Betty has counted already."""
        return self._prefetched.popleft() if self._prefetched else self.fetch_batch(self._count - 1)

    def training_step_exec(self, batch: Any) -> Tensor:
        """Compute the loss, a scalar, under autocast where the precision is bf16, on any device."""
        with autocast(self.device, self.precision):
            return self.training_step(batch)

    def get_loss(self, batch: Any) -> tuple[Tensor, dict]:
        """Compute the loss divided by the micro-batches of a step, without waiting for the device."""
        loss = self.training_step_exec(batch)
        self.losses.append(self.loss)
        return loss / self.gas, {}

    def backward(
        self,
        loss: Tensor,
        params: Sequence[nn.Parameter],
        paths: Sequence[Sequence[ImplicitProblem]],
        create_graph: bool = False,
        retain_graph: bool = True,
        allow_unused: bool = True,
    ) -> None:
        """Do the level's own part of a micro-step; Betty would differentiate through its paths here."""
        self.differentiate(loss)

    def differentiate(self, loss: Tensor) -> None:
        """Make the gradient of a micro-batch's loss, a scalar divided by the micro-batches of a step."""
        raise NotImplementedError

    def mean_loss(self) -> float | None:
        """Return the mean of the finite losses since the last call, None if there are none.

        Waits for the device, and for every process.
        """
        losses = collectives.all_reduce_sum(torch.stack(self.losses)) if self.losses else torch.zeros(0)
        self.losses = []
        losses = losses[losses.isfinite()]
        return losses.mean().item() if len(losses) else None

    def state_dict(self) -> dict:
        """Return trained parameters, optimizer state, micro-step count and unreported losses, between two steps.

        It is complete on rank 0. Every process calls it.
        """
        params = self.named_trainable_parameters()
        module = {name: self.layout.gather_full(name, param.detach()) for name, param in params.items()}
        optimizer = _map_state(self.optimizer.state_dict()["state"], list(params), self.layout.gather_full)
        losses = [collectives.all_reduce_sum(loss) for loss in self.losses]
        return {"module": module, "optimizer": optimizer, "count": self._count, "losses": losses}

    def load_state_dict(self, state_dict: dict) -> None:
        """Continue from a state; the optimizer's settings stay what they are now.

        Raises:
            ValueError: Other parameters are trained now.
        """
        state, params = state_dict, self.named_trainable_parameters()  # frozen ones were loaded with the backbone
        if different := sorted(params.keys() ^ state["module"].keys()):
            raise ValueError(f"{different[0]} is trained in one of them and not in the other")
        for name, param in params.items():
            saved = self.layout.local_shard(name, state["module"][name])
            if saved.shape != param.shape:
                raise ValueError(f"{name} has the shape {tuple(saved.shape)} in it and {tuple(param.shape)} here")
            param.data.copy_(saved)
        groups = self.optimizer.state_dict()["param_groups"]
        optimizer_state = _map_state(state["optimizer"], list(params), self.layout.local_shard)
        self.optimizer.load_state_dict({"state": optimizer_state, "param_groups": groups})
        self._count = state["count"]
        # Each is a sum over processes: the other ranks add nothing to what rank 0 has.
        self.losses = [loss.to(self.device) * float(collectives.is_rank0()) for loss in state["losses"]]


def _map_state(state: dict, names: list[str], change: Callable[[str, Tensor], Tensor]) -> dict:
    """An optimizer's state with `change` applied to the tensors that have a parameter's shape.

    names: of the parameters, in the optimizer's order.
    """

    def is_scalar(value: object) -> bool:  # like AdamW's `step`
        return not isinstance(value, Tensor) or value.dim() == 0

    return {
        index: {key: value if is_scalar(value) else change(names[index], value) for key, value in values.items()}
        for index, values in state.items()
    }
