"""The window hypergradient without kept gradients: for models of which one gradient a micro-batch does not fit.

`unrolled.py` keeps every micro-batch's gradient g_nk. `DirectionalHypergradient` keeps the micro-batches themselves
(tokens and image features) and finds the dot products < u_n , g_nk > at the window's end as slopes: the derivative of a
micro-batch's loss along u_n, in forward mode or from two forward passes beside the parameters. Nothing of the size of
the parameters is kept while the window lasts. That takes three approximations:

- The slopes are taken at the window's last parameters, not at those that the step had: of second order in the
  learning rate, as what the window leaves out anyway.
- All u_n lie along one direction, u_n = c_n d. For SGD that is exact: d = v, and the numbers c_n follow from learning
  rates, momentum and weight decay. For AdamW, d = v / (root of the second moment at the window's end + eps): the
  second moment is taken to stand still during the window. With beta2 = 0.999 that holds once AdamW has made some
  hundred steps, and fails in its first twenty, where the moment's changes cancel most of a step's effect.
- Dropout is off in the slopes.

Against autograd through the unrolled optimizer see `tests/bilevel/test_directional.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from reweighting.distributed import collectives
from reweighting.distributed.flat_vectors import unflatten

# How far central differences go from the parameters, as a norm: in float32 as far as Betty's `darts`; farther where
# the losses are rounded more.
RADIUS = {"fp32": 0.01, "bf16": 0.1}

Loss = Callable[[dict[str, Tensor], object], Tensor]  # (parameters by name, batch) -> scalar


def forward_mode(loss: Loss, params: dict[str, Tensor], batches: Sequence, direction: Tensor) -> Tensor:
    """The slopes of `loss(params, batch)` along a direction [P], one a batch, by forward-mode differentiation.

    Attention runs as plain arithmetic meanwhile, since the fused kernels have no forward mode: a batch's attention
    matrices of one layer are in memory at a time. Takes about the arithmetic of a forward and a backward pass.
    """
    tangents = unflatten(direction, list(params.values()))
    # Not torch.func.jvp: within it, gradient checkpointing's hook on the embeddings raises an error.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        duals = {
            name: forward_ad.make_dual(param.detach(), tangent)
            for (name, param), tangent in zip(params.items(), tangents, strict=True)
        }
        found = [forward_ad.unpack_dual(loss(duals, batch)).tangent for batch in batches]
    return torch.stack([direction.new_zeros(()) if slope is None else slope for slope in found])


def central_differences(
    loss: Loss, params: dict[str, Tensor], batches: Sequence, direction: Tensor, radius: float = RADIUS["fp32"]
) -> Tensor:
    """The same from the losses on either side, `radius` away: two forward passes a batch, and one copy of the
    parameters. Works with any attention kernel.

    What is rounded in the losses is divided by the small step between the two sides. Measured on the embedded backbone:
    an error of 3e-4 of the slopes in float32, of 3 to 5 % in bfloat16 (forward mode: 1e-6, and 0.6 %).
    """
    norm = direction.norm()
    if not norm > 0:
        return direction.new_zeros(len(batches)) * norm  # not a number where the norm is none
    step = radius / norm
    pieces = unflatten(direction, list(params.values()))
    sides = []
    with torch.no_grad():
        for sign in (1, -1):
            moved = {
                name: param + sign * step * piece for (name, param), piece in zip(params.items(), pieces, strict=True)
            }
            sides.append(torch.stack([loss(moved, batch) for batch in batches]))
    return (sides[0] - sides[1]) / (2 * step)


@dataclass
class DirectionalStep:
    """What one optimizer step leaves behind: its micro-batches as (number, domain, batch), the factor (at most 1) that
    clipping multiplied its gradient with, its learning rate and, if it was clipped, the slope of each micro-batch's
    loss along the clipped gradient."""

    micro_batches: list[tuple[int, int, object]]
    clip: float
    lr: float
    along: Tensor | None


class DirectionalHypergradient:
    """The optimizer steps since the last update of the weights, as the batches that made them.

    optimizer: torch.optim.SGD or AdamW with one parameter group over `params` in their order, and no amsgrad,
    nesterov or maximize. loss: the unweighted loss of a micro-batch at given parameters, without dropout. draw: the
    micro-step's number -> (domain, batch). slopes: `forward_mode` or `central_differences`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, params: dict[str, Tensor], loss: Loss, draw, slopes):
        if len(optimizer.param_groups) != 1:
            raise ValueError("the window hypergradient expects an optimizer with one parameter group")
        self.optimizer, self.params, self.loss, self.draw, self._slopes = optimizer, params, loss, draw, slopes
        self._adamw = isinstance(optimizer, torch.optim.AdamW)
        self.clear()

    def clear(self) -> None:
        """Forget the window."""
        self.records: list[DirectionalStep] = []
        self._pending: list[tuple[int, int, object]] = []

    def add_micro_batch(self, number: int, domain: int, batch) -> None:
        """Keep a micro-batch. number: of its micro-step, from which a resumed run draws it anew."""
        self._pending.append((number, domain, batch))

    def close_step(self, clip: float, lr: float) -> None:
        """Call once a step, after the optimizer's, while the parameters still have their gradients: `clip` is what
        clipping multiplied these with, `lr` the step's learning rate."""
        along = None
        if clip < 1.0:
            gradient = torch.cat([param.grad.reshape(-1) for param in self.params.values()])
            along = self.slopes(self._pending, gradient)
        self.records.append(DirectionalStep(self._pending, clip, lr, along))
        self._pending = []

    def drop_step(self) -> None:
        """Forget the micro-batches of a step that was not made."""
        self._pending = []

    def slopes(self, micro_batches: list[tuple[int, int, object]], direction: Tensor) -> Tensor:
        """The slope of each micro-batch's loss along the direction [P], at the parameters as they are; of the whole
        micro-batch, where several processes share it."""
        batches = [batch for *_, batch in micro_batches]
        return collectives.all_reduce_sum(self._slopes(self.loss, self.params, batches, direction))

    def state(self, layout) -> dict:
        """The steps so far, between two steps, as plain containers of tensors and numbers; the same in every process,
        however the parameters lie on them (`layout`)."""
        steps = [
            {"numbers": [number for number, *_ in one.micro_batches], "clip": one.clip, "lr": one.lr,
             "along": one.along} for one in self.records
        ]  # fmt: skip
        return {"replayed": steps}

    def load(self, state: dict, layout, device: torch.device | str) -> None:
        """Go on from what `state` gave, on as many processes as there are now; the batches are drawn anew."""
        self.clear()
        for saved in state["replayed"]:
            along = saved["along"] if saved["along"] is None else saved["along"].to(device)
            micro_batches = [(number, *self.draw(number)) for number in saved["numbers"]]
            self.records.append(DirectionalStep(micro_batches, saved["clip"], saved["lr"], along))

    @torch.no_grad()
    def hypergradient(self, v: Tensor, weights: Tensor) -> Tensor:
        """dL_meta / dw [K] from the meta gradient v [P] at the window's end, which is overwritten, and the weights [K]
        that held in it."""
        result = v.new_zeros(len(weights))
        if not self.records:
            return result
        found = self.slopes([one for record in self.records for one in record.micro_batches], self.direction(v))
        found = found.split([len(record.micro_batches) for record in self.records])
        for record, factor, slopes in zip(self.records, self._factors(), found, strict=True):
            domains = torch.tensor([domain for _, domain, _ in record.micro_batches], device=v.device)
            if record.along is not None:  # clipping scales by max_norm / |g_n|, and |g_n| depends on g_n too
                w = weights[domains].to(slopes.dtype)
                slopes = record.clip * (slopes - record.along * (w @ slopes) / (w @ record.along))
            # A step's gradient is the mean over its micro-batches.
            result.index_add_(0, domains, (factor / len(domains) * slopes).to(result.dtype))
        return result

    def direction(self, v: Tensor) -> Tensor:
        """The direction d [P] along which slopes are asked for, from the meta gradient v [P], in its place."""
        if not self._adamw:
            return v
        group = self.optimizer.param_groups[0]
        for param, piece in zip(self.params.values(), unflatten(v, list(self.params.values())), strict=True):
            state = self.optimizer.state[param]
            root = (state["exp_avg_sq"] / (1 - group["betas"][1] ** int(state["step"]))).sqrt_()
            # Where no gradient ever came, none comes from the window's batches: far away and for nothing.
            piece.div_(root + group["eps"]).masked_fill_(root == 0, 0)
        return v

    def _factors(self) -> list[float]:
        """c_n, of the oldest step first: the adjoint of `unrolled.py` for a single parameter with d = v = 1."""
        group, factors = self.optimizer.param_groups[0], []
        phi, buffer = 1.0, 0.0
        if self._adamw:
            beta1 = group["betas"][0]
            last = int(self.optimizer.state[next(iter(self.params.values()))]["step"])
            for count, record in zip(range(last, 0, -1), reversed(self.records), strict=False):
                buffer -= record.lr / (1 - beta1**count) * phi
                factors.append(buffer * (1 - beta1))
                buffer *= beta1
                phi *= 1 - record.lr * group["weight_decay"]
        else:
            for record in reversed(self.records):
                buffer -= record.lr * phi
                factors.append(buffer * (1 - group["dampening"]))
                phi += group["weight_decay"] * factors[-1]
                buffer *= group["momentum"]
        return factors[::-1]
