"""The readers: a small file of each format, in the form that its authors document, written for this test."""

import json
from pathlib import Path

import pytest
from PIL import Image

from reweighting.data.load_answers import CANONICAL, FORMATS, PUBLISHED, Answer, LoadReport, format_of, iterate_answers
from reweighting.data.readers import READERS
from reweighting.data.readers.base import ReadingOptions
from reweighting.data.sources import Source
from reweighting.errors import UserError

FILES = Path(__file__).parent / "files"
NAMES = (CANONICAL, *READERS)
Q = "Tom has 3 apples and buys 4. How many has he?"
STEPS = ("Step 1: He has 3.", "Step 2: 3 + 4 = 8.")
BARE = ("He has 3.", "3 + 4 = 8.", "So 8.")

# format -> for each answer: question, steps, labels, whether it is correct, domain, images
EXPECTED = {
    "processbench": [
        (Q, BARE, (1, 0, None), False, "processbench", 0),
        ("1 + 1?", ("It is 2.",), (1,), True, "processbench", 0),
    ],
    "bigbench-mistake": [
        (Q, BARE, (1, 0, None), False, "bigbench-mistake", 0),
        ("1 + 1?", ("It is 2.",), (1,), True, "bigbench-mistake", 0),
        ("1 + 2?", ("It is 3.",), (1,), None, "bigbench-mistake", 0),
    ],
    "prmbench": [
        (Q, (*BARE, "Done."), (1, 0, 0, 1), None, "circular", 0),
        ("1 + 1?", ("It is 2.",), (1,), None, "multi_solutions", 0),
    ],
    "mr-ben": [
        (f"{Q}\nA: 7\nB: 8", (f"{STEPS[0]}\n- that is sure", f"{STEPS[1]}\nSolution: Choice_B"), (1, 0), False,
         "college_math", 0),
        ("1 + 1?", ("Step 1: It is 2.",), (1,), True, "college_math", 0),
    ],
    "stepwise": [(Q, STEPS, (1, 0), None, "stepwise", 0), (Q, STEPS, (1, None), None, "stepwise", 0)],
    "prm800k": [
        (Q, ("He has 3.", "3 + 4.", "It is 7.", "So 8."), (1, None, None, 0), None, "prm800k", 0),
        (Q, ("He has 4.",), (0,), None, "prm800k", 0),
        (Q, ("He has 3.", "3 + 5."), (None, 0), None, "prm800k", 0),
        (Q, ("He has 3.", "3 + 4.", "It is 7.", "So 9."), (None, None, None, 0), None, "prm800k", 0),
    ],
    "math-shepherd": [(Q, STEPS, (1, 0), None, "GSM8K", 0)],
    "openrlhf": [(Q, STEPS, (1, 0), None, "openrlhf", 0), (Q, BARE[:2], (0.75, 0.25), None, "openrlhf", 0)],
    "rlhflow": [(Q, STEPS, (1, 0), None, "rlhflow", 0), (Q, STEPS[:1], (1,), None, "rlhflow", 0)],
    "rlhflow-test": [
        (Q, ("Step 1: It is 7.",), (None,), True, "rlhflow-test", 0),
        (Q, ("Step 1: It is 3.", "Step 2: No, 8."), (None, None), False, "rlhflow-test", 0),
    ],
    "visualprm": [(Q, STEPS, (1, 0), None, "visualprm", 1)],
    "visualprm-raw": [(Q, STEPS, (0.5, 0.25), None, "visualprm-raw", 1)],
    "visualprocessbench": [(Q, (*STEPS, "Hm."), (1, 0, None), None, "MMMU", 1)],
    "dreamprm-1.5-meta": [(Q, STEPS, (None, None), False, "dreamprm-1.5-meta", 1)],
    "dreamprm-1.5-test": [
        (Q, ("Step 1: It is 7.", "Step 2: Yes."), (None, None), True, "dreamprm-1.5-test", 1),
        (Q, ("8",), (None,), False, "dreamprm-1.5-test", 1),
    ],
    "mm-prm": [(Q, STEPS, (0.9, 0.2), None, "mm-prm", 1)],
    "gsm8k": [(Q, ("3 + 4 = <<3+4=7>>7", "So he has 7.", "#### 7"), (None,) * 3, True, "gsm8k", 0)],
    "gsm8k-solutions": [
        (Q, ("3 + 4 = 8", "A: 8"), (None, None), False, "gsm8k-solutions", 0),
        (Q, ("3 + 4 = 7", "A: 7"), (None, None), True, "gsm8k-solutions", 0),
    ],
    "llava": [
        (Q, STEPS, (None, None), None, "llava", 1),
        (f"User: Hi\nAssistant: Hello\nUser: {Q}", ("7",), (None,), True, "llava", 0),
    ],
    "responses": [(f"{Q}\n(A) seven\n(B) eight", ("It is 8.\n\nSo (B).",), (None,), False, "counting", 1)],
    "canonical": [
        (Q, STEPS, (1, 0.25), False, "3", 1),
        (Q, ("He has 3.", "So 7."), (1, 1), None, "canonical", 1),
        (Q, STEPS, (0.75, None), True, "canonical", 0),
    ],
}  # fmt: skip
LEFT_OUT = {
    "prmbench": "its error_steps name a step that it does not have",
    "mr-ben": "its first wrong step is none of its numbered steps",
    "math-shepherd": "its label is not its input with labels in it",
    "openrlhf": "it has not one label for each step",
    "visualprm-raw": "it has no step",
    "responses": "it has no question: name the file of the questions with --questions_json_file",
    "canonical": "a step that is labelled incorrect is blank",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The files, and the image that they name."""
    monkeypatch.chdir(tmp_path)
    for file in FILES.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    Image.new("RGB", (4, 4), "red").save("a.png")
    return tmp_path


def read(name: str, report: LoadReport | None = None, **options) -> list[Answer]:
    path = name if "." in name and not name.startswith("dreamprm") else f"{name}.jsonl"
    return list(iterate_answers(Source(path), None, ReadingOptions(**options), report or LoadReport()))


def seen(answers: list[Answer]) -> list[tuple]:
    return [(a.question, a.steps, a.labels, a.correct(), a.domain, len(a.images)) for a in answers]


@pytest.mark.parametrize("name", NAMES)
def test_each_format(folder, name):
    report = LoadReport()
    assert format_of(Source(f"{name}.jsonl")) == name
    assert seen(read(name, report)) == EXPECTED[name]
    rows = (FILES / f"{name}.jsonl").read_text().count("\n")
    assert report.rows == rows and report.answers == len(EXPECTED[name])
    reason = LEFT_OUT.get(name)
    assert report.left_out == ({(f"{name}.jsonl", reason): 1} if reason else {})


@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_of_one_format_only(folder, name):
    for line in (FILES / f"{name}.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert [reader.name for reader in READERS.values() if reader.matches(row)] == (
            [] if name == CANONICAL else [name]
        )
        if isinstance(row, dict):
            assert not any(required <= set(row) for required in PUBLISHED.values())


def test_every_format_has_a_file():
    assert sorted(file.stem for file in FILES.iterdir()) == sorted(NAMES) and set(NAMES) < set(FORMATS)


def test_options(folder):
    labels = {neutral: read("visualprocessbench", neutral=neutral)[0].labels[2] for neutral in ("correct", "incorrect")}
    assert labels == {"correct": 1, "incorrect": 0}
    assert read("prm800k", neutral="incorrect")[0].labels == (1, None, 0, 0)
    assert read("processbench", after_first_error="incorrect")[0].labels == (1, 0, 0)
    assert read("responses", step_separator="\n\n")[0].steps == ("It is 8.", "So (B).")
    assert {answer.domain for answer in read("processbench", domain_field="generator")} == {"m"}
    assert read("prm800k", domain_field="question.ground_truth_answer")[0].domain == "7"
    assert read("visualprm", ignore_images=True)[0].images == ()
    row = {"question": "Is <image> in <image>?", "steps": ["a"], "images": ["a.png", "none.png"]}
    (folder / "rows.json").write_text(json.dumps([row]))
    (answer,) = read("rows.json", ignore_images=True)
    assert (answer.question, answer.images) == ("Is  in ?", ())
    (answer,) = iterate_answers(Source("mm-prm.jsonl", domain="mine"), None, ReadingOptions(), LoadReport())
    assert answer.domain == "mine"


def test_rows_without_the_field_of_their_domain_are_counted(folder):
    report = LoadReport()
    assert {answer.domain for answer in read("processbench", report, domain_field="nosuch")} == {"processbench"}
    assert report.notes() == ["processbench.jsonl: 2 rows lack the field that --domain_field names: their domain is "
                              "what the format has, or the file's name"]  # fmt: skip


def test_questions_of_one_id_are_one_question(folder):
    (folder / "q.jsonl").write_text('{"id": 4, "question": "a"}\n{"id": "4", "question": "b"}')
    with pytest.raises(UserError, match="q.jsonl: two different questions have the id '4'"):
        read("responses", questions_json_file="q.jsonl")


def test_rows_with_questions_of_their_own_are_read_beside_a_questions_file(folder):
    (folder / "q.jsonl").write_text('{"id": "gsm8k-0", "question": "Another one?"}')
    assert read("processbench", questions_json_file="q.jsonl") == read("processbench")


def test_questions_from_another_file(folder):
    (folder / "questions").mkdir()
    Image.new("RGB", (5, 4), "red").save("questions/b.png")
    questions = [
        {"id": 5, "question": Q, "image": "b.png", "answer": 7, "subject": "sums"},
        {"id": "4", "question": "no"},
    ]
    (folder / "questions" / "q.jsonl").write_text("\n".join(map(json.dumps, questions)))
    joined, other = read("responses", questions_json_file="questions/q.jsonl")[::-1]
    assert (joined.question, joined.domain, joined.ground_truth, joined.id) == (Q, "sums", 7, "5")
    assert joined.images == ((folder / "questions" / "b.png").resolve(),) and other.question.startswith(Q)
    (folder / "questions" / "q.jsonl").write_text(json.dumps(questions[1]))
    report = LoadReport()
    assert len(read("responses", report, questions_json_file="questions/q.jsonl")) == 1
    assert report.notes() == ["responses.jsonl: 1 answer is left out: its id is in no row of the questions' file"]


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("processbench", {"label": "1"}, "label: found '1', allowed: the index of the first wrong step from 0, or -1"),
        ("processbench", {"label": 3}, "first_error: found 3, allowed: a step's index from 0 to 2, or -1 or null"),
        ("processbench", {"problem": " "}, "problem: found ' ', allowed: text that is not blank"),
        ("processbench", {"steps": []}, "steps: found [], allowed: a list of texts, at least one"),
        ("processbench", {"steps": ["a", 3]}, "steps[1]: found 3, allowed: a list of texts, at least one"),
        ("stepwise", {"labels": [True]}, "labels: found 1 of them, allowed: one per step, that is 2"),
        ("stepwise", {"labels": [True, 7]}, "labels[1]: found 7, allowed: a number from 0 to 1, true or false, + or -"),
        ("visualprocessbench", {"response": {"steps": ["a"], "process_correctness": [5]}},
         "response.process_correctness[0]: found 5, allowed: -1, 0 or 1, or null"),
        ("prm800k", {"label": {"steps": [{"completions": [{"text": 1}]}]}},
         "label.steps[0].completions[0].text: found 1"),
        ("visualprm", {"image": "none.png"}, "images: found 'none.png', which is no file in"),
        ("visualprm", {"image": "https://x.org/a.png"}, "allowed: a file ('https' images are not fetched: download"),
        ("canonical", {"steps": ["", " "], "labels": None}, "steps: found 2 blank steps, allowed: at least one"),
        ("canonical", {"first_error": 1}, "first_error: found beside labels, allowed: one of the two"),
        ("canonical", {"image_path": "a.png"}, "image_path: found beside images, allowed: one of the two"),
        ("canonical", {"score": [1, 1], "times": [4, 4]}, "times: found 4 beside a score of 1 and a label of 1.0"),
        ("canonical", {"labels": None, "score": [1, 1]}, "times: score and times label the steps together"),
        ("canonical", {"labels": None, "times": [4, 4]}, "times: score and times label the steps together"),
        ("canonical", {"Labels": [1]}, "Labels: unknown field, did you mean labels?"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_row_and_field(folder, name, change, said):
    rows = [json.loads(line) for line in (FILES / f"{name}.jsonl").read_text().splitlines()]
    rows[0] |= change
    if "Labels" in change:
        del rows[0]["labels"]
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError) as caught:
        read(name)
    assert str(caught.value).startswith(f"{name}.jsonl: 1 problem in {len(rows)} row") and "row 0: " in str(
        caught.value
    )
    assert said in str(caught.value)


def test_several_images_in_order(folder):
    """In a field or as parts of a message, at their placeholders; a count that does not fit names its row."""
    for name in "bc":
        Image.new("RGB", (4, 4), "blue").save(f"{name}.png")
    images = ["c.png", "a.png", "b.png"]
    asked = "First <image>\nthen <image>\nand <image>"
    parts = [{"type": "text", "text": "First"}, {"type": "image"}, {"type": "text", "text": "then"}]
    for name, row in {
        "canonical": {"question": asked, "steps": ["a"], "images": images},
        "visualprocessbench": {"question": asked, "image": images, "response": {"steps": ["a"],
                                                                                "process_correctness": [1]}},
        "llava": {"conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": "a"}],
                  "images": images},
        "stepwise": {"prompt": asked, "completions": ["a"], "labels": [True], "images": images},
        "dreamprm-1.5-test": {"question": asked, "candidate": ["a"], "true_false": [True], "image_path": images},
    }.items():  # fmt: skip
        (folder / "rows.json").write_text(json.dumps([row]))
        assert format_of(Source("rows.json")) == name
        (answer,) = read("rows.json")
        assert (answer.question, answer.steps) == (asked, ("a",)), name
        assert [image.name for image in answer.images] == images == list(answer.image_names)
        (folder / "rows.json").write_text(json.dumps([row | {key: images[:2] for key in row if row[key] == images}]))
        with pytest.raises(UserError, match="rows.json: row 0: question: found 3 `<image>` for 2 images, allowed: one"):
            read("rows.json")
    row = {"prompt": [{"role": "user", "content": parts}], "completions": ["a"], "labels": [1], "image": "b.png"}
    (folder / "rows.json").write_text(json.dumps([row]))
    assert read("rows.json")[0].question == "First\n<image>\nthen"


def test_a_format_that_nobody_knows(folder):
    (folder / "x.jsonl").write_text('{"what": 1}')
    assert format_of(Source("x.jsonl")) is None
    with pytest.raises(UserError, match="--format 'nosuch': allowed: canonical, candidates, training"):
        format_of(Source("x.jsonl", format="nosuch"))
    assert format_of(Source("x.jsonl", format="llava")) == "llava"


def test_the_same_answers_from_each_form_of_one_set(folder):
    """Numbered text, a list of steps, a conversation: the same question, steps and labels."""
    said = ["Step 1: He has 3.", "Step 2: He buys 4.", "Step 3: So 7."]
    labels = [True, False, True]
    signs = ["+" if label else "-" for label in labels]
    turns = [turn for step, sign in zip([f"{Q} {said[0]}", *said[1:]], signs, strict=True)
             for turn in ({"role": "user", "content": step}, {"role": "assistant", "content": sign})]  # fmt: skip
    panel = [{"from": "human", "value": f"### Question:\n{Q}\n\n### Solution Process:\n{said[0]}"}]
    for step, sign in zip([*said[1:], None], signs, strict=True):
        panel += [{"from": "gpt", "value": sign}] + ([{"from": "human", "value": step}] if step else [])
    forms = {
        "canonical": {"question": Q, "steps": said, "labels": labels},
        "stepwise": {"prompt": Q, "completions": said, "labels": labels},
        "openrlhf": {"input": f"{Q} " + "\n".join(f"{step} ки" for step in said), "label": signs},
        "math-shepherd": {
            "input": f"{Q} " + "\n".join(f"{step} ки" for step in said),
            "label": f"{Q} " + "\n".join(f"{step} {sign}" for step, sign in zip(said, signs, strict=True)),
        },
        "mm-prm": {"conversations": [
            {"from": "human", "value": f"Question: {Q}\nProcess: " + "\n\n".join(f"{step}<prm>" for step in said)},
            {"from": "gpt", "value": [float(label) for label in labels]}]},
        "rlhflow": {"conversations": turns},
        "visualprm": {"conversations": panel},
        "visualprocessbench": {"question": Q, "image": [], "response": {
            "steps": said, "process_correctness": [1 if label else -1 for label in labels]}},
        "prmbench": {"modified_question": Q, "modified_process": said, "error_steps": [2]},
        "prm800k": {"question": {"problem": Q}, "label": {"steps": [
            {"completions": [{"text": step, "rating": 1 if label else -1}], "chosen_completion": 0}
            for step, label in zip(said, labels, strict=True)]}},
    }  # fmt: skip
    expected = (Q, tuple(said), (1.0, 0.0, 1.0))
    for name, row in forms.items():
        (folder / "rows.json").write_text(json.dumps([row], ensure_ascii=False))
        assert format_of(Source("rows.json")) == name
        (answer,) = read("rows.json")
        assert (answer.question, answer.steps, answer.labels) == expected, name
    numbered = "\n".join(said)
    for name, row in {
        "dreamprm-1.5-test": {"question": Q, "candidate": [numbered], "true_false": [True]},
        "rlhflow-test": {"prompt": Q, "answers": [numbered], "labels": [1]},
        "responses": {"id": 0, "question": Q, "response": numbered},
        "llava": {"conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": numbered}]},
    }.items():
        (folder / "rows.json").write_text(json.dumps([row]))
        (answer,) = read("rows.json")
        assert (answer.question, answer.steps) == expected[:2], name
