"""The demo data as shipped: reproducible to the byte, balanced, disjoint, small; qualities as stated."""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from demo_world.defects import DEFECTS, strength
from demo_world.pictures import KINDS
from demo_world.solutions import OPERATIONS, Policy, random_kind, random_question, result
from make_demo import DEFECT, QUALITY, make_demo, parse_quality

from reweighting.data.chains import training_chains
from reweighting.data.load_rows import load_candidate_rows, load_meta_rows, load_training_rows

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data"


def digest(folder: Path) -> dict[str, str]:
    files = [folder / f"{name}.json" for name in ("train", "meta", "test", "quality")]
    files += sorted((folder / "images").rglob("*.png"))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_script_reproduces_every_byte(tmp_path):
    make_demo(tmp_path, seed=1, quality=QUALITY, train=10_000, meta=500, test=500, n=8)
    assert digest(tmp_path) == digest(DATA)


def test_sizes_and_balance():
    train, meta = load_training_rows(DATA / "train.json"), load_meta_rows(DATA / "meta.json")
    test = load_candidate_rows(DATA / "test.json")
    assert Counter(row.dataset for row in train) == {name: 1000 for name in KINDS}
    assert len(meta) == 500 and sum(row.true_false for row in meta) == 250
    assert len(test) == 500 and all(len(row.candidates) == 8 for row in test)
    for row in test:
        answers = [re.search(r"Final answer: (\d+)", text).group(1) for text in row.candidates]
        assert answers == row.answers
        assert [answer == row.ground_truth for answer in answers] == row.true_false
    for row in train:
        assert row.accuracy == row.score / row.times
    used = [
        {hashlib.sha256(file.read_bytes()).hexdigest() for row in rows for file in row.image_files}
        for rows in (meta, test)
    ]
    assert not used[0] & used[1], "a meta picture stands in the test set"
    size = sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file() and path.suffix in (".png", ".json"))
    assert size < 25e6
    chains, domains = training_chains(train)
    assert domains == sorted(KINDS) and len(chains) == 2000  # each response is one chain of five steps


def test_qualities():
    quality = json.loads((DATA / "quality.json").read_text())
    assert quality == QUALITY and set(DEFECT) == set(quality) == set(KINDS)
    assert set(DEFECT.values()) == set(DEFECTS)
    for defect in DEFECTS:
        shares = [strength(defect, q / 20) for q in range(21)]
        assert shares[20] == 0 and shares == sorted(shares, reverse=True) and 0 < shares[0] <= 1
    assert parse_quality(["dice=0.25"]) == QUALITY | {"dice": 0.25}
    for word in ("dice=2", "dice", "nothing=0.5", "dice=x"):
        with pytest.raises(SystemExit, match="2"):
            parse_quality([word])


def test_one_quality_changes_one_domain_only(tmp_path):
    sizes = {"train": 500, "meta": 10, "test": 2, "n": 2}
    make_demo(tmp_path / "a", 3, QUALITY, **sizes)
    make_demo(tmp_path / "b", 3, QUALITY | {"clocks": 1.0}, **sizes)
    rows = [json.loads((tmp_path / name / "train.json").read_text()) for name in "ab"]
    changed = {a["dataset"] for a, b in zip(*rows, strict=True) if a != b}
    assert changed == {"clocks"}


def test_the_policys_answers_are_what_they_claim():
    rng, policy = Random(0), Policy()
    for _ in range(300):
        question = random_question(random_kind(rng), rng)
        response = policy.respond(question, rng)
        assert len(response.steps) == 5
        assert (response.final_answer == question.answer) == (response.first_slip is None)
        assert question.answer == result(question.operation, *(question.entries[key] for key in question.keys))
        chances = [policy.chance(question, response, step) for step in range(5)]
        assert all(0 <= chance <= 1 for chance in chances)
        if response.first_slip is None:
            assert chances == sorted(chances) and chances[-1] == 1
        else:
            assert max(chances[response.first_slip :]) < 0.1
    assert {random_question(random_kind(rng), rng).operation for _ in range(50)} == set(OPERATIONS)


def test_simulated_rollouts_follow_the_chance():
    """Finishing the answer again and again from the same right prefix ends right as often as `chance` says."""
    rng, policy = Random(1), Policy()
    question = random_question(KINDS["dice"], rng)
    slips = policy.slip_probabilities(question)
    right = policy.respond(question, rng, right=True)
    for step in range(4):
        rollouts = [all(rng.random() >= slip for slip in slips[step + 1 :]) for _ in range(4000)]
        assert sum(rollouts) / len(rollouts) == pytest.approx(policy.chance(question, right, step), abs=0.03)
