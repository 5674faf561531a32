"""What goes wrong around the command: servers that fail, refuse or talk nonsense, and files that are inputs too."""

import asyncio
import gzip
import json
import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image

from reweighting.data.load_chains import load_training
from reweighting.data.readers.base import ReadingOptions
from reweighting.data.sources import Source
from reweighting.errors import UserError
from reweighting.label import main
from reweighting.labeling.policy import PolicyFailure
from reweighting.labeling.rollouts import all_of
from tests.labeling.policy_server import PolicyServer


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Four questions in the working folder, and no pauses between tries."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("reweighting.labeling.chat._wait", lambda state: 0.0)
    write([{"question": f"{n} + {n + 3}?", "ground_truth": 2 * n + 3, "dataset": "sums"} for n in range(10, 14)])
    return tmp_path


def write(rows: list[dict], name: str = "questions.jsonl") -> None:
    Path(name).write_text("\n".join(map(json.dumps, rows)))


def rows(name: str = "train.jsonl") -> list[dict]:
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


def label(server: PolicyServer, *more: str) -> None:
    main(["questions.jsonl", "--policy", server.url, "--policy_model", "adder", "--answers", "2", "--rollouts", "2",
          "--output_train", "train.jsonl", "--concurrency", "2", *more])  # fmt: skip


def asks(body: dict, text: str) -> bool:
    """Whether the request is about a question, and no probe."""
    return body["temperature"] > 0 and text in json.dumps(body["messages"][0])


def reply(content: object, **more: object) -> tuple[int, bytes, dict[str, str]]:
    message = {"choices": [{"message": {"content": content}, "finish_reason": "stop"}]}
    return 200, json.dumps(message | more).encode(), {}


def stored() -> list[tuple]:
    with closing(sqlite3.connect("labels.sqlite")) as file:
        return file.execute("SELECT answer, step, value FROM entries").fetchall()


def test_an_outage_ends_the_command_and_loses_no_answer(capsys):
    with PolicyServer() as server:
        calls = iter(range(10**6))
        server.hook = lambda body: (503, b"restarting", {}) if next(calls) > 12 else None
        with pytest.raises(UserError, match="the server is gone: .* 503: restarting. Look at it. What was answered is"):
            label(server)
        assert "503: restarting; trying again" in capsys.readouterr().err
        kept = stored()
        assert kept and all(json.loads(value) != [0, 0] and json.loads(value) != {"text": None} for *_, value in kept)
        server.hook = lambda body: None
        before = len(server.bodies)
        label(server)
        answers = sum(step == -1 for _, step, _ in kept)
        assert len(server.bodies) - before == 2 + (8 - answers) + 2 * (8 * 3 - (len(kept) - answers))
    assert {tuple(row["times"]) for row in rows()} == {(2, 2, 2, 1)} and len(rows()) == 8


def test_what_failed_or_is_empty_is_counted_and_asked_for_again(capsys):
    with PolicyServer() as server:

        def hook(body):
            begun = len(body["messages"]) > 1
            if asks(body, "11 + 14"):
                return 500, b"a bug", {}
            if asks(body, "12 + 15") and not begun:
                return reply("")
            if asks(body, "10 + 13") and begun and "Step 3" in body["messages"][1]["content"]:
                return reply("")
            return (500, b"a bug", {}) if asks(body, "13 + 16") and begun else None

        server.hook = hook
        label(server)
        errors = capsys.readouterr().err
        assert "warning: 2 answers and 12 continuations failed; the same command asks for them again" in errors
        assert "warning: 2 answers and 4 continuations are empty; the same command asks for them again" in errors
        assert sorted({row["question"] for row in rows()}) == ["10 + 13?", "13 + 16?"]
        server.hook = lambda body: None
        label(server)
        assert {tuple(row["times"]) for row in rows()} == {(2, 2, 2, 1)} and len(rows()) == 8
        assert "failed" not in capsys.readouterr().err.replace("failed 0", "")


def test_a_filtered_answer_is_final():
    with PolicyServer() as server:
        filtered = {"choices": [{"message": {"content": "x"}, "finish_reason": "content_filter"}]}
        server.hook = lambda body: (200, json.dumps(filtered).encode(), {}) if asks(body, "11 + 14") else None
        label(server)
        assert len(rows()) == 6
        before = len(server.bodies)
        label(server)
        assert len(server.bodies) - before == 2  # the probe


