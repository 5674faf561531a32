"""Loads chains for each use, from sources of any format.

    train = load_training(expand(["data/*.jsonl"]), None, ReadingOptions(), min_domains=2)
    train.chains, train.domains, train.notes

Files of the published formats go through `load_rows.py`, all others through `load_answers.py`. `notes` says what has
been left out and what is odd, for the caller to print.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from reweighting.data.canonical import is_correct
from reweighting.data.chains import Chain, checked_steps, known_times, meta_chains, step_warnings, training_chains
from reweighting.data.load_answers import PUBLISHED, Answer, LoadReport, format_of, iterate_answers
from reweighting.data.load_rows import (
    check_domains,
    iterate_candidate_rows,
    iterate_training_rows,
    load_evaluation_rows,
    load_meta_rows,
)
from reweighting.data.readers.base import ReadingOptions
from reweighting.data.schema import CandidateRow
from reweighting.data.sources import Source
from reweighting.errors import UserError


@dataclass
class Chains:
    """Chains of one use.

    Attributes:
        chains: in the order of the sources and their rows.
        domains: the names of their domains, sorted; empty where chains have none.
        notes: what has been left out, and what is odd.
    """

    chains: list[Chain] = field(default_factory=list)
    domains: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class LabelledChain:
    """A chain whose steps are evaluated.

    Attributes:
        chain: the chain; its targets are NaN where a step has no label.
        domain: the name of its domain.
        accuracies: the labels of its labelled steps, in [0, 1].
        correct: whether each labelled step is correct.
        key: tells its question from others, on every machine.
    """

    chain: Chain
    domain: str
    accuracies: list[float]
    correct: list[bool]
    key: str


def is_published(source: Source) -> bool:
    """Return whether a source has rows for `load_rows.py`: of a published format, or of none that is known."""
    name = format_of(source)
    return name is None or name in PUBLISHED


def load_training(
    sources: Sequence[Source], image_root: str | Path | None, options: ReadingOptions, *, min_domains: int
) -> Chains:
    """Load answers with step labels as chains with targets.

    Args:
        sources: where they stand.
        image_root: the folder that holds all images; None: relative paths are looked for beside their file, then in
            the working folder.
        options: what the formats leave open.
        min_domains: how many domains there must be at least.

    Raises:
        UserError: anything is wrong, no step is labelled, or there are too few domains.
    """
    report, result = LoadReport(), Chains()
    for source in sources:
        if is_published(source):
            rows = iterate_training_rows(source, image_root, options)
            part, domains = training_chains(rows, source.path, options.step_separator)
        else:
            answers = iterate_answers(source, image_root, options, report)
            part, domains = _with_targets(answers, report)
        result.notes += step_warnings(part, source.path)
        _add(result, part, domains)
    result.notes[:0] = report.notes()
    if not result.chains:
        text = f"{_names(sources)}: no step has a label, so there is nothing to train on."
        raise UserError("\n".join([text, *result.notes]))
    check_domains(result.domains, min_domains, _names(sources))
    return result


def _with_targets(answers: Iterable[Answer], report: LoadReport) -> tuple[list[Chain], list[str]]:
    """Answers as training chains, and the names of their domains. Those without any label are counted."""
    chains, place_of = [], {}  # place_of: domain -> its place in the order of appearance
    for answer in answers:
        if all(label is None for label in answer.labels):
            report.left_out[answer.source, "none of its steps has a label"] += 1
            continue
        domain = place_of.setdefault(answer.domain, len(place_of))
        chains.append(_chain(answer, _targets(answer), domain=domain))
    return chains, list(place_of)


def _targets(answer: Answer) -> tuple[float, ...]:
    return tuple(math.nan if label is None else label for label in answer.labels)


def _chain(answer: Answer, targets: tuple[float, ...] = (), label: float = math.nan, domain: int = -1) -> Chain:
    """An answer as a chain."""
    steps = checked_steps(answer.steps, answer.index, answer.source)
    times = known_times(count or math.nan for count in answer.times)
    return Chain(
        answer.question, steps, answer.images, targets, label, domain, (answer.index,), answer.source, times=times
    )


def _add(result: Chains, chains: list[Chain], domains: list[str]) -> None:
    """Add the chains of a source, whose domains are numbered by the source's own list."""
    merged = sorted({*result.domains, *domains})
    result.chains = _renumbered(result.chains, result.domains, merged)
    result.chains += _renumbered(chains, domains, merged)
    result.domains = merged


def _renumbered(chains: list[Chain], old: list[str], new: list[str]) -> list[Chain]:
    places = [new.index(name) for name in old]
    if places == list(range(len(old))):
        return chains
    return [replace(chain, domain=places[chain.domain]) for chain in chains]


