"""Candidate answers to a question: their scores and the choice among them.

scored = score_candidates(model, rows)           # rows: CandidateRow objects
choose(scored, n=8)                              # the best of each question's first 8
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from reweighting.data.chains import candidate_chains
from reweighting.data.schema import CandidateRow
from reweighting.modeling.aggregation import AggregationName, aggregate
from reweighting.modeling.reward_model import ProcessRewardModel


def score_candidates(
    model: ProcessRewardModel, rows: Sequence[CandidateRow], batch_size: int = 32, source: str = ""
) -> list[tuple[Tensor, Tensor]]:
    """Score the candidates of each row; equal candidates of a question are scored once.

    Args:
        model: the reward model; the caller sets autocast.
        rows: the questions.
        batch_size: chains in a forward pass; it changes scores by rounding only.
        source: the file, for error messages.

    Returns:
        For each row the step logits [N, S] and the step mask [N, S] of its N candidates, on the CPU.

    Raises:
        UserError: as `ProcessRewardModel.chain_logits` does.
    """
    chains, index_of = [], {}
    for i, row in enumerate(rows):
        for chain in candidate_chains(row, source):
            if (i, chain.steps) not in index_of:
                index_of[i, chain.steps] = len(chains)
                chains.append(chain)
    logits, mask = model.chain_logits(chains, batch_size)  # [distinct candidates, S]
    scored = []
    for i, row in enumerate(rows):
        members = [index_of[i, chain.steps] for chain in candidate_chains(row)]
        steps = int(mask[members].sum(1).max())
        scored.append((logits[members, :steps], mask[members, :steps]))
    return scored


def choose(scored: Sequence[tuple[Tensor, Tensor]], n: int, aggregation: AggregationName = "mean_logit") -> list[int]:
    """Choose the best of each question's first `n` candidates.

    Args:
        scored: logits and mask of each question, as `score_candidates` returns them.
        n: candidates to choose among.
        aggregation: a name of `aggregation.AGGREGATIONS`.

    Returns:
        For each question the index of its best candidate; of equals, the first.
    """
    return [int(aggregate(z[:n], mask[:n], aggregation).argmax()) for z, mask in scored]


def best_of_n_accuracy(
    scored: Sequence[tuple[Tensor, Tensor]],
    correct: Sequence[Sequence[bool | None]],
    n: int,
    aggregation: AggregationName = "mean_logit",
) -> float:
    """Compute the share of questions whose chosen candidate is correct.

    Args:
        scored: logits and mask of each question, as `score_candidates` returns them.
        correct: whether each candidate is; None if that is not known: such a candidate is not chosen from, and a
            question of such candidates only is left out.
        n: the first candidates of those known that are chosen from.
        aggregation: a name of `aggregation.AGGREGATIONS`.

    Returns:
        The share in [0, 1]; NaN if nothing is known of any candidate.
    """
    pools, labels = [], []
    for (z, mask), own in zip(scored, correct, strict=True):
        known = [i for i, label in enumerate(own) if label is not None]
        if known:
            pools.append((z[known], mask[known]))
            labels.append([float(bool(own[i])) for i in known])
    chosen = choose(pools, n, aggregation)
    return torch.tensor([own[best] for own, best in zip(labels, chosen, strict=True)]).mean().item()  # NaN for none
