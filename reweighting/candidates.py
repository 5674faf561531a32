"""Candidate answers to a question: their scores, the choice among them, and how good each way of choosing is.

scored = score_candidates(model, rows)           # rows: CandidateRow objects
choose(scored, n=8)                              # the best of each question's first 8
choice_outcomes(*scored[0], right, answers, n=8) # what each way of choosing gets
"""

import re
from collections.abc import Sequence
from decimal import Context, Decimal

import torch
from torch import Tensor

from reweighting.aggregation import AGGREGATIONS, aggregate
from reweighting.chains import candidate_chains
from reweighting.records import CandidateRow
from reweighting.reward_model import ProcessRewardModel

# 13, -1.50, .5, 1,300 (but not 1,3: a pair, or a decimal comma), 2e6
NUMBER = re.compile(r"[+-]?((\d+|\d{1,3}(,\d{3})+)(\.\d*)?|\.\d+)(e[+-]?\d{1,4})?")
FINAL_ANSWER = re.compile(r"final answer\W*?:[ \t*]*(.*)", re.I)


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


def final_answer(response: str) -> str | None:
    """What stands behind the last `Final answer:`, to the end of its line; None if there is none."""
    found = FINAL_ANSWER.findall(response)
    return found[-1] if found else None


def normal_answer(answer: str | None) -> str | None:
    """One form for answers that mean the same: `13`, ` 13.0 ` and `**13**`, `1,300` and `1300`, `Red.` and `red`."""
    if answer is None:
        return None
    text = " ".join(answer.lstrip(" \t\n*$`").rstrip(" \t\n*$`.").casefold().split())
    if not NUMBER.fullmatch(text):
        return text or None
    number = Decimal(text.replace(",", ""))
    digits = Context(prec=len(text) + 1)  # none is rounded away
    return format(number.normalize(digits), "E") if number else "0"


def stated_answers(row: CandidateRow) -> list[str | None]:
    """Each candidate's answer in its normal form: its `answers`, else what the responses state; None where none is."""
    given = row.answers if row.answers is not None else map(final_answer, row.candidates)
    return [normal_answer(answer) for answer in given]


def right_or_wrong(row: CandidateRow) -> list[bool] | None:
    """Whether each candidate is right: its `true_false`, else by `ground_truth`; None if the row has neither."""
    if row.true_false is not None:
        return row.true_false
    if row.ground_truth is None:
        return None
    truth = normal_answer(str(row.ground_truth))
    return [answer is not None and answer == truth for answer in stated_answers(row)]


def choice_outcomes(
    z: Tensor,
    mask: Tensor,
    right: Sequence[bool],
    answers: Sequence[str | None],
    n: int,
    aggregation: str = "mean_logit",
) -> dict[str, float]:
    """How probably each way of choosing among a question's first `n` candidates gets a right one.

    z, mask: [N, S]. right, answers: one for each candidate. `pass@1` takes any candidate; `majority vote` any with
    the most frequent answer; `weighted majority` the same, a vote counting sigmoid(aggregate); `best of N, <name>`
    the one of the highest aggregate; `pass@N` is 1 if any is right: the ceiling. Where no candidate states an answer,
    a vote takes any candidate.
    """
    z, mask, right, answers = z[:n], mask[:n], list(right[:n]), list(answers[:n])
    weights = aggregate(z, mask, aggregation).sigmoid().tolist()
    outcomes = {
        "pass@1": sum(right) / len(right),
        "majority vote": _vote(answers, right, [1.0] * len(right)),
        "weighted majority": _vote(answers, right, weights),
    }
    for name in AGGREGATIONS:
        outcomes[f"best of N, {name}"] = float(right[int(aggregate(z, mask, name).argmax())])
    return outcomes | {"pass@N": float(any(right))}


def _vote(answers: Sequence[str | None], right: Sequence[bool], weights: Sequence[float]) -> float:
    """The share of right ones among the candidates with the answer of most weight; of tied answers, their mean."""
    votes: dict[str, float] = {}
    for answer, weight in zip(answers, weights, strict=True):
        if answer is not None:
            votes[answer] = votes.get(answer, 0.0) + weight
    if not votes:
        return sum(right) / len(right)
    shares = []
    for answer, weight in votes.items():
        if weight == max(votes.values()):
            members = [r for a, r in zip(answers, right, strict=True) if a == answer]
            shares.append(sum(members) / len(members))
    return sum(shares) / len(shares)