def test_a_question_that_the_server_refuses_is_left_out(capsys):
    with PolicyServer() as server:
        server.hook = lambda body: (400, b"9000 > 8192", {}) if asks(body, "12 + 15") else None
        label(server)
        assert len(rows()) == 6
        errors = capsys.readouterr().err
        assert "1 of 4 questions left out" in errors and "questions.jsonl: row 2, id 2: 400: 9000 > 8192" in errors
        server.hook = lambda body: (422, b"no", {}) if body["temperature"] else None
        with pytest.raises(UserError, match="4 of 4 questions left out"):
            label(server, "--store", "other.sqlite")
        server.hook = lambda body: (413, b"too large", {})
        with pytest.raises(UserError, match="refuses the first question, questions.jsonl: row 0 .413: too large"):
            label(server, "--store", "third.sqlite")


def test_a_server_that_loads_is_waited_for(capsys):
    with PolicyServer() as server:
        server.replies = [503, 503, 503]
        label(server)
        assert 'answers 503: {"error": {"message": "as the test wants it"}}; trying again' in capsys.readouterr().err
    assert len(rows()) == 8


@pytest.mark.parametrize(
    ("nonsense", "message"),
    [
        ((200, b"<html>", {}), "does not speak the protocol"),
        ((200, b"[" * 200_000, {}), "does not speak the protocol"),
        ((200, b"no gzip", {"Content-Encoding": "gzip"}), "does not answer .DecodingError"),
        ((301, b"", {"Location": "/x"}), "does not speak the protocol"),
    ],
)
def test_nonsense_ends_with_one_error(nonsense, message, caplog):
    with PolicyServer() as server:
        calls = iter(range(10**6))
        server.hook = lambda body: nonsense if next(calls) > 6 else None
        with pytest.raises(UserError, match=message):
            label(server)
    assert not caplog.records  # asyncio logs what nobody has looked at


def test_odd_replies_are_read():
    odd = iter([reply("Step 1: 10 \ud800\nStep 2: so it is\nFinal answer: 23", usage=[1]),
                reply("Step 1: x\nFinal answer: 23", usage={"completion_tokens": "3"})])  # fmt: skip
    with PolicyServer() as server:
        server.hook = lambda body: next(odd, None) if body["temperature"] and len(body["messages"]) == 1 else None
        label(server)
        label(server)
        packed = gzip.compress(reply("Step 1: x\nStep 2: y\nFinal answer: 3")[1])
        server.hook = lambda body: (200, packed, {"Content-Encoding": "gzip"}) if body["temperature"] else None
        label(server, "--store", "packed.sqlite", "--output_train", "packed.jsonl")
    assert any(row["steps"][0] == "Step 1: 10 ?" for row in rows())
    assert {row["steps"][0] for row in rows("packed.jsonl")} == {"Step 1: x"}


def test_the_first_error_cancels_the_other_calls():
    ended = []

    async def fails() -> None:
        raise PolicyFailure("gone")

    async def waits() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    with pytest.raises(PolicyFailure, match="gone"):
        asyncio.run(all_of([waits(), fails(), waits()]))
    assert ended == [True, True]


