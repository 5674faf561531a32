"""A judge model on loopback that knows the names of numbers, where comparing texts with numbers decides nothing."""

import json
import re
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

from reweighting.errors import UserError
from reweighting.label import main
from reweighting.labeling.judge import read_verdict
from tests.labeling.policy_server import PolicyServer

NAMES = {23: "twenty-three", 25: "twenty-five", 27: "twenty-seven", 29: "twenty-nine"}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Four questions in the working folder whose answers are the names of numbers, and no pauses between tries."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("reweighting.labeling.chat._wait", lambda state: 0.0)
    write(NAMES)
    return tmp_path


def write(truths: dict[int, object]) -> None:
    rows = [{"question": f"{(n - 3) // 2} + {(n + 3) // 2}?", "ground_truth": truth} for n, truth in truths.items()]
    Path("questions.jsonl").write_text("\n".join(map(json.dumps, rows)))


def rows(name: str = "train.jsonl") -> list[dict]:
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


def label(server: PolicyServer, *more: str, judge: str = "judge") -> None:
    main(["questions.jsonl", "--policy", server.url, "--policy_model", "adder", "--answers", "4", "--rollouts", "4",
          "--output_train", "train.jsonl", "--judge", server.url, "--judge_model", judge, *more])  # fmt: skip


class JudgedServer(PolicyServer):
    """Serves both models.

    Attributes:
        compared: how often the judge was asked about a pair of answers.
        replies_of_judge: what it says for yes, no, and where the given answer is no number.
    """

    def __init__(self, yes: str = "Yes.", no: str = "no", unknown: str = "unknown"):
        super().__init__()
        self.compared: Counter[tuple[str, str]] = Counter()
        self.replies_of_judge = yes, no, unknown
        self.hook = self.judge
        self.keys: dict[str, str | None] = {}

    def judge(self, body: dict) -> tuple[int, bytes, dict[str, str]] | None:
        self.keys[body["model"]] = self.headers.get("authorization")
        if body["model"] != "judge":
            return None
        assert body["temperature"] == 0 and len(body["messages"]) == 1
        text = body["messages"][0]["content"]
        correct, given = re.search(r"^Correct answer:\n(.*)\n\nGiven answer:\n(.*)\n\nDoes", text, re.M | re.S).groups()
        self.compared[correct, given] += 1
        yes, no, unknown = self.replies_of_judge
        if not given.isdecimal() and given != correct:
            reply = unknown
        else:
            reply = yes if given == correct or NAMES.get(int(given)) == correct else no
        message = {"choices": [{"message": {"content": reply}}], "usage": {"completion_tokens": 1}}
        return 200, json.dumps(message).encode(), {}


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [("yes", True), ("Yes.", True), (" NO\n", False), ("<think>no, or yes?</think>\n\nyes", True), ("unknown", None),
     ("", None), ("yes and no", None), ("yes, it is correct", None), ("The answer is correct.", None), ("true", None),
     ("**yes**", None), ("<think>yes", None)],
)  # fmt: skip
def test_only_a_plain_reply_is_a_verdict(reply, verdict):
    assert read_verdict(reply) is verdict


def test_the_judge_decides_where_comparing_does_not(capsys):
    with JudgedServer() as server:
        label(server)
        probes = {(NAMES[23], NAMES[23]), (NAMES[23], "I do not know.")}
        assert probes < set(server.compared) and set(server.compared.values()) == {1}
        asked = len(server.compared)
        label(server)  # the probes again, and nothing else
        assert {pair for pair, times in server.compared.items() if times > 1} == probes and len(
            server.compared
        ) == asked
    assert "cannot be judged" not in capsys.readouterr().err
    found = rows()
    assert len(found) == 16 and {row["final_answer_correct"] for row in found} == {True, False}
    for row in found:
        total = sum(map(int, row["question"].rstrip("?").split(" + ")))
        assert row["ground_truth"] == NAMES[total] and row["times"] == [4, 4, 4, 1]
        assert row["final_answer_correct"] == (row["answer"] == str(total)) == bool(row["labels"][-1])
        assert row["labels"][2] == row["labels"][3]  # behind step 3 the end is sure


def test_the_judge_is_not_asked_where_comparing_decides():
    write({n: n for n in NAMES})
    with JudgedServer() as server:
        server.hook = lambda body: server.judge(body)
        label(server)
        assert set(server.compared) == {("23", "23"), ("23", "I do not know.")}


def test_what_the_judge_does_not_decide_counts_as_neither(capsys):
    with JudgedServer(no="perhaps") as server:
        label(server)
    errors = capsys.readouterr().err
    undecided = sum(row["final_answer_correct"] is None for row in rows())
    assert undecided and f"{undecided} of 16 answers cannot be judged" in errors
    for row in rows():
        assert row["score"][:3] == row["times"][:3] and row["final_answer_correct"] in (True, None)


