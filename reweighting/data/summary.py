"""What is in a collection of answers: counts, labels, domains, longest texts, duplicates."""

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field

from reweighting.data.load_answers import Answer, LoadReport

SHOWN_DOMAINS = 30


@dataclass
class Summary:
    """Counts over answers, in memory that grows by a few bytes for each question and answer.

    Attributes:
        answers, steps, single_steps: how many answers and steps, and how many answers of one step.
        labels: of the steps, by kind: correct (1), incorrect (0), between, unlabelled.
        whole: of the answers: correct, incorrect, unknown.
        domains: answers in each.
        images: images that were found.
        longest: the longest question and answer in characters, and the most steps.
    """

    answers: int = 0
    steps: int = 0
    single_steps: int = 0
    images: int = 0
    labels: Counter[str] = field(default_factory=Counter)
    whole: Counter[str] = field(default_factory=Counter)
    domains: Counter[str] = field(default_factory=Counter)
    longest: dict[str, int] = field(default_factory=lambda: {"question": 0, "answer": 0, "steps": 0})
    _sources_of: dict[Hashable, str] = field(default_factory=dict)  # question -> the first file that has it
    _shared: set[Hashable] = field(default_factory=set)  # questions in several files
    _seen: Counter[int] = field(default_factory=Counter)  # answers

    def add(self, answer: Answer) -> None:
        """Count an answer."""
        self.answers += 1
        self.steps += len(answer.steps)
        self.single_steps += len(answer.steps) == 1
        self.images += len(answer.images)
        self.labels.update(map(_kind, answer.labels))
        self.whole[{True: "correct", False: "incorrect", None: "unknown"}[answer.correct()]] += 1
        self.domains[answer.domain] += 1
        for name, size in (
            ("question", len(answer.question)),
            ("answer", sum(map(len, answer.steps))),
            ("steps", len(answer.steps)),
        ):
            self.longest[name] = max(self.longest[name], size)
        question = hash((answer.question, answer.images))
        if self._sources_of.setdefault(question, answer.source) != answer.source:
            self._shared.add(question)
        self._seen[hash((question, answer.steps))] += 1

    def lines(self, report: LoadReport) -> list[str]:
        """Describe the answers, a line for each kind of count.

        Args:
            report: of the reading.
        """
        formats = Counter(report.formats.values())
        domains = [f"{name} {count}" for name, count in self.domains.most_common(SHOWN_DOMAINS)]
        more = [f"and {len(self.domains) - SHOWN_DOMAINS} more"] if len(self.domains) > SHOWN_DOMAINS else []
        repeated = sum(count - 1 for count in self._seen.values())
        return [
            f"files       {sum(formats.values())} ({', '.join(f'{count} {name}' for name, count in formats.items())})",
            f"rows        {report.rows}",
            f"answers     {self.answers} to {len(self._sources_of)} questions ({_counts(self.whole)})",
            f"steps       {self.steps} ({_counts(self.labels)})",
            f"domains     {len(self.domains)}: {', '.join([*domains, *more])}",
            f"longest     question {self.longest['question']} characters, answer {self.longest['answer']} characters, "
            f"{self.longest['steps']} steps",
            f"images      {self.images} found, {report.missing_images} answers with a missing one"
            + (f", the first: {report.first_missing}" if report.first_missing else ""),
        ] + [
            line
            for count, line in (
                (self.single_steps, f"{self.single_steps} answers are a single step: name with --step_separator what "
                 "stands between steps that have no `Step N`"),
                (repeated, f"{repeated} answers repeat another one word for word"),
                (len(self._shared), f"{len(self._shared)} questions are in more than one file: do not train on one and "
                 "measure on another"),
            )
            if count
        ]  # fmt: skip


def _kind(label: float | None) -> str:
    if label is None:
        return "unlabelled"
    return {1: "correct", 0: "incorrect"}.get(label, "between")


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "none"
