"""data/rollouts: what is in it, where it comes from, and that its policy would write it again."""

import hashlib
import json
import subprocess
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from random import Random

import label_demo
import make_demo
import pytest
from demo_world.causes import BLUR, CAUSES, CLEAN, SPOIL, Cause, ask
from demo_world.pictures import KINDS
from PIL import ImageChops

from reweighting.data.answer_values import answers_match
from reweighting.data.answers import stated_answers
from reweighting.data.chains import training_chains
from reweighting.data.load_rows import load_candidate_rows, load_meta_rows, load_training_rows

DATA = Path(__file__).resolve().parent.parent / "data" / "rollouts"


def pictures(rows) -> set[str]:
    return {hashlib.sha256(file.read_bytes()).hexdigest() for row in rows for file in row.image_files}


def test_sizes_and_balance():
    train, held_out = (load_training_rows(DATA / f"{name}.json") for name in ("train", "held_out"))
    meta, test = load_meta_rows(DATA / "meta.json"), load_candidate_rows(DATA / "test.json")
    counts = Counter(row.dataset for row in train)
    assert set(counts) == set(KINDS) and max(counts.values()) <= 1000
    assert len(meta) > 300 and sum(row.true_false for row in meta) == len(meta) / 2
    assert len(test) == 500 and all(len(row.candidates) == 8 for row in test)
    right = [one for row in test for one in row.true_false]
    assert 0.4 < sum(right) / len(right) < 0.7  # the policy is right about half of the time
    for row in (*train, *held_out):
        assert row.accuracy == row.score / row.times
    sets = [pictures(rows) for rows in (train, held_out, meta, test)]
    assert len(set.union(*sets)) == sum(map(len, sets)), "a picture stands in two of the files"
    size = sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file())
    assert size < 25e6
    chains, domains = training_chains(train)
    assert domains == sorted(KINDS) and len(chains) > 800


def test_the_causes_stand_in_quality_json_beside_the_measured_worth():
    quality = json.loads((DATA / "quality.json").read_text())
    assert {name: {**asdict(cause), "worth": quality[name]["worth"]} for name, cause in CAUSES.items()} == quality
    assert all(0.3 < one["worth"] < 1 for one in quality.values())
    assert {cause.name for cause in CAUSES.values()} == set(SPOIL)


def test_what_each_cause_does():
    def asked(name: str, share: float = 1.0):
        return [ask(KINDS["dice"], Cause(name, share), Random(seed)) for seed in range(20)]

    clean = asked("none")
    assert asked("none", 0.0) == clean  # the same questions, struck or not
    for before, wrong in zip(clean, asked("wrong ground truths"), strict=True):
        assert wrong.text == before.text and wrong.picture == before.picture
    assert sum(a.ground_truth != b.ground_truth for a, b in zip(clean, asked("wrong ground truths"), strict=True)) > 15
    for before, given in zip(clean, asked("answers given away"), strict=True):
        assert given.text == f"{before.text} It is {before.ground_truth}."
    for name in ("foreign pictures", "degraded pictures"):
        for before, other in zip(clean, asked(name), strict=True):
            assert (other.text, other.ground_truth) == (before.text, before.ground_truth)
            assert ImageChops.difference(other.picture, before.picture).getbbox()
    assert all("larger" in one.text for one in asked("trivial questions"))
    assert BLUR > 5


@pytest.mark.slow
def test_the_policy_writes_the_rows_again(tmp_path):
    """Up to rounding, which may turn a token on another machine."""
    part = next(part for part in label_demo.PARTS if part.name == "geometry")
    file = label_demo.write_questions(part, 0.02, tmp_path, tmp_path / "questions.jsonl", seed=1)
    rows = label_demo.step_rows(label_demo.label(part, file, tmp_path, tmp_path))
    shipped = [row for row in json.loads((DATA / "train.json").read_text()) if row["dataset"] == part.name]
    before = {row["image_path"]: (DATA / row["image_path"]).read_bytes() for row in rows}
    assert before == {path: (tmp_path / path).read_bytes() for path in before}
    kept = {(row["image_path"], row["add"]): row["accuracy"] for row in shipped}
    again = [kept.get((row["image_path"], row["add"])) for row in rows]
    assert sum(label is not None for label in again) >= 0.75 * len(rows)
    gaps = [abs(label - row["accuracy"]) for label, row in zip(again, rows, strict=True) if label is not None]
    assert sum(gaps) / len(gaps) < 0.03


@pytest.mark.parametrize("way", ["../", "../../images/demo/", "../my_images/images/"])
def test_the_path_of_a_picture_starts_from_the_demos_folder(way):
    assert label_demo.image_of({"images": [f"{way}images/geometry/0000.png"]}) == "images/geometry/0000.png"


@pytest.mark.parametrize("make", ["label_demo", "make_demo"])
def test_a_demo_removes_its_own_pictures_only(tmp_path, monkeypatch, make):
    theirs = [
        tmp_path / "images" / name for name in ("0001.png", "geometry/holiday.png", "geometry/2024-1.png", "a.txt")
    ]
    stale = tmp_path / "images" / "geometry" / "0999.png"
    for path in (*theirs, stale):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"mine")
    if make == "make_demo":
        make_demo.make_demo(tmp_path, 1, make_demo.QUALITY, train=200, meta=4, test=2, n=2)
    else:
        monkeypatch.setattr(label_demo, "label", lambda *_: [])
        for _ in range(2):  # again in the same folder
            label_demo.label_demo(tmp_path, tmp_path / "work", seed=1, scale=0.02, parallel=1, concurrency=1)
    assert all(path.read_bytes() == b"mine" for path in theirs) and not stale.exists()
    assert (tmp_path / "images" / "geometry" / "0000.png").stat().st_size > 4


@pytest.mark.parametrize("flag", [("--scale", "nan"), ("--scale", "-1"), ("--parallel", "0"), ("--concurrency", "0")])
def test_sizes_of_the_demo_are_checked_before_anything_is_written(tmp_path, monkeypatch, capsys, flag):
    monkeypatch.setattr("sys.argv", ["label_demo.py", "--output_dir", str(tmp_path / "demo"), *flag])
    with pytest.raises(SystemExit) as caught:
        label_demo.main()
    assert caught.value.code == 2 and not (tmp_path / "demo").exists()
    assert f"{flag[0]}: found" in capsys.readouterr().err


def test_the_demo_ends_as_the_label_command_does(tmp_path, monkeypatch):
    def fails(*_):
        raise subprocess.CalledProcessError(2, "label.py")

    monkeypatch.setattr(label_demo, "label", fails)
    monkeypatch.setattr("sys.argv", ["label_demo.py", "--output_dir", str(tmp_path / "demo"), "--scale", "0.02"])
    with pytest.raises(SystemExit) as caught:
        label_demo.main()
    assert caught.value.code == 2


def test_candidates_are_judged_as_they_state():
    for row in load_candidate_rows(DATA / "test.json"):
        for answer, correct in zip(stated_answers(row), row.true_false, strict=True):
            assert correct == (answer is not None and answers_match(answer, row.ground_truth) is True)


def test_clean_parts_have_no_cause():
    assert all(part.cause == CLEAN for part in label_demo.PARTS if part.name not in KINDS)
