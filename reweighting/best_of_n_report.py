"""How well each way of choosing works, from rows and the choices made for them, one at a time."""

from collections.abc import Iterable

import torch

from reweighting.candidates import choice_outcomes, right_or_wrong, stated_answers
from reweighting.metrics import Bootstrap
from reweighting.records import CandidateRow


def measure(pairs: Iterable[tuple[CandidateRow, dict]], aggregation: str) -> dict[int, dict]:
    """For N = 1, 2, 4, 8, … what each way of choosing among the first N gets, over the questions that have N.

    pairs: a row and its choice, as `best_of_n.py` writes it. aggregation: of the weighted majority.
    Returns {N: {"questions": …, "ways": {way: {"mean", "low", "high"}}}}, the interval of 95 % over questions; empty if
    no row says which candidates are right.
    """
    means: dict[int, Bootstrap] = {}
    for row, choice in pairs:
        right = right_or_wrong(row)
        if right is None:
            continue
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
