"""Use the reward model: choose the best of N candidate answers to a question."""

from collections.abc import Sequence

import torch
from torch import Tensor

from reweighting.aggregation import aggregate
from reweighting.chains import candidate_chains
from reweighting.reward_model import ProcessRewardModel


def score_candidates(model: ProcessRewardModel, rows: Sequence, batch_size: int = 32) -> list[tuple[Tensor, Tensor]]:
    """For each row its candidates' step logits [N, S] and step mask [N, S], on the CPU.

    rows: CandidateRow objects. batch_size: chains in a forward pass; it changes no score beyond rounding.
    """
    chains = [candidate_chains(row) for row in rows]
    logits, mask = model.chain_logits([chain for group in chains for chain in group], batch_size)
    counts = [len(group) for group in chains]
    return list(zip(logits.split(counts), mask.split(counts), strict=True))


def choose(scored: Sequence[tuple[Tensor, Tensor]], n: int, aggregation: str = "mean_logit") -> list[int]:
    """The index of the best among each question's first `n` candidates (of equals, the first)."""
    return [int(aggregate(z[:n], mask[:n], aggregation).argmax()) for z, mask in scored]


def best_of_n_accuracy(
    scored: Sequence[tuple[Tensor, Tensor]], right: Sequence[Sequence[bool]], n: int, aggregation: str = "mean_logit"
) -> float:
    """The share of questions whose chosen candidate is right."""
    chosen = choose(scored, n, aggregation)
    return torch.tensor([float(r[c]) for r, c in zip(right, chosen, strict=True)]).mean().item()
