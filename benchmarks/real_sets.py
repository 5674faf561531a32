"""The parts of a published set for `real_data.py`: training, meta and test answers, no question in two of them."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from pathlib import Path

from chain_selection import Row, by_domain

from reweighting.data.load_answers import LoadReport, iterate_answers
from reweighting.data.readers.base import ReadingOptions
from reweighting.data.sources import Source

SHARES = {"train": 0.5, "meta": 0.2, "test": 0.3}  # of the questions
SIZES = {"train": 400, "meta": 120, "test": 150}  # answers
ORIGINALS = {"train": 0, "meta": 60, "test": 50}  # of them, PRMBench's correct answers
SEED = 2026


def digest(*words: object) -> str:
    """A name that depends on nothing but these words."""
    return hashlib.sha256("/".join(map(str, words)).encode()).hexdigest()[:16]


def read_rows(path: Path) -> list[Row]:
    """The rows of a `.jsonl` file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def write_rows(path: Path, rows: Iterable[Row]) -> Path:
    """Write a `.jsonl` file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def all_rows(name: str, data: Path) -> list[Row]:
    """All answers of a set as canonical rows; those to one question have one `id`."""
    rows = []
    for path in sorted((data / name).glob("*.json*")):
        if "multi_solutions" in path.name:
            continue
        raws = read_rows(path) if name == "prmbench" else []
        for answer in iterate_answers(Source(str(path)), None, ReadingOptions(), LoadReport()):
            row = {
                "question": answer.question,
                "steps": answer.steps,
                "labels": answer.labels,
                "dataset": answer.domain,
            }
            if not raws:
                rows.append(row | {"final_answer_correct": answer.final_answer_correct, "id": digest(answer.question)})
                continue
            raw = raws[answer.index]
            name_of_question = {"id": digest(raw["original_question"])}
            steps = [step for step in raw["original_process"] if step.strip()]
            original = {"question": raw["original_question"], "steps": steps, "labels": [1] * len(steps)}
            rows.append(row | {"final_answer_correct": False} | name_of_question)
            rows.append(original | {"dataset": "original", "final_answer_correct": True} | name_of_question)
    return rows


def part_of(row: Row) -> str:
    """The part that a row's question is in."""
    place = int(digest(SEED, row["id"]), 16) / 16**16  # in [0, 1)
    ends = accumulate(SHARES.values())
    return next((part for part, end in zip(SHARES, ends, strict=True) if place < end), "test")


def balanced(rows: Iterable[Row], count: int) -> list[Row]:
    """`count` rows, the domains in turns, a question's rows of one domain one after another."""
    ordered = by_domain(sorted(rows, key=lambda row: digest(SEED, row["id"], row["dataset"])))
    rounds = max(map(len, ordered.values()))
    return [own[turn] for turn in range(rounds) for own in ordered.values() if turn < len(own)][:count]


def split(rows: Iterable[Row], fits: Callable[[str, Sequence[str]], bool]) -> dict[str, list[Row]]:
    """{part: its rows}, of those whose question and steps fit and of which a step is labelled."""
    kept = defaultdict(list)
    for row in rows:
        if any(label is not None for label in row["labels"]) and fits(row["question"], row["steps"]):
            kept[part_of(row)].append(row)
    parts = {}
    for part, size in SIZES.items():
        originals = {row["id"]: row for row in kept[part] if row["dataset"] == "original"}
        number = min(ORIGINALS[part], len(originals))
        chosen = balanced((row for row in kept[part] if row["dataset"] != "original"), size - number)
        first = dict.fromkeys(row["id"] for row in chosen)  # the questions of which there is a changed answer
        parts[part] = chosen + [originals[one] for one in first if one in originals][:number]
    return parts