def load_meta(sources: Sequence[Source], image_root: str | Path | None, options: ReadingOptions) -> Chains:
    """Load whole answers as chains with a label.

    Args:
        sources, image_root, options: as in `load_training`.

    Raises:
        UserError: anything is wrong, or all answers are correct, or all incorrect.
    """
    report, result, by_steps = LoadReport(), Chains(), 0
    published = [is_published(source) for source in sources]
    several = len(sources) > 1
    for source, is_own in zip(sources, published, strict=True):
        if is_own:
            rows = load_meta_rows(source, image_root, options, one_class=several)
            part, stepless = meta_chains(rows, source.path, options.step_separator, one_class=several)
            if stepless:
                result.notes.append(f"{source.path}: {stepless} of {len(rows)} rows have no `Step N` marker and are "
                                    "left out")  # fmt: skip
        else:
            part = []
            for answer in iterate_answers(source, image_root, options, report):
                known = answer.correct()
                label = is_correct(known, list(answer.labels))
                if label is None:
                    report.left_out[source.path, "it is not known whether it is correct"] += 1
                    continue
                by_steps += known is None
                part.append(_chain(answer, label=float(label)))
        result.notes += step_warnings(part, source.path)
        result.chains += part
    names, total = _names(sources), len(result.chains)
    if by_steps:
        result.notes.insert(0, f"{names}: {by_steps} of {total} answers do not say whether their final answer is "
                            "correct: they count as correct if none of their steps is wrong")  # fmt: skip
    result.notes[:0] = report.notes()
    correct = sum(chain.label == 1 for chain in result.chains)
    if correct in (0, total):
        text = f"{names}: {correct} answers are correct and {total - correct} are not; the upper level needs both."
        raise UserError("\n".join([text, *result.notes]))
    return result


def load_evaluation(
    sources: Sequence[Source], image_root: str | Path | None, options: ReadingOptions, threshold: float
) -> tuple[list[LabelledChain], list[str]]:
    """Load answers whose step scores are compared with step labels.

    Args:
        sources, image_root, options: as in `load_training`.
        threshold: a step is correct if its label is above this; a row's `correct` decides where it is given.

    Returns:
        The chains, and notes.

    Raises:
        UserError: anything is wrong, or no step is labelled.
    """
    report, found, notes = LoadReport(), [], []
    for source in sources:
        if is_published(source):
            part = _evaluation_rows(source, image_root, options, threshold)
        else:
            part = []
            for answer in iterate_answers(source, image_root, options, report):
                labels = [label for label in answer.labels if label is not None]
                if not labels:
                    report.left_out[source.path, "none of its steps has a label"] += 1
                    continue
                key = "\n".join((answer.domain, answer.question, *map(str, answer.image_names)))
                correct = [label > threshold for label in labels]
                chain = _chain(answer, _targets(answer))
                part.append(LabelledChain(chain, answer.domain, labels, correct, key))
        notes += step_warnings((labelled.chain for labelled in part), source.path)
        found += part
    notes[:0] = report.notes()
    if not found:
        raise UserError(
            "\n".join([f"{_names(sources)}: no step has a label, so there is nothing to evaluate.", *notes])
        )
    return found, notes


def _evaluation_rows(
    source: Source, image_root: str | Path | None, options: ReadingOptions, threshold: float
) -> list[LabelledChain]:
    """The chains of rows in the training format."""
    rows = load_evaluation_rows(source, image_root, options)
    chains, domains = training_chains(rows, source.path, options.step_separator)
    found = []
    for chain in chains:
        own = [rows[index] for index in chain.rows]
        first = own[0]
        names = first.image_path if isinstance(first.image_path, list) else [first.image_path]
        key = "\n".join((first.dataset, chain.question, *map(str, names)))
        correct = [row.accuracy > threshold if row.correct is None else row.correct for row in own]
        found.append(LabelledChain(chain, domains[chain.domain], [row.accuracy for row in own], correct, key))
    return found


def iterate_candidates(
    sources: Sequence[Source],
    image_root: str | Path | None,
    options: ReadingOptions,
    report: LoadReport,
    *,
    decode_images: bool = True,
) -> Iterator[CandidateRow]:
    """Load questions with several answers.

    Published candidate rows come one after the other, in memory that does not grow with the file. The answers of all
    other sources are collected by question and images first.

    Args:
        sources, image_root, options: as in `load_training`.
        report: is filled as the answers are read.
        decode_images: False only looks whether the images are there, for files that have been checked before.

    Raises:
        UserError: anything is wrong.
    """
    count = 0
    groups: dict[tuple, list[Answer]] = defaultdict(list)
    for source in sources:
        if is_published(source):
            for row in iterate_candidate_rows(source, image_root, options, decode_images=decode_images):
                yield row if len(sources) == 1 else row.model_copy(update={"index": count})
                count += 1
        else:
            for answer in iterate_answers(source, image_root, options, report, decode=decode_images):
                groups[answer.question, answer.images].append(answer)
    for answers in groups.values():
        yield _candidates(answers, count)
        count += 1


def _candidates(answers: list[Answer], index: int) -> CandidateRow:
    """A question with its answers as a candidate row."""
    first = answers[0]
    chains = [_chain(answer) for answer in answers]  # checks them
    images = chains[0].images
    correct = [answer.correct() for answer in answers]
    stated = [answer.answer for answer in answers if answer.answer is not None]
    return CandidateRow(
        id=index if first.id is None else first.id,
        input=first.question,
        image_path=[str(image) for image in images] or None,
        image_files=images,
        candidates=["\n".join(chain.steps) for chain in chains],
        candidate_steps=[list(chain.steps) for chain in chains],
        true_false=None if correct.count(None) == len(correct) else correct,
        answers=stated if len(stated) == len(answers) else None,
        index=index,
    )


def shared_questions(chains: Iterable[Chain], others: Iterable[Chain]) -> int:
    """Count the questions of `others`, images included, that are questions of `chains` too."""
    asked = {hash(chain.prompt) for chain in chains}
    return len({chain.prompt for chain in others if hash(chain.prompt) in asked})


def _names(sources: Sequence[Source]) -> str:
    """The sources in a message."""
    more = f" and {len(sources) - 1} more" if len(sources) > 1 else ""
    return f"{sources[0].path}{more}"
