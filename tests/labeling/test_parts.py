"""The questions shared out over several jobs: together, their rows are those of one job."""

import json
from pathlib import Path
from random import Random

import pytest

from reweighting.data.load_chains import load_training
from reweighting.data.readers.base import ReadingOptions
from reweighting.data.sources import expand
from reweighting.errors import UserError
from reweighting.label import main
from reweighting.labeling.parts import Part

OUTPUTS = ("train", "meta", "candidates")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """40 questions of two domains in the working folder."""
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"{n} + {7 - n}?", "ground_truth": 7, "dataset": "ab"[n % 2], "id": n} for n in range(40)]
    write(rows)
    return rows


def write(rows: list[dict]) -> None:
    Path("questions.jsonl").write_text("\n".join(map(json.dumps, rows)))


def label(model: Path, *more: str) -> None:
    outputs = [word for use in OUTPUTS for word in (f"--output_{use}", f"{use}.jsonl")]
    main(["questions.jsonl", "--policy", str(model), "--answers", "2", "--rollouts", "2", "--device", "cpu",
          "--max_tokens", "8", *outputs, *more])  # fmt: skip


def rows(pattern: str) -> list[str]:
    """The lines of some files, in no order that counts."""
    return sorted(line for file in Path().glob(pattern) for line in file.read_text().splitlines())


def test_parts_together_give_the_rows_of_one_job(folder, coin):
    label(coin, "--max_rows_per_domain", "0")
    for number in (1, 2, 3):
        if number == 3:  # where a question stands does not decide
            write(Random(0).sample(folder, len(folder)))
        label(coin, "--max_rows_per_domain", "0", "--part", f"{number}/3")
    for use in OUTPUTS:
        assert rows(f"{use}.jsonl") and rows(f"{use}.part-*-of-3.jsonl") == rows(f"{use}.jsonl")
    asked = [{json.loads(line)["question"] for line in rows(f"*.part-{number}-of-3.jsonl")} for number in (1, 2, 3)]
    assert all(asked) and sum(map(len, asked)) == len(set.union(*asked))
    assert len(list(Path().glob("labels.part-*-of-3.sqlite"))) == 3
    chains = load_training(expand(["train.part-*.jsonl"]), None, ReadingOptions(), min_domains=2).chains
    assert len(chains) == len(rows("train.jsonl"))


def test_parts_share_the_limit_of_rows(folder, coin):
    for number in (1, 2):
        label(coin, "--max_rows_per_domain", "9", "--part", f"{number}/2")
    found = [json.loads(line)["dataset"] for line in rows("train.part-*.jsonl")]
    assert found.count("a") == found.count("b") == 9
    with pytest.raises(UserError, match="--max_rows_per_domain: found 9, allowed with 10 parts, which share it: 0, or"):
        label(coin, "--max_rows_per_domain", "9", "--part", "1/10")


@pytest.mark.parametrize("text", ["0/4", "5/4", "x", "1", "1/0", "1/-2", "1/2/3", "¹/2", "1.0/2", " 1/2"])
def test_a_part_that_does_not_exist_is_an_error(folder, text):
    with pytest.raises(UserError, match="--part: found .*, allowed: a part and how many there are, as 2/8"):
        label(Path("nowhere"), "--part", text)


def test_a_part_without_questions_is_an_error(folder, coin):
    write(folder[:1])
    with pytest.raises(UserError, match="there is no question with a ground_truth in part ./2; use fewer parts"):
        for number in (1, 2):
            label(coin, "--part", f"{number}/2")


def test_shares_add_up():
    for total in (0, 1, 7, 1000):
        assert sum(Part(number, 7).share_of(total) for number in range(1, 8)) == total
    assert Part(1, 1).share_of(5) == 5 and Part(1, 1).named(Path("a/b.jsonl")) == Path("a/b.jsonl")
    assert Part(2, 8).named(Path("a/b.jsonl")) == Path("a/b.part-2-of-8.jsonl")