@pytest.mark.parametrize("key", ["sk-SECRET\nx", "sk-SÉCRET“"])
def test_a_key_that_cannot_be_one_is_not_shown(key, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with PolicyServer() as server, pytest.raises(UserError, match="OPENAI_API_KEY: holds a character") as caught:
        label(server)
    assert "CRET" not in str(caught.value)


def test_a_key_is_stripped_and_taken_out_of_what_the_server_says(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-SECRET\n")
    with PolicyServer() as server:
        label(server)
        assert server.headers["authorization"] == "Bearer sk-SECRET"
        server.hook = lambda body: (401, b"bad key sk-SECRET", {})
        with pytest.raises(UserError, match=r"bad key \*\*\*"):
            label(server)


@pytest.mark.parametrize("url", ["http://127.0.0.1:99999/v1", "http://[", "ftp://a/v1", "http://", "http://a:x/v1"])
def test_what_is_no_address_is_refused(url):
    with pytest.raises(UserError, match="--policy: found .*, allowed: an address"):
        main(["questions.jsonl", "--policy", url, "--policy_model", "adder", "--output_train", "train.jsonl"])


def test_inputs_are_never_written_over(folder):
    Path("prompt.jsonl").write_text("{question}")
    os.link("questions.jsonl", "linked.jsonl")
    os.symlink("questions.jsonl", "symlink.jsonl")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with PolicyServer() as server:
        for more in (["--output_train", "questions.jsonl"], ["--store", "questions.jsonl"],
                     ["--output_meta", "linked.jsonl"], ["--output_candidates", "symlink.jsonl"],
                     ["--prompt_file", "prompt.jsonl", "--output_meta", "prompt.jsonl"]):  # fmt: skip
            with pytest.raises(UserError, match="would overwrite the input"):
                label(server, *more)
        with pytest.raises(UserError, match="have one name"):
            label(server, "--store", "train.jsonl")
        with pytest.raises(UserError, match="x.jsonl cannot be written"):
            label(server, "--output_train", "questions.jsonl/y/x.jsonl")
        assert not server.bodies
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_what_a_question_is_used_for_depends_on_its_text_only():
    write([{"question": f"{n} + 4?", "ground_truth": truth, "dataset": f"d{domain}"}
           for n in range(6) for domain in range(3) for truth in (n + 4, 0)])  # fmt: skip
    names = ["train.jsonl", "meta.jsonl", "candidates.jsonl"]
    with PolicyServer() as server:
        label(server, "--output_meta", names[1], "--output_candidates", names[2], "--meta_share", "0.3",
              "--candidates_share", "0.4", "--rollouts", "1", "--concurrency", "8")  # fmt: skip
    asked = [{row["question"] for row in rows(name)} for name in names]
    assert sum(map(len, asked)) == len(set().union(*asked)) and sum(map(bool, asked)) > 1


def test_images_are_told_apart_by_their_content_and_stand_where_the_question_has_them(folder, capsys):
    for name, color in (("a/0.png", "red"), ("b/0.png", "blue"), ("c/0.png", "red")):
        Path(name).parent.mkdir()
        Image.new("RGB", (8, 8), color).save(name)
    text = "Compare <image> and <image>: 3 + 4?"
    write(
          [{"question": text, "ground_truth": 7, "images": [f"{one}/0.png" for one in pair]} for pair in ("ab", "ba")]
          + [{"question": "<image>\n3 + 4?", "ground_truth": 7, "images": [f"{one}/0.png"]} for one in "abc"]
    )  # fmt: skip
    with PolicyServer() as server:
        label(server)
        shapes = {tuple(part.get("text") for part in body["messages"][0]["content"]) for body in server.bodies}
    assert {(shape[0], shape[1], shape[2]) for shape in shapes if len(shape) > 2} == {("Compare ", None, " and ")}
    assert all(shape[0] is None and shape[1].startswith("3 + 4?\n") for shape in shapes if len(shape) == 2)
    assert "1 answer is left out: its question stands there before, with the same images" in capsys.readouterr().err
    read = {(row["question"], *row["images"]) for row in rows()}
    assert read == {(text, "a/0.png", "b/0.png"), (text, "b/0.png", "a/0.png"), ("3 + 4?", "a/0.png"),
                    ("3 + 4?", "b/0.png")}  # fmt: skip
    assert load_training([Source("train.jsonl")], None, ReadingOptions(), min_domains=1).chains


def test_odd_questions_name_what_is_allowed():
    write([3, {"question": "1 + 2?", "ground_truth": ["3"]}, {"question": "1 + 3?"},
           {"question": "\ud800", "answer": 1}, {"question": "1 + 4?", "answer": 5, "images": "none.png"}])  # fmt: skip
    truth = "the correct answer, as a text, a number, true or false; or null"
    with PolicyServer() as server, pytest.raises(UserError) as caught:
        label(server)
    for line in (
        "row 0: the row: found 3, allowed: an object with the fields question, ground_truth",
        f"row 1: ground_truth: found ['3'], allowed: {truth}",
        f"row 2: ground_truth: missing, allowed: {truth}",
        "row 3: question: found '\\ud800' (with half of a surrogate pair in it), allowed: text that is not blank",
        f"row 4: images: found 'none.png', which is no file in . or {Path.cwd()}, allowed: an image",
    ):
        assert line in str(caught.value)


def test_a_folder_is_named_once_where_an_image_is_missing(folder):
    write([{"question": "1 + 4?", "answer": 5, "images": "none.png"}])
    with PolicyServer() as server, pytest.raises(UserError, match=f"no file in {folder}, allowed"):
        main([str(folder / "questions.jsonl"), "--policy", server.url, "--policy_model", "adder",
              "--output_train", "train.jsonl"])  # fmt: skip


def test_a_question_with_two_correct_answers_is_told(capsys):
    asked = [("2 + 3?", 5), ("2 + 3?", "5.0"), ("2 + 3?", "five"), ("2 + 3?", 6), ("2 + 4?", 6)]
    write(
        [{"question": text, "ground_truth": truth, "dataset": str(place)} for place, (text, truth) in enumerate(asked)]
    )
    with PolicyServer() as server:
        label(server)
    told = capsys.readouterr().err
    assert "warning: questions.jsonl: 1 question stands there before with another ground_truth: both are used" in told
    assert told.count("another ground_truth") == 1 and {row["dataset"] for row in rows()} >= {"0", "1", "3", "4"}


def test_greedy_labels_are_told(capsys):
    greedy = "warning: --temperature 0: all answers to a question are the same"
    with PolicyServer() as server:
        label(server, "--temperature", "0")
        assert capsys.readouterr().err.count(greedy) == 1
        label(server, "--store", "one.sqlite")
        label(server, "--store", "two.sqlite", "--temperature", "0", "--answers", "1", "--rollouts", "1")
        assert greedy not in capsys.readouterr().err


def test_another_programs_database_is_no_store_and_stays_as_it_is(folder):
    with closing(sqlite3.connect("theirs.sqlite")) as file:
        file.execute("CREATE TABLE notes (text)")
        file.execute("INSERT INTO notes VALUES ('mine')")
        file.commit()
    (folder / "text.sqlite").write_text("notes" * 100)
    before = [(folder / name).read_bytes() for name in ("theirs.sqlite", "text.sqlite")]
    with PolicyServer() as server:
        with pytest.raises(UserError, match="theirs.sqlite: is no store of answers .it has the table 'notes'.*--store"):
            label(server, "--store", "theirs.sqlite")
        with pytest.raises(UserError, match="text.sqlite: is no store of answers .*not a database.*Move it away"):
            label(server, "--store", "text.sqlite")
        assert not server.bodies
        label(server)
        with closing(sqlite3.connect("labels.sqlite")) as file:
            file.execute("ANALYZE")  # adds a table of SQLite's own
            file.commit()
        asked = len(server.bodies)
        label(server)
        assert len(server.bodies) < asked + 4  # probes only
    assert before == [(folder / name).read_bytes() for name in ("theirs.sqlite", "text.sqlite")]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_full_disk_is_not_taken_for_a_foreign_file():
    with PolicyServer() as server, pytest.raises(UserError) as caught:
        label(server, "--store", "/dev/full")
    assert str(caught.value) == "/dev/full cannot be written: database or disk is full; free some disk space"


def test_rows_without_a_truth_or_with_too_many_placeholders_are_errors(folder):
    write([{"question": "1 + 1?", "ground_truth": " "}, {"question": "<image> 1 + 2?", "ground_truth": 3},
           {"question": "1 + 3?", "ground_truth": "$$"}])  # fmt: skip
    with PolicyServer() as server:
        with pytest.raises(UserError) as caught:
            label(server)
        write([{"question": "1 + 1?", "steps": ["2"], "ground_truth": " "}])
        with pytest.raises(UserError, match="row 0: ground_truth: found ' ', allowed: a correct answer that is not"):
            label(server)
        assert not server.bodies
    assert "row 0: ground_truth: found ' ', allowed: a correct answer that is not blank" in str(caught.value)
    assert "row 1: question: found 1 `<image>` for 0 images" in str(caught.value)


def test_a_damaged_store_is_one_error():
    with PolicyServer() as server:
        label(server)
        for value in ("[1", "5", '{"text": 3}', "null", "[" * 100_000):
            shutil.copy("labels.sqlite", "damaged.sqlite")
            with closing(sqlite3.connect("damaged.sqlite")) as file:
                file.execute("UPDATE entries SET value = ?", (value,))
                file.commit()
            with pytest.raises(UserError, match="damaged.sqlite: is damaged"):
                label(server, "--store", "damaged.sqlite")


def test_answers_that_cannot_be_judged_are_counted(capsys):
    write([{"question": f"{n} + 4?", "ground_truth": truth} for n, truth in ((1, 5), (2, "apples"))])
    with PolicyServer() as server:
        label(server)
    assert "warning: 2 of 4 answers cannot be judged\n" in capsys.readouterr().err


def test_a_server_that_does_not_sample_is_told(capsys):
    same = "all answers to {} are the same: the policy does not sample, or hardly"
    with PolicyServer() as server:
        label(server)
        assert same.format("every question") not in capsys.readouterr().err
        server.hook = lambda body: reply("Step 1: x\nFinal answer: 3") if asks(body, "+") else None
        label(server, "--store", "same.sqlite")
        assert same.format("every question") in capsys.readouterr().err
        label(server, "--dry_run")
        assert same.format("the first question") in capsys.readouterr().err
