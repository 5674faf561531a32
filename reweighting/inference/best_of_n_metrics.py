"""How well each way of choosing works, from rows and the choices made for them, one at a time."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from reweighting.data.answers import candidate_correctness, stated_answers
from reweighting.data.schema import CandidateRow
from reweighting.inference.metrics import Bootstrap
from reweighting.modeling.aggregation import AGGREGATIONS, aggregate


def measure(pairs: Iterable[tuple[CandidateRow, dict]], aggregation: str) -> dict[int, dict]:
    """For N = 1, 2, 4, 8, … what each way of choosing among the first N gets, over the questions that have N.

    pairs: a row and its choice, as `best_of_n.py` writes it. aggregation: of the weighted majority.
    Returns {N: {"questions": …, "ways": {way: {"mean", "low", "high"}}}}, the interval of 95 % over questions; empty if
    no row says which candidates are right.
    """
    means: dict[int, Bootstrap] = {}
    for row, choice in pairs:
        right = candidate_correctness(row)
        if right is None or not any(entry is not None for entry in right):
            continue
        right = [entry is True for entry in right]
        answers = stated_answers(row)
        z, mask = logits_of(choice["scores"])
        n = 1
        while n <= len(right):
            means.setdefault(n, Bootstrap()).add(choice_outcomes(z, mask, right, answers, n, aggregation))
            n *= 2
    return {n: {"questions": mean.count, "ways": mean.result()} for n, mean in means.items()}


def logits_of(scores: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Step logits [N, S], float64, and step mask [N, S] of the scores of N candidates."""
    rows = [torch.tensor(row, dtype=torch.float64) for row in scores]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0.5)
    mask = torch.arange(padded.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    return torch.logit(padded, eps=1e-16), mask


def table(results: dict[int, dict]) -> str:
    """The results as lines of text: a row a way of choosing, a column an N, in percent with the interval."""
    ways = list(next(iter(results.values()))["ways"])
    width = max(map(len, ways))
    lines = [" " * (width + 2) + "".join(f"{f'N = {n}':>20}" for n in results)]
    for way in ways:
        cells = (result["ways"][way] for result in results.values())
        shown = (f"{100 * c['mean']:.1f} ({100 * c['low']:.1f}–{100 * c['high']:.1f})" for c in cells)
        lines.append(f"  {way:<{width}}" + "".join(f"{cell:>20}" for cell in shown))
    counts = "".join(f"{result['questions']:>20}" for result in results.values())
    lines.append(f"  {'questions':<{width}}{counts}")
    return "\n".join(["right answers in percent (95 % interval over questions)", *lines])


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
