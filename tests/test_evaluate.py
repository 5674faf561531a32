"""evaluate.py and step_metrics.py: labels, first incorrect steps, splits, thresholds, what is written."""

import errno
import json
import math
import os
import re
from pathlib import Path
from random import Random

import pytest
from PIL import Image

from reweighting.data.chains import Chain
from reweighting.data.load_chains import LabelledChain, load_evaluation
from reweighting.data.readers.base import ReadingOptions
from reweighting.data.sources import Source
from reweighting.errors import UserError
from reweighting.evaluate import main
from reweighting.inference.step_metrics import (
    ScoredChain,
    check_labels,
    choose_thresholds,
    evaluate_domains,
    score_chains,
    split_dev,
)
from reweighting.modeling.reward_model import ProcessRewardModel
from reweighting.modeling.scoring_batches import by_length
from tests.forked import run

ROOT = Path(__file__).resolve().parent.parent


def chain(scores: list[float], correct: list[bool], domain: str = "a") -> ScoredChain:
    return ScoredChain(domain, scores, list(range(len(scores))), [float(c) for c in correct], correct)


def labelled(path: Path, threshold: float = 0.0, rows: int | None = None) -> list[LabelledChain]:
    return load_evaluation([Source(str(path), max_rows=rows)], None, ReadingOptions(), threshold)[0]


def flags(demo: Path, weights_path: Path, output: Path, *more: str) -> list[str]:
    files = ["--weights_path", str(weights_path), "--eval_json_file", str(demo / "train.json")]
    return [*files, "--output", str(output), *more]


