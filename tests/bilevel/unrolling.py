"""A small network in float64 whose exact hypergradient is known: autograd through the unrolled optimizer.

The optimizers are written out by hand as differentiable functions of the domain weights; `window` makes the same steps
with torch's optimizer and reports them to a `Hypergradient`.
"""

import copy
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from reweighting.bilevel.losses import STEP_LOSSES, label_costs
from reweighting.distributed.flat_vectors import flatten, unflatten

DOMAINS, CHAINS, DECAY = 4, 30, 0.01
LR = {"sgd": 0.02, "adamw": 1e-3}


@dataclass(frozen=True)
class ToyBatch:
    """Eight chains of a step."""

    inputs: Tensor  # [8, 10]
    targets: Tensor  # [8]
    chain_ids: Tensor  # [8]

    @property
    def num_labeled_steps(self) -> int:
        return len(self.targets)


class ToyLabels:
    """Stands in for `StepLabels`: chains of one step."""

    def __init__(self):
        self.labels = torch.rand(CHAINS, dtype=torch.float64)

    def __len__(self) -> int:
        return CHAINS

    def places(self, batch: ToyBatch) -> Tensor:
        return batch.chain_ids[:, None]

    def corrected(self, batch: ToyBatch) -> ToyBatch:
        return replace(batch, targets=self.labels[batch.chain_ids])


def toy_parts(model, params, batch, name="mse") -> Tensor:
    """What each chain adds to a batch's mean loss, [8]."""
    return STEP_LOSSES[name](functional_call(model, params, (batch.inputs,)).squeeze(1), batch) / len(batch.targets)


def toy_batch(number: int = 0) -> ToyBatch:
    inputs, targets = torch.randn(8, 10, dtype=torch.float64), torch.rand(8, dtype=torch.float64)
    return ToyBatch(inputs, targets, (torch.arange(8) + 5 * number) % CHAINS)


def norm_of(grads) -> Tensor:
    return torch.sqrt(sum(grad.square().sum() for grad in grads))


def unrolled(kind, loss_of, params, state, weights, steps, clip, momentum):
    """The parameters after the steps as a differentiable function of the weights: the optimizers by hand."""
    for micro_batches in steps:
        loss = sum(loss_of(params, weights, *micro_batch) for micro_batch in micro_batches) / len(micro_batches)
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        factor = torch.clamp(clip / norm_of(grads), max=1.0) if clip else 1.0
        new = {}
        for (name, value), grad in zip(params.items(), grads, strict=True):
            own, grad = state[name], grad * factor
            if kind == "sgd":
                grad = grad + DECAY * value
                if momentum:
                    grad = own["momentum_buffer"] = momentum * own["momentum_buffer"] + grad
                new[name] = value - LR[kind] * grad
            else:
                own["step"] = own["step"] + 1
                t = own["step"].item()
                own["exp_avg"] = 0.9 * own["exp_avg"] + 0.1 * grad
                own["exp_avg_sq"] = 0.999 * own["exp_avg_sq"] + 0.001 * grad.square()
                denominator = (own["exp_avg_sq"] / (1 - 0.999**t)).sqrt() + 1e-8
                decayed = value * (1 - LR[kind] * DECAY)
                new[name] = decayed - LR[kind] * own["exp_avg"] / (1 - 0.9**t) / denominator
        params = new
    return params


