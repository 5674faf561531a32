"""Candidate answers to a question: their scores, the choice among them, and how good each way of choosing is.

scored = score_candidates(model, rows)           # rows: CandidateRow objects
choose(scored, n=8)                              # the best of each question's first 8
choice_outcomes(*scored[0], right, answers, n=8) # what each way of choosing gets
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from reweighting.data.chains import candidate_chains
from reweighting.data.schema import CandidateRow
from reweighting.modeling.aggregation import aggregate
from reweighting.modeling.reward_model import ProcessRewardModel


def score_candidates(
    model: ProcessRewardModel, rows: Sequence[CandidateRow], batch_size: int = 32, source: str = ""
) -> list[tuple[Tensor, Tensor]]:
    """For each row its candidates' step logits [N, S] and step mask [N, S], on the CPU.

    batch_size: chains in a forward pass; it changes no score beyond rounding. source: the file, for error messages.
    Equal candidates of a question are scored once. Raises UserError as `ProcessRewardModel.chain_logits` does.
    """
    # Questions of like length side by side need little padding; a question's candidates stay together, since they
    # share the image.
    order = sorted(range(len(rows)), key=lambda i: max(map(len, rows[i].candidates)))
    chains, place = [], {}
    for i in order:
        for chain in candidate_chains(rows[i], source):
            if (i, chain.steps) not in place:
                place[i, chain.steps] = len(chains)
                chains.append(chain)
    logits, mask = model.chain_logits(chains, batch_size)
    scored = []
    for i, row in enumerate(rows):
        members = [place[i, chain.steps] for chain in candidate_chains(row)]
        steps = int(mask[members].sum(1).max())
        scored.append((logits[members, :steps], mask[members, :steps]))
    return scored


def choose(scored: Sequence[tuple[Tensor, Tensor]], n: int, aggregation: str = "mean_logit") -> list[int]:
    """The index of the best among each question's first `n` candidates (of equals, the first)."""
    return [int(aggregate(z[:n], mask[:n], aggregation).argmax()) for z, mask in scored]


def best_of_n_accuracy(
    scored: Sequence[tuple[Tensor, Tensor]], right: Sequence[Sequence[bool]], n: int, aggregation: str = "mean_logit"
) -> float:
    """The share of questions whose chosen candidate is right."""
    chosen = choose(scored, n, aggregation)
    return torch.tensor([float(r[c]) for r, c in zip(right, chosen, strict=True)]).mean().item()
