"""How often each way of choosing is correct, from rows and the choices made for them, one at a time."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from rich.table import Table
from torch import Tensor

from reweighting.data.answers import candidate_correctness, stated_answers
from reweighting.data.schema import CandidateRow
from reweighting.inference.bootstrap import StreamingBootstrap
from reweighting.modeling.aggregation import AGGREGATIONS, AggregationName, aggregate
from reweighting.tables import new_table

VOTES = ("majority vote", "weighted majority")


@dataclass
class BestOfNResults:
    """What each way of choosing gets, always over the same questions.

    Attributes:
        best_of: {N: {"questions": how many have N candidates that can be judged, "ways": {way: {"mean", "low",
            "high"}}}}; the interval is one of 95 % over questions. Empty if no candidate can be judged.
        questions: those with a candidate that can be judged; each counts in every column.
        unjudged_questions: the others.
        answers: candidates of all questions.
        unjudged_answers: those of which it is not known whether they are correct; no way chooses them.
        silent_answers: those that state no answer to compare with `ground_truth`, or to vote for.
        single_step_answers: those of one step, for which all aggregations agree.
        votes: whether any candidate that can be judged states an answer to vote for.
    """

    best_of: dict[int, dict] = field(default_factory=dict)
    questions: int = 0
    unjudged_questions: int = 0
    answers: int = 0
    unjudged_answers: int = 0
    silent_answers: int = 0
    single_step_answers: int = 0
    votes: bool = False


def candidate_counts(largest: int) -> list[int]:
    """List the numbers of candidates to measure: 1, 2, 4, 8, … and the largest."""
    powers = [2**exponent for exponent in range(largest.bit_length())]
    return powers if powers[-1] == largest else [*powers, largest]


def measure(pairs: Iterable[tuple[CandidateRow, dict]], aggregation: AggregationName, largest: int) -> BestOfNResults:
    """Measure what each way of choosing gets among the first N candidates, or all where there are fewer.

    Args:
        pairs: a row and its choice, as `best_of_n.py` writes it.
        aggregation: of the weighted majority.
        largest: the most candidates that a row has.
    """
    found, counts = BestOfNResults(), candidate_counts(largest)
    having = dict.fromkeys(counts, 0)
    means: StreamingBootstrap[tuple[int, str]] = StreamingBootstrap()  # of N and a way of choosing
    for row, choice in pairs:
        correct, answers = candidate_correctness(row) or [], stated_answers(row)
        known = [i for i, label in enumerate(correct) if label is not None]
        found.answers += len(row.candidates)
        found.unjudged_answers += len(row.candidates) - len(known)
        found.silent_answers += answers.count(None)
        found.single_step_answers += sum(len(scores) == 1 for scores in choice["scores"])
        if not known:
            found.unjudged_questions += 1
            continue
        z, mask = logits_of([choice["scores"][i] for i in known])
        labels, stated = [bool(correct[i]) for i in known], [answers[i] for i in known]
        found.votes |= any(answer is not None for answer in stated)
        outcomes = {}
        for n in counts:
            having[n] += n <= len(known)
            own = choice_outcomes(z, mask, labels, stated, n, aggregation)
            outcomes |= {(n, way): value for way, value in own.items()}
        means.add(outcomes)
    found.questions = means.count
    if means.count:
        for (n, way), interval in means.result().items():
            if found.votes or way not in VOTES:
                found.best_of.setdefault(n, {"questions": having[n], "ways": {}})["ways"][way] = interval
    return found


def logits_of(scores: list[list[float]]) -> tuple[Tensor, Tensor]:
    """Read the logits off the scores again.

    Args:
        scores: the step scores of each of N candidates, in (0, 1).

    Returns:
        Step logits [N, S], float64, and step mask [N, S].
    """
    rows = [torch.tensor(row, dtype=torch.float64) for row in scores]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0.5)  # [N, S]
    mask = torch.arange(padded.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    return torch.logit(padded, eps=1e-16), mask


def results_table(results: BestOfNResults) -> Table:
    """Make a table of the results: a row a way of choosing, a column an N; there must be a result."""
    table = new_table(f"correct answers in percent, over {results.questions} questions (95 % interval)")
    table.add_column("chosen by")
    for n in results.best_of:
        table.add_column(f"N = {n}", justify="right")
    columns = results.best_of.values()
    for way in next(iter(columns))["ways"]:
        cells = (column["ways"][way] for column in columns)
        table.add_row(way, *(f"{100 * c['mean']:.1f} ({100 * c['low']:.1f}–{100 * c['high']:.1f})" for c in cells))
    if any(column["questions"] < results.questions for column in columns):
        table.add_section()
        table.add_row("questions with N candidates", *(str(column["questions"]) for column in columns))
    return table


def warnings(results: BestOfNResults) -> list[str]:
    """List what could make the numbers mislead."""
    total, found = results.answers, []
    if results.silent_answers:
        votes = "" if results.votes else "; there are no votes"
        found.append(f"{results.silent_answers} of {total} answers state none{votes}")
    if results.best_of and results.unjudged_answers:
        found.append(f"{results.unjudged_answers} of {total} answers cannot be judged: the numbers are over the others")
    if results.best_of and results.unjudged_questions:
        found.append(f"{results.unjudged_questions} questions without an answer that can be judged are left out")
    if results.single_step_answers:
        found.append(
            f"{results.single_step_answers} of {total} answers have a single step: all aggregations agree on it"
        )
    return found


def choice_outcomes(
    z: Tensor,
    mask: Tensor,
    correct: Sequence[bool],
    answers: Sequence[str | None],
    n: int,
    aggregation: AggregationName = "mean_logit",
) -> dict[str, float]:
    """Compute how probably each way of choosing among a question's first candidates gets a correct one.

    `pass@1` takes any candidate; `majority vote` any with the most frequent answer; `weighted majority` the same, a
    vote counting sigmoid(aggregate); `best of N, <name>` the one of the highest aggregate; `pass@N` is 1 if any is
    correct: the ceiling. A vote takes any candidate where none of them states an answer.

    Args:
        z: [N, S], step logits.
        mask: [N, S], True where a step exists.
        correct: whether each candidate is.
        answers: what each candidate states in its normal form, None where it states nothing.
        n: the first candidates to choose among; all where there are fewer.
        aggregation: of the weighted majority.

    Returns:
        {way: probability}.
    """
    z, mask, correct, answers = z[:n], mask[:n], list(correct[:n]), list(answers[:n])
    weights = aggregate(z, mask, aggregation).sigmoid().tolist()
    outcomes = {
        "pass@1": sum(correct) / len(correct),
        "majority vote": _vote(answers, correct, [1.0] * len(correct)),
        "weighted majority": _vote(answers, correct, weights),
    }
    for name in AGGREGATIONS:
        outcomes[f"best of N, {name}"] = float(correct[int(aggregate(z, mask, name).argmax())])
    return outcomes | {"pass@N": float(any(correct))}


def _vote(answers: Sequence[str | None], correct: Sequence[bool], weights: Sequence[float]) -> float:
    """The share of correct ones among the candidates with the answer of most weight; of tied answers, their mean."""
    votes: dict[str, float] = {}
    for answer, weight in zip(answers, weights, strict=True):
        if answer is not None:
            votes[answer] = votes.get(answer, 0.0) + weight
    if not votes:
        return sum(correct) / len(correct)
    shares = []
    for answer, weight in votes.items():
        if weight == max(votes.values()):
            members = [c for a, c in zip(answers, correct, strict=True) if a == answer]
            shares.append(sum(members) / len(members))
    return sum(shares) / len(shares)
