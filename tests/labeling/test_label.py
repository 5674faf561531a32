"""The command against a real server on loopback whose policy's true chances are known."""

import json
import signal
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image

from reweighting.data.load_chains import load_meta, load_training
from reweighting.data.readers.base import ReadingOptions
from reweighting.data.sources import Source
from reweighting.errors import UserError
from reweighting.label import main
from tests.forked import interrupt, run
from tests.labeling.policy_server import CHANCE, PolicyServer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Questions in the working folder, one of them with a picture."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (4, 4), "red").save("a.png")
    rows = [
        {"question": f"{n} + {n + 3}?", "ground_truth": 2 * n + 3, "dataset": "even" if n % 2 == 0 else "odd", "id": n}
        for n in range(10, 22)
    ]
    rows[0]["image_path"] = "a.png"
    Path("questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def flags(server: PolicyServer, *more: str) -> list[str]:
    return ["questions.jsonl", "--policy", server.url, "--policy_model", "adder", "--answers", "4", "--rollouts", "8",
            *more]  # fmt: skip


def few(server: PolicyServer, *more: str) -> list[str]:
    return [*flags(server, *more), "--answers", "2", "--rollouts", "4"]


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


@pytest.mark.parametrize("way", ["continue_final_message", "trailing", "repeating"])
def test_from_questions_to_rows_of_all_three_kinds(folder, way, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a secret")
    with PolicyServer(way) as server:
        main(flags(server, "--output_train", "train.jsonl", "--output_meta", "meta.jsonl",
                   "--output_candidates", "candidates.jsonl", "--meta_share", "0.4",
                   "--candidates_share", "0.3"))  # fmt: skip
        assert server.headers["authorization"] == "Bearer a secret"
        with_image = [body for body in server.bodies if isinstance(body["messages"][0]["content"], list)]
        assert with_image[0]["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    train, meta, candidates = rows("train.jsonl"), rows("meta.jsonl"), rows("candidates.jsonl")
    asked = [{row["question"] for row in part} for part in (train, meta, candidates)]
    assert len(asked[0] | asked[2]) == len(asked[0]) + len(asked[2]) and not asked[1] & (asked[0] | asked[2])
    assert all(asked) and len(train) == 4 * len(asked[0]) and len(candidates) == 4 * len(asked[2])
    for row in train:
        a, b = map(int, row["question"].rstrip("?").split(" + "))
        assert row["ground_truth"] == str(a + b) and len(row["steps"]) == 4
        assert row["times"] == [8, 8, 8, 1] and row["labels"] == [
            s / t for s, t in zip(row["score"], row["times"], strict=True)
        ]
        misread = f"The numbers are {a} and {b}." not in row["steps"][1]
        assert (row["labels"][1] == 0) is misread or row["labels"][1] > 0
        assert row["labels"][3] == float(row["final_answer_correct"]) == float(f"= {a + b}." in row["steps"][2])
        assert (row["policy"], row["temperature"]) == ("adder", 1.0)
    for question in asked[1]:
        kinds = [row["final_answer_correct"] for row in meta if row["question"] == question]
        assert kinds.count(True) == kinds.count(False) > 0
    everything = "".join(file.read_bytes().decode("latin-1") for file in folder.iterdir())
    assert "a secret" not in everything + "".join(capsys.readouterr())
    options = ReadingOptions()
    assert len(load_training([Source("train.jsonl")], None, options, min_domains=2).chains) == len(train)
    assert len(load_meta([Source("meta.jsonl")], None, options).chains) == len(meta)


def test_labels_scatter_about_the_true_chance(folder):
    """Labels from 8 continuations each, against the policy's chances. One call at a time: the same on every run."""
    with PolicyServer(seed=3) as server:
        main([*flags(server, "--output_train", "train.jsonl"), "--answers", "5", "--concurrency", "1"])
    by_step: dict[int, list[float]] = {1: [], 2: [], 3: []}
    for row in rows("train.jsonl"):
        a, b = map(int, row["question"].rstrip("?").split(" + "))
        correct = [True, f"are {a} and {b}." in row["steps"][1], f"= {a + b}." in row["steps"][2]]
        for step in (1, 2, 3):
            if all(correct[:step]):
                by_step[step].append(row["labels"][step - 1])
    for step, labels in by_step.items():
        chance, count = CHANCE[step], len(labels)
        deviation = (chance * (1 - chance) / 8 / count) ** 0.5
        assert abs(sum(labels) / count - chance) <= 3 * deviation, step
        variance = sum((label - chance) ** 2 for label in labels) / count
        assert variance == pytest.approx(chance * (1 - chance) / 8, rel=0.3, abs=1e-9), step


def test_a_server_that_begins_anew_is_refused(folder):
    with PolicyServer("never") as server, pytest.raises(UserError, match="begins a new answer instead of continuing"):
        main(flags(server, "--output_train", "train.jsonl"))


def test_what_passes_is_tried_again_and_what_does_not_ends_with_the_remedy(folder, monkeypatch):
    monkeypatch.setattr("reweighting.labeling.chat._wait", lambda state: 0.0)
    with PolicyServer() as server:
        server.replies = [0, 0, 0, 503, 429, 500]
        main(few(server, "--output_train", "train.jsonl"))
        assert {tuple(row["times"]) for row in rows("train.jsonl")} == {(4, 4, 4, 1)}
        for status, message in ((401, "set the variable OPENAI_API_KEY"), (404, "no such address or model")):
            server.replies = [status]
            with pytest.raises(UserError, match=message):
                main(flags(server, "--output_train", "other.jsonl", "--store", "other.sqlite"))
        with pytest.raises(UserError, match="no such address or model"):
            main([*flags(server, "--output_train", "x.jsonl", "--store", "x.sqlite"), "--policy_model", "nobody"])
    with pytest.raises(UserError, match="does not answer"):
        main(flags(server, "--output_train", "y.jsonl", "--store", "y.sqlite"))


def test_other_settings_are_refused_and_the_same_ask_for_nothing(folder):
    with PolicyServer() as server:
        main(few(server, "--output_train", "train.jsonl"))
        before, calls = Path("train.jsonl").read_bytes(), len(server.bodies)
        main(few(server, "--output_train", "train.jsonl"))
        assert Path("train.jsonl").read_bytes() == before
        assert len(server.bodies) - calls == 2  # the probe
        with pytest.raises(UserError, match="made with other settings .temperature: 1.0, now 0.5"):
            main([*few(server, "--output_train", "train.jsonl"), "--temperature", "0.5"])


def test_other_outputs_ask_for_no_answer_again(folder):
    """First meta answers alone, then training rows of the same answers, then meta answers again."""
    with PolicyServer() as server:
        main(few(server, "--output_meta", "meta.jsonl"))
        answers = 12 * 2
        assert len(server.bodies) == answers + 2  # the probe's calls
        main(few(server, "--output_train", "train.jsonl"))
        assert {tuple(row["times"]) for row in rows("train.jsonl")} == {(4, 4, 4, 1)}
        assert len(server.bodies) == answers + answers * 3 * 4 + 2 * 2
        before = [row["steps"] for row in rows("meta.jsonl")]
        main(few(server, "--output_meta", "meta.jsonl"))
        assert [row["steps"] for row in rows("meta.jsonl")] == before
        assert len(server.bodies) == answers + answers * 3 * 4 + 3 * 2


def test_further_answers_join_those_of_a_store(folder):
    with PolicyServer() as server:
        main(few(server, "--output_meta", "meta.jsonl"))
        calls = len(server.bodies)
        with closing(sqlite3.connect("labels.sqlite", isolation_level=None)) as store:
            store.execute("INSERT INTO settings VALUES ('answers', '2')")  # as in stores of earlier versions
        main([*few(server, "--output_candidates", "more.jsonl"), "--answers", "5"])
        assert len(server.bodies) - calls == 12 * 3 + 2  # the probe's calls
        assert len(rows("more.jsonl")) == 12 * 5
        main([*few(server, "--output_candidates", "fewer.jsonl"), "--answers", "2"])
        assert len(rows("fewer.jsonl")) == 12 * 2


def test_killed_at_any_moment_nothing_is_asked_twice(folder):
    """Of each beginning exactly 4 continuations were stored, and at most the calls in flight were lost."""
    with PolicyServer() as server:
        command = ["label.py", *few(server, "--output_train", "train.jsonl"), "--concurrency", "2"]
        for number in (signal.SIGINT, signal.SIGKILL):
            before = len(server.bodies)
            code, errors = interrupt(number, lambda before=before: len(server.bodies) >= before + 60, *command)
            if number == signal.SIGINT:
                assert code == 130 and "interrupted; the same command resumes there" in errors
                assert "Traceback" not in errors and "closed" not in errors
        done = run(*command)
        assert done.returncode == 0, done.stderr
        needed = len(rows("train.jsonl")) * (1 + 3 * 4)
        # Lost by a kill: the continuations of the beginnings that two questions at a time were busy with.
        assert needed <= len(server.bodies) - 3 * 2 <= needed + 2 * 2 * 2 * 3 * 4
    assert {tuple(row["times"]) for row in rows("train.jsonl")} == {(4, 4, 4, 1)}


def test_the_first_error_by_halving_takes_fewer_calls(folder):
    with PolicyServer(seed=1) as server:
        main(
            [
                *flags(server, "--output_train", "train.jsonl", "--search", "binary"),
                "--answers",
                "2",
                "--concurrency",
                "1",
            ]
        )
        assert len(server.bodies) < 12 * 2 * (1 + 3 * 8) / 2
    for row in rows("train.jsonl"):
        a, b = map(int, row["question"].rstrip("?").split(" + "))
        if not row["final_answer_correct"]:
            first = 1 if f"are {a} and {b}." not in row["steps"][1] else 2
            zero = next(step for step, label in enumerate(row["labels"]) if label == 0)
            assert zero == first


def test_a_dry_run_says_what_it_takes(folder, capsys):
    with PolicyServer() as server:
        main(flags(server, "--output_train", "train.jsonl", "--dry_run"))
    found = capsys.readouterr().out
    assert f"12 questions: at most {12 * 4 * (1 + 3 * 8)} calls" in found
    assert not Path("labels.sqlite").exists() and not Path("train.jsonl").exists()


def test_rows_that_cannot_be_questions_are_named(folder):
    Path("questions.jsonl").write_text('{"question": " ", "ground_truth": 1}\n{"question": "1 + 1?"}')
    with PolicyServer() as server, pytest.raises(UserError) as caught:
        main(flags(server, "--output_train", "train.jsonl"))
    assert "row 0: question: found ' ', allowed: text that is not blank" in str(caught.value)
    assert "row 1: " in str(caught.value)
    with pytest.raises(UserError, match="nothing would be written"):
        main(flags(server))