@pytest.mark.parametrize(
    ("replies", "message"),
    [(("no", "no", "no"), "replies 'no' when it compares the correct answer 'twenty-three' with 'twenty-three'"),
     (("yes", "yes", "yes"), "replies 'yes' when .* with 'I do not know.'. Name a stronger model, or leave --judge"),
     (("It is correct!", "no", "no"), "replies 'It is correct!' when")],
)  # fmt: skip
def test_a_judge_that_cannot_be_relied_on_is_refused(replies, message):
    with JudgedServer(*replies) as server, pytest.raises(UserError, match=f"--judge .*{message}"):
        label(server)


def test_verdicts_that_fail_are_counted_and_asked_for_again(capsys):
    with JudgedServer() as server:

        def fails(body: dict) -> tuple[int, bytes, dict[str, str]] | None:
            about = body["model"] == "judge" and NAMES[25] in body["messages"][0]["content"]
            return (500, b"a bug", {}) if about else server.judge(body)

        server.hook = fails
        label(server)
        assert re.search(r"warning: \d+ verdicts of the judge failed; the same command asks", capsys.readouterr().err)
        unjudged = [row for row in rows() if row["ground_truth"] == NAMES[25]]
        assert not unjudged or {row["final_answer_correct"] for row in unjudged} == {None}
        server.hook = server.judge
        label(server)
        assert "failed;" not in capsys.readouterr().err
        assert len(rows()) == 16 and {tuple(row["times"]) for row in rows()} == {(4, 4, 4, 1)}


def test_a_judge_that_is_gone_ends_the_command():
    with JudgedServer() as server:
        calls = iter(range(10**6))

        def gone(body: dict) -> tuple[int, bytes, dict[str, str]] | None:
            return (401, b"no", {}) if body["model"] == "judge" and next(calls) >= 4 else server.judge(body)

        server.hook = gone
        with pytest.raises(UserError, match="--judge: the server refuses the key: .* What was answered is kept"):
            label(server)
        server.hook = lambda body: (404, b"no", {}) if body["model"] == "judge" else None
        with pytest.raises(UserError, match="--judge http.*: the server knows no such address or model"):
            label(server)


def test_another_judge_does_not_continue_a_store():
    with JudgedServer() as server:
        label(server)
        server.hook = lambda body: server.judge(
            body | {"model": "judge" if body["model"] == "other" else body["model"]}
        )
        with pytest.raises(UserError, match='made with other settings .judge_model: "judge", now "other"'):
            label(server, judge="other")


def test_a_damaged_verdict_is_one_error():
    with JudgedServer() as server:
        label(server)
        with closing(sqlite3.connect("labels.sqlite")) as file:
            file.execute("UPDATE verdicts SET verdict = 'maybe'")
            file.commit()
        with pytest.raises(UserError, match="labels.sqlite: is damaged .unexpected 'maybe'"):
            label(server)


def test_a_dry_run_counts_the_calls_of_the_judge(folder, capsys):
    with JudgedServer() as server:
        label(server, "--dry_run")
        found = capsys.readouterr().out
        calls = 4 * 4 * (1 + 3 * 4)
        assert "judge judges where comparing does not decide\n" in found
        assert f"4 questions: at most {calls} calls, at most {calls} of the judge, about " in found
        write({n: n for n in NAMES})
        label(server, "--dry_run")
        assert f"at most {calls} calls, at most 0 of the judge, about " in capsys.readouterr().out
    assert [file.name for file in folder.iterdir()] == ["questions.jsonl"]


def test_the_judge_may_have_a_key_of_its_own(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-policy")
    with JudgedServer() as server:
        label(server, "--dry_run")
        assert server.keys == {"adder": "Bearer sk-policy", "judge": "Bearer sk-policy"}
        monkeypatch.setenv("JUDGE_API_KEY", "sk-judge")
        label(server, "--dry_run")
        assert server.keys == {"adder": "Bearer sk-policy", "judge": "Bearer sk-judge"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--judge", "http://a/v1"], "--judge and --judge_model go together"),
     (["--judge_model", "judge"], "--judge and --judge_model go together"),
     (["--judge", "some/model", "--judge_model", "judge"], "--judge: found 'some/model', allowed: an address")],
)  # fmt: skip
def test_a_judge_is_an_address_and_a_model(flags, message):
    with pytest.raises(UserError, match=message):
        main(["questions.jsonl", "--policy", "http://a/v1", "--policy_model", "adder", "--output_train", "train.jsonl",
              *flags])  # fmt: skip