@dataclass
class Case:
    """A window of optimizer steps.

    kind: sgd or adamw. before: steps before the window. count: steps in it. accumulation: micro-batches in a step.
    clip: the largest norm of a gradient, 0 for none. loss_name: of a step. by_chain: a weight for each chain.
    corrects: whether each chain's label is a parameter of the upper level too.
    """

    kind: str
    momentum: float = 0.0
    before: int = 10
    count: int = 5
    accumulation: int = 2
    clip: float = 0.0
    seed: int = 0
    loss_name: str = "mse"
    by_chain: bool = False
    corrects: bool = False
    model: nn.Module = field(init=False)

    def __post_init__(self):
        torch.manual_seed(self.seed)
        self.model = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 1)).double()
        self.params = dict(self.model.named_parameters())
        self.weights = torch.rand(CHAINS if self.by_chain else DOMAINS, dtype=torch.float64) + 0.5
        if self.kind == "sgd":
            more = {"momentum": self.momentum}
            self.optimizer = torch.optim.SGD(self.params.values(), lr=LR["sgd"], weight_decay=DECAY, **more)
        else:
            self.optimizer = torch.optim.AdamW(self.params.values(), lr=LR["adamw"], weight_decay=DECAY)
        self.batches = [
            [(number % DOMAINS, toy_batch(number)) for number in range(first, first + self.accumulation)]
            for first in range(0, (self.before + self.count) * self.accumulation, self.accumulation)
        ]
        self.meta = toy_batch()
        self.labels = ToyLabels() if self.corrects else None
        self.exact_labels: Tensor | None = None  # dL_meta / dp [C], after `window`

    def fetch_batch(self, micro_step: int):
        """As a run's `fetch_batch`."""
        return self.batches[micro_step // self.accumulation][micro_step % self.accumulation]

    def loss(self, params, batch) -> Tensor:
        """What each chain adds to the unweighted loss of a micro-batch at given parameters, [8].

        Where labels are corrected, with their costs, [8, 2].
        """
        if self.labels is None:
            return toy_parts(self.model, params, batch, self.loss_name)
        logits = functional_call(self.model, params, (batch.inputs,)).squeeze(1)  # [8]
        costs = label_costs(STEP_LOSSES[self.loss_name], logits, batch)
        return torch.stack([toy_parts(self.model, params, self.labels.corrected(batch), self.loss_name), costs], 1)

    def weighted_loss(self, params, weights, domain, batch) -> Tensor:
        """The weighted loss of a micro-batch, a scalar."""
        if self.labels is not None:
            batch = self.labels.corrected(batch)
        parts = toy_parts(self.model, params, batch, self.loss_name)
        return (weights[batch.chain_ids if self.by_chain else domain] * parts).sum()

    def meta_loss(self, params) -> Tensor:
        """The upper level's loss: the squared error, whatever the lower level's is."""
        return toy_parts(self.model, params, self.meta).sum()

    def step(self, number: int, hypergradient=None) -> None:
        """Make an optimizer step, and report it."""
        total, params = 0, list(self.params.values())
        for i, (domain, batch) in enumerate(self.batches[number]):
            loss = self.weighted_loss(self.params, self.weights, domain, batch) / self.accumulation
            gradient = torch.autograd.grad(loss, params)
            total = total + flatten(gradient)
            if hypergradient is not None:
                hypergradient.add_micro_batch(number * self.accumulation + i, domain, batch, gradient)
        factor = min(1.0, self.clip / total.norm().item()) if self.clip else 1.0
        for param, piece in zip(params, unflatten(total * factor, params), strict=True):
            param.grad = piece
        self.optimizer.step()
        if hypergradient is not None:
            hypergradient.close_step(total, factor, LR[self.kind])

    def window(self, hypergradient) -> tuple[Tensor, Tensor]:
        """Make all steps, those of the window reported; return the exact hypergradient and v.

        Also checks that the optimizers written by hand are torch's.
        """
        for number in range(self.before):
            self.step(number)
        start = {name: p.detach().clone().requires_grad_() for name, p in self.params.items()}
        state = {name: copy.deepcopy(self.optimizer.state[p]) for name, p in self.params.items()}
        weights = self.weights.clone().requires_grad_()
        steps = self.batches[self.before :]
        if self.labels is not None:
            self.labels.labels.requires_grad_()
        after = unrolled(self.kind, self.weighted_loss, start, state, weights, steps, self.clip, self.momentum)
        meta_loss = self.meta_loss(after)
        exact = torch.autograd.grad(meta_loss, weights, retain_graph=True)[0]
        if self.labels is not None:
            self.exact_labels = torch.autograd.grad(meta_loss, self.labels.labels)[0]
            self.labels.labels.requires_grad_(False)
        for number in range(self.before, self.before + self.count):
            self.step(number, hypergradient)
        for name, param in self.params.items():
            torch.testing.assert_close(param.detach(), after[name].detach(), rtol=0, atol=1e-12)
        return exact, flatten(torch.autograd.grad(self.meta_loss(self.params), list(self.params.values())))


def cosine_and_ratio(exact: Tensor, found: Tensor) -> tuple[float, float]:
    """How near a hypergradient is to the exact one: the cosine, and the ratio of the norms."""
    return torch.cosine_similarity(exact, found, dim=0).item(), (found.norm() / exact.norm()).item()