def test_the_command_on_the_demo(demo, weights_path, tmp_path):
    done = run("evaluate.py", *flags(demo, weights_path, tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    rows = json.loads((demo / "train.json").read_text())
    assert set(content["results"]["domains"]) <= {row["dataset"] for row in rows}
    steps = [result["steps"] for result in (content["results"]["all"], *content["results"]["domains"].values())]
    dev = content["thresholds"]["chosen_on_chains"]
    assert steps[0] == sum(steps[1:]) == len(rows) - 5 * dev and dev > 0
    assert sum(b["count"] for b in content["reliability"]) == steps[0]
    overall = content["results"]["all"]
    assert 0 <= overall["calibration_error"] <= 1 and 0.2 < overall["auc"] < 0.8  # the head is not trained
    Image.open(tmp_path / "out" / "reliability.png").load()
    assert "PB F1" in done.stdout and "bar_chart" in done.stdout


def test_labels_come_from_correct_else_from_the_accuracy(demo, weights_path, tmp_path):
    rows = [row for row in json.loads((demo / "train.json").read_text())][:5]
    rows[1]["correct"], rows[2]["correct"] = True, False
    for row, accuracy in zip(rows, (0.9, 0.0, 1.0, 0.3, 0.2), strict=True):
        row["accuracy"] = accuracy
        del row["score"], row["times"]
    (demo / "labels.json").write_text(json.dumps(rows))
    model = ProcessRewardModel.from_pretrained(weights_path / "prm")
    (scored,) = score_chains(model, labelled(demo / "labels.json", 0.25), 8)
    assert scored.correct == [True, True, False, True, False] and scored.first_incorrect == 2
    assert scored.accuracies == [0.9, 0.0, 1.0, 0.3, 0.2]
    image = demo / rows[0]["image_path"]
    assert scored.scores == pytest.approx(model.score(image, rows[0]["input"], rows[-1]["add"]), abs=1e-6)
    (demo / "third.json").write_text(json.dumps(rows[2:3]))
    (only_third,) = score_chains(model, labelled(demo / "third.json", 0.25), 8)
    assert only_third.scores == pytest.approx(scored.scores[2:3], abs=1e-6)


def test_the_numbers_by_hand_per_domain():
    chains = [chain([0.9, 0.2], [True, False]), chain([0.8, 0.6], [True, True]), chain([0.7], [False], "b")]
    results = evaluate_domains(chains, {"f1": 0.65, "process_bench": 0.5})
    a, b = results["domains"].values()
    assert list(results["domains"]) == ["a", "b"]
    assert a["auc"] == 1 and a["f1"] == pytest.approx(4 / 5) and a["positive_rate"] == 0.75
    assert a["process_bench"] == {"error": 1, "correct": 1, "f1": 1}
    assert results["all"]["process_bench"] == pytest.approx({"error": 0.5, "correct": 1, "f1": 2 / 3})
    assert results["all"]["auc"] == pytest.approx(5 / 6)
    assert a["position_auc"] == pytest.approx(2.5 / 3)  # correct at places 0, 0, 1; incorrect at 1
    assert math.isnan(b["auc"]) and math.isnan(b["process_bench"]["f1"])


def test_thresholds_need_both_kinds():
    both = [chain([0.9, 0.2], [True, False]), chain([0.8, 0.6], [True, True])]
    assert choose_thresholds(both) == {"f1": 0.6, "process_bench": 0.6}

    def rows(*answers: str) -> list[LabelledChain]:
        """Answers of steps that are correct (+) or incorrect (-)."""
        chains = [Chain("q", tuple(marks)) for marks in answers]
        correct = [[mark == "+" for mark in marks] for marks in answers]
        return [
            LabelledChain(c, "d", [float(one) for one in own], own, "q") for c, own in zip(chains, correct, strict=True)
        ]

    check_labels(rows("+-", "++"), "dev.json")
    for answers in (["++"], ["-", "--"]):
        with pytest.raises(UserError, match="dev.json: all .* both kinds are needed"):
            check_labels(rows(*answers), "dev.json")
    assert "with and without an incorrect step" in check_labels(rows("+-", "-"), "dev.json")
    only = [chain([0.9, 0.2], [True, False]), chain([0.8, 0.6], [True, False])]
    thresholds = choose_thresholds(only)
    assert thresholds["f1"] == 0.8 and math.isnan(thresholds["process_bench"])
    found = evaluate_domains(only, thresholds)["all"]
    assert found["f1"] == 1 and all(math.isnan(value) for value in found["process_bench"].values())


def test_the_split_keeps_a_questions_rows_together_and_does_not_depend_on_the_order(demo):
    chains = labelled(demo / "train.json")
    dev, rest = split_dev(chains)
    keys = [{one.chain.prompt for one in part} for part in (dev, rest)]
    assert not keys[0] & keys[1] and len(dev) + len(rest) == len(chains)
    assert 0.1 < len(dev) / len(chains) < 0.6
    assert {one.chain.rows for one in split_dev(chains[::-1])[0]} == {one.chain.rows for one in dev}


def test_a_file_of_its_own_for_the_thresholds(demo, weights_path, tmp_path):
    main(flags(demo, weights_path, tmp_path, "--dev_json_file", str(demo / "train.json")))
    content = json.loads((tmp_path / "evaluation.json").read_text())
    assert content["results"]["all"]["chains"] == content["thresholds"]["chosen_on_chains"] == 40


def test_what_the_user_can_fix(demo, weights_path, tmp_path):
    rows = json.loads((demo / "train.json").read_text())
    (demo / "one.json").write_text(json.dumps(rows[:5]))
    (demo / "wrong.json").write_text(json.dumps([rows[0] | {"correct": "yes"}]))
    for more, message in (
        (("--eval_json_file", str(demo / "one.json")), "too few questions"),
        (("--eval_json_file", str(demo / "wrong.json")), "row 0: correct: found 'yes', allowed: true, false or null"),
        (("--threshold", "1"), "--threshold: found 1.0"),
        (("--weights_path", str(demo)), "holds no reward model"),
        (("--output", "/proc/nothing"), "cannot be written"),
    ):
        with pytest.raises(UserError, match=message):
            main(flags(demo, weights_path, tmp_path, *more))


def test_a_domain_may_have_any_name(demo, weights_path, tmp_path, capsys):
    """`all`, the name of the total, with markup of rich, and with what a terminal would obey."""
    rows = json.loads((demo / "train.json").read_text())
    domains = sorted({row["dataset"] for row in rows})
    names = ["all", "[red]x[/red]", "a\x1b[31m\nb"]
    new = dict(zip(domains, names, strict=False))
    (demo / "names.json").write_text(json.dumps([row | {"dataset": new.get(row["dataset"], "x")} for row in rows]))
    more = ("--eval_json_file", str(demo / "names.json"), "--dev_json_file", str(demo / "train.json"))
    main(flags(demo, weights_path, tmp_path, *more))
    results = json.loads((tmp_path / "evaluation.json").read_text())["results"]
    assert set(results["domains"]) == {*names, "x"}
    assert results["all"]["steps"] == len(rows) > results["domains"]["all"]["steps"]
    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert [lines.count(name) for name in ("all", "[red]x[/red]", r"a\x1b[31m\nb")] == [2, 1, 1]  # "all domains"


def test_answers_of_a_single_step_are_counted(demo, weights_path, tmp_path, capsys):
    rows = json.loads((demo / "train.json").read_text())
    for row in rows[:5]:  # one answer
        row["add"] = row["add"].replace("Step", "Part")
    (demo / "parts.json").write_text(json.dumps(rows))
    more = ("--eval_json_file", str(demo / "parts.json"), "--dev_json_file", str(demo / "train.json"))
    main(flags(demo, weights_path, tmp_path, *more))
    assert re.search(r"warning: .*parts.json: 5 of 44 answers are a single step", capsys.readouterr().err)


def test_no_input_is_overwritten(demo, weights_path, tmp_path):
    for name in ("evaluation.json", "reliability.png"):
        (tmp_path / name).write_bytes((demo / "train.json").read_bytes())
        for flag in ("--eval_json_file", "--dev_json_file"):
            with pytest.raises(UserError, match=f"would overwrite the input .*{name}. Name another output"):
                main(flags(demo, weights_path, tmp_path, flag, str(tmp_path / name)))
        assert (tmp_path / name).read_bytes() == (demo / "train.json").read_bytes()


def test_a_full_disk_leaves_the_earlier_files(demo, weights_path, tmp_path, monkeypatch):
    main(flags(demo, weights_path, tmp_path))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        main(flags(demo, weights_path, tmp_path, "--threshold", "0.5"))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--output", ""), ("--output", "."), ("--output", "/"), ("--weights_path", ""), ("--dev_json_file", " ")],
)
def test_empty_paths_are_refused(demo, weights_path, folder, flag, value):
    found = f"'{value}', allowed: a path" if value.strip() else "an empty value"
    with pytest.raises(UserError, match=f"{flag}: found {found}"):
        main(flags(demo, weights_path, Path("x"), flag, value))
    assert not list(folder.iterdir())


def test_process_bench_is_the_authors_measure_however_the_steps_are_given(weights_path, tmp_path):
    """By its definition, on the same predictions: an answer's prediction is the first step whose score is below the
    threshold, -1 if there is none; exact matches among the answers with a wrong step and among those without, and the
    harmonic mean of the two."""
    rng, rows = Random(5), []
    for number in range(40):
        steps = [f"Step {place + 1}: {' '.join(rng.choices(['2', 'red', 'adds', 'so'], k=4))}" for place in range(4)]
        rows.append({"id": f"x-{number}", "problem": f"Question {number}?", "steps": steps,
                     "final_answer_correct": False, "label": rng.choice([-1, 0, 1, 2, 3])})  # fmt: skip
    texts = [{"question": row["problem"], "steps": row["steps"], "labels": [
                 None if row["label"] not in (-1, place) and place > row["label"] else place != row["label"]
                 for place in range(4)]} for row in rows]  # fmt: skip
    signs = [{"input": row["problem"] + " " + "".join(f"{step} ки\n" for step in row["steps"]),
              "label": [label is not False and "+" or "-" for label in text["labels"]]}
             for row, text in zip(rows, texts, strict=True)]  # fmt: skip
    found = []
    for name, form, more in (("bench", rows, ()), ("bench", rows, ("--after_first_error", "incorrect")),
                             ("steps", texts, ()), ("signs", signs, ())):  # fmt: skip
        (tmp_path / f"{name}.json").write_text(json.dumps(form, ensure_ascii=False))
        file = str(tmp_path / f"{name}.json")
        main(["--weights_path", str(weights_path), "--eval_json_file", file, "--dev_json_file", file,
              "--output", str(tmp_path / "out"), *more])  # fmt: skip
        content = json.loads((tmp_path / "out" / "evaluation.json").read_text())
        found.append(content["results"]["all"]["process_bench"])
        threshold = content["thresholds"]["process_bench"]
        model = ProcessRewardModel.from_pretrained(weights_path / "prm")
        matches: dict[bool, list[bool]] = {True: [], False: []}  # has a wrong step -> is it found
        for row in rows:
            below = [place for place, score in enumerate(model.score(None, row["problem"], row["steps"]))
                     if score < threshold - 1e-7]  # fmt: skip
            matches[row["label"] >= 0].append((below[0] if below else -1) == row["label"])
        error, correct = (sum(matches[kind]) / len(matches[kind]) for kind in (True, False))
        expected = {"error": error, "correct": correct, "f1": 2 * error * correct / (error + correct)}
        assert found[-1] == pytest.approx(expected) and error > 0
    assert found[0] == found[1] == found[2] == found[3]


def test_answers_that_are_too_long_are_an_error_or_left_out(weights_path, tmp_path, capsys):
    rows = [{"question": f"Q{n}", "steps": ["two", "red"], "labels": [1, n % 2]} for n in range(8)]
    rows.append({"question": "Q", "steps": ["red " * 9000], "labels": [1]})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    file = str(tmp_path / "rows.json")
    command = ["--weights_path", str(weights_path), "--eval_json_file", file, "--dev_json_file", file,
               "--output", str(tmp_path / "out")]  # fmt: skip
    with pytest.raises(UserError, match="(?s)1 of 9 chains cannot be used.*row 8: .*To evaluate .*--drop_too_long"):
        main(command)
    main([*command, "--drop_too_long"])
    assert "--drop_too_long: 1 of 9 answers are left out" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["results"]["all"]["chains"] == 8


def test_chains_are_scored_by_length_and_given_back_in_their_order(weights_path):
    images = (Path("a.png"),), (Path("b.png"),)
    chains = [Chain("Q", ("x" * length,), of) for length, of in ((9, ()), (3, images[0]), (1, ()), (5, images[1]),
                                                                 (20, images[0]), (5, ()))]  # fmt: skip
    assert by_length(chains) == [3, 2, 5, 0, 1, 4]
    rows = [LabelledChain(Chain(f"Q {n}", ("two " * (7 * n % 5 + 1),), targets=(1.0,)), "d", [1.0], [True], "k")
            for n in range(7)]  # fmt: skip
    model = ProcessRewardModel.from_pretrained(weights_path / "prm")
    alone = [score_chains(model, [row], 1)[0].scores for row in rows]
    assert [one.scores for one in score_chains(model, rows, 2)] == [pytest.approx(own, abs=1e-6) for own in alone]
