"""Which of the answers become training rows, meta answers and candidates, and these as canonical rows.

No question is in two of the three: its text and images decide. Training rows are chosen as DreamPRM's were (arXiv
2505.20241): at most so many of a domain, those first whose labels say something, being strictly between 0 and 1
somewhere.
"""

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from reweighting.labeling.questions import Question
from reweighting.labeling.rollouts import LabelledAnswer

TRAIN, META, CANDIDATES = "train", "meta", "candidates"
Row = dict[str, Any]


def use_of(question: Question, shares: Mapping[str, float]) -> str:
    """Return what a question is used for.

    Args:
        question: the question.
        shares: of the questions for each use, of those that are wanted.
    """
    place = int(question.asked[:12], 16) / 16**12 * sum(shares.values())
    for use, share in shares.items():
        place -= share
        if place < 0:
            return use
    return list(shares)[-1]


class Selection:
    """Collects the rows of each use.

    Args:
        folders: of each use that is wanted, the folder of its file, from where image paths start.
        shares: of the questions for each of them.
        max_rows_per_domain: answers of a domain in the training rows; 0: all.
        made_by: what each row says of the policy.

    Attributes:
        answers: how many were seen.
        counts: how many of them have a shortcoming, by what it is.
    """

    def __init__(
        self,
        folders: Mapping[str, Path],
        shares: Mapping[str, float],
        max_rows_per_domain: int,
        made_by: Mapping[str, Any],
    ):
        self.folders, self.shares, self.max_rows, self.made_by = folders, shares, max_rows_per_domain, made_by
        self.answers = 0
        self.counts: Counter[str] = Counter()
        self._train: dict[str, tuple[list[Row], list[Row]]] = {}  # domain -> rows that say something, other rows
        self._rows: dict[str, list[Row]] = {use: [] for use in folders if use != TRAIN}

    def add(self, question: Question, answers: list[LabelledAnswer]) -> None:
        """Take what a question is used for from its answers."""
        use = use_of(question, self.shares)
        rows = [self._row(question, answer, self.folders[use]) for answer in answers]
        self.answers += len(rows)
        self.counts["answers cannot be judged"] += sum(row["final_answer_correct"] is None for row in rows)
        if use == TRAIN:
            self._add_training_rows(question.domain, rows)
        elif use == META:
            correct = [row for row in rows if row["final_answer_correct"] is True]
            incorrect = [row for row in rows if row["final_answer_correct"] is False]
            both = min(len(correct), len(incorrect))
            self._rows[META] += [*correct[:both], *incorrect[:both]]
        else:
            self._rows[CANDIDATES] += rows

    def _add_training_rows(self, domain: str, rows: Iterable[Row]) -> None:
        telling, others = self._train.setdefault(domain, ([], []))
        for row in rows:
            labels = [label for label in row["labels"] if label is not None]
            if not labels:
                self.counts["answers are left out of the training rows: none of their steps has a label"] += 1
                continue
            kept = telling if any(0 < label < 1 for label in labels) else others
            if not self.max_rows or len(kept) < self.max_rows:  # more of either kind than all is never needed
                kept.append(row)

    def rows(self, use: str) -> list[Row]:
        """Return the rows of a use."""
        if use != TRAIN:
            return self._rows[use]
        chosen: list[Row] = []
        for telling, others in self._train.values():
            chosen += [*telling, *others][: self.max_rows or None]
        return chosen

    def _row(self, question: Question, answer: LabelledAnswer, folder: Path) -> Row:
        """A canonical row; fields that say nothing are left out."""
        row = {
            "id": question.id,
            "question": question.text,
            "images": [os.path.relpath(image, folder.resolve()) for image in question.images] or None,
            "steps": list(answer.steps),
            "labels": answer.labels,
            "score": list(answer.score),
            "times": list(answer.times),
            "final_answer_correct": answer.correct,
            "answer": answer.stated,
            "ground_truth": question.ground_truth,
            "dataset": question.domain,
            **self.made_by,
        }
        return {name: value for name, value in row.items() if value is not None or name == "final_answer_correct"}
