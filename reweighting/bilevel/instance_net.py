"""A small network that computes the weight of each chain from what is known of it (DreamPRM-1.5, arXiv 2509.05542).

A table (`instance_weights.py`) learns nothing of a chain that it has not met, and little of one that it meets once. The
network has a few hundred parameters, which all chains share. It reads of a chain

    its domain                      a row of the hidden layer's biases
    `LOSSES`                        mean, largest and last of 2 sqrt(loss) - 1 over its labeled steps: with the squared
                                    error, the distance between score and label, from -1 to 1
    `KNOWN`                         entropy of its labels, number of steps, length: standardized over all chains

The losses are those with which a window first meets the chain; they hold for the rest of the window, so that the weight
is a function of the parameters alone, and the slopes of the chains, pulled back through the network, are the gradient.
That a weight moves the losses which it is computed from is of second order in the learning rate, like what every
hypergradient here leaves out. Published is a network of the same width that reads the step's two probabilities.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from reweighting.bilevel.instance_weights import NormalizedChainWeights
from reweighting.bilevel.label_correction import training_ids
from reweighting.data.chains import Chain
from reweighting.devices import autocast
from reweighting.distributed import collectives
from reweighting.modeling.collate import Batch

HIDDEN = 10  # as published
LOSSES = ("mean_loss", "largest_loss", "last_loss")
KNOWN = ("label_entropy", "steps", "length")


def known_features(chains: Sequence[Chain]) -> Tensor:
    """Compute what is known of chains before they are met: `KNOWN`.

    Args:
        chains: With at least one labeled step each, [C].

    Returns:
        [C, 3]: the mean entropy of the labels in bits, and the logarithms of the number of steps and of characters;
        each with mean 0 and variance 1 over the chains, or 0 where all are alike.
    """
    rows = []
    for chain in chains:
        entropies = [_entropy(target) for target in chain.targets if not math.isnan(target)]
        length = sum(map(len, chain.steps))
        rows.append((sum(entropies) / len(entropies), math.log(len(chain.steps)), math.log(1 + length)))
    features = torch.tensor(rows, dtype=torch.float64)  # [C, 3]
    features -= features.mean(0)
    deviation = features.square().mean(0).sqrt()
    return (features / torch.where(deviation > 1e-9, deviation, torch.inf)).float()


def _entropy(share: float) -> float:
    """The entropy in bits of a coin that shows heads with this probability."""
    return -sum(one * math.log2(one) for one in (share, 1 - share) if one > 0)


def loss_features(errors: Tensor, labeled: Tensor) -> Tensor:
    """Compute `LOSSES`.

    Args:
        errors: Loss of each step, [B, S].
        labeled: [B, S] bool, whether it counts; some step of each chain does.

    Returns:
        [B, 3].
    """
    roots = 2 * errors.float().clamp(min=0).sqrt() - 1  # [B, S]
    mean = torch.where(labeled, roots, 0).sum(1) / labeled.sum(1)
    largest = roots.masked_fill(~labeled, -torch.inf).amax(1)
    last = (labeled * torch.arange(1, labeled.shape[1] + 1, device=labeled.device)).argmax(1)  # [B]
    return torch.stack([mean, largest, roots.gather(1, last[:, None]).squeeze(1)], dim=1)


class InstanceNet(NormalizedChainWeights):
    """The weights softplus(network), scaled; the network's output is 0 at the start, so that every weight is 1.

    Args:
        domains: As for `NormalizedChainWeights`.
        domain_of: As for `ChainWeights`.
        times_domain: As for `NormalizedChainWeights`.
        known: From `known_features`, [C, 3].
        seed: Of the hidden layer.
    """

    def __init__(self, domains: list[str], domain_of: Tensor, times_domain: bool, known: Tensor, seed: int):
        super().__init__(domains, domain_of, times_domain)
        chains, inputs = len(domain_of), len(LOSSES) + known.shape[1]
        made = torch.randn(HIDDEN, inputs, generator=torch.Generator().manual_seed(seed))  # the same in each process
        self.hidden = nn.Parameter(made / math.sqrt(inputs))
        self.domain = nn.Parameter(torch.zeros(len(domains), HIDDEN))
        self.output = nn.Parameter(torch.zeros(HIDDEN))
        self.known = nn.Buffer(known, persistent=False)
        self.losses = nn.Buffer(torch.zeros(chains, len(LOSSES)))  # the newest of each chain
        self.losses_before = nn.Buffer(self.losses.clone())  # those at the start of the window
        self.met = nn.Buffer(torch.zeros(chains, dtype=torch.bool))  # in this window
        self.seen = nn.Buffer(torch.zeros(chains, dtype=torch.bool))  # ever
        self._held_means: Tensor | None = None

    def numbers(self, losses: Tensor, chain_ids: Tensor | slice = slice(None)) -> Tensor:
        """Compute softplus(network) of n chains.

        Args:
            losses: Theirs, [n, 3].
            chain_ids: Their numbers, [n] int64; by default of all.

        Returns:
            [n].
        """
        inputs = torch.cat([losses, self.known[chain_ids]], dim=1).to(self.hidden.dtype)  # [n, 6]
        with autocast(losses.device, "fp32"):  # whatever the precision of the model
            hidden = (inputs @ self.hidden.T + self.domain[self.domain_of[chain_ids]]).tanh()  # [n, HIDDEN]
            return softplus(hidden @ self.output)

    def means(self) -> Tensor:
        """Compute the mean number of each domain's chains at the start of the window, [K]: what numbers are scaled by.

        It cannot be of the newest losses, which change from one micro-batch to the next.
        """
        return self.domain_means(self.numbers(self.losses_before))

    def forward(self) -> Tensor:
        """Compute the weights of all chains, [C]: for those that this window has met, the weights that they had."""
        return self.scaled(self.numbers(self.losses), self.domain_of, self.means())

    @torch.no_grad()
    def of_chains(self, batch: Batch, errors: Tensor) -> Tensor:
        """Note the losses of the chains that the window has not met before, and return the weights of all of them."""
        chain_ids = training_ids(batch)
        self._note(chain_ids, loss_features(errors, batch.target_mask))
        if self._held_means is None:
            self._held_means = self.means()
        chain_ids = chain_ids.to(self.domain_of.device)
        numbers = self.numbers(self.losses[chain_ids], chain_ids)
        return self.scaled(numbers, self.domain_of[chain_ids], self._held_means)

    def _note(self, chain_ids: Tensor, losses: Tensor) -> None:
        """Keep the losses [B, 3] of chains that this window has not met, of all processes."""
        if collectives.world_size() > 1:
            parts = collectives.all_gather_object((chain_ids, losses.cpu()))
            chain_ids, losses = torch.cat([ids for ids, _ in parts]), torch.cat([part for _, part in parts])
        first: dict[int, int] = {}  # a small domain's batch holds a chain twice: its first row counts
        for row, chain in enumerate(chain_ids.tolist()):
            first.setdefault(chain, row)
        ids = torch.tensor(list(first), device=self.losses.device)
        new = losses.to(self.losses)[torch.tensor(list(first.values()), device=self.losses.device)]
        finite = new.isfinite().all(1)
        self.losses[ids] = torch.where((finite & ~self.met[ids])[:, None], new, self.losses[ids])
        self.met[ids] |= finite
        self.seen[ids] |= finite

    def begin_window(self) -> None:
        """Begin a window: chains that were never met count as an average one of those that were."""
        super().begin_window()
        self._held_means = None
        if self.seen.any():
            self.losses[~self.seen] = self.losses[self.seen].mean(0)
        self.losses_before.copy_(self.losses)
        self.met.zero_()

    def observations(self) -> dict[str, Tensor]:
        """Return a copy of what micro-batches have left: losses, and which chains were met."""
        kept = {"losses": self.losses, "losses_before": self.losses_before, "met": self.met, "seen": self.seen}
        return {name: value.to("cpu", copy=True) for name, value in kept.items()}

    def load_observations(self, observations: dict[str, Tensor]) -> None:
        """Continue from what `observations` gave.

        Raises:
            ValueError: It is of another number of chains.
        """
        super().load_observations(observations)
        self._held_means = None
        for name, value in self.observations().items():
            if observations[name].shape != value.shape or observations[name].dtype != value.dtype:
                raise ValueError(f"{name} of the instances has the shape {tuple(observations[name].shape)}")
            getattr(self, name).copy_(observations[name])

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Return the parameters for an optimizer; a step moves a raw number by about as much as one of the table."""
        own = {"params": [self.hidden, self.domain, self.output], "lr": learning_rate / HIDDEN}
        return [own] if self.domain_weights is None else [own, *self.domain_weights.parameter_groups(learning_rate)]

    def tensors(self) -> dict[str, Tensor]:
        """Return the network, for a file: {name: parameter}."""
        named = {"hidden": self.hidden, "domain": self.domain, "output": self.output}
        return {name: value.detach().cpu().contiguous() for name, value in named.items()}
