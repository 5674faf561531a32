"""convert.py: any format to canonical rows, which read as the original does; the report; what is refused."""

import json
from pathlib import Path

import pytest
from PIL import Image

from reweighting.convert import main
from reweighting.data.chains import candidate_chains
from reweighting.data.load_answers import LoadReport, iterate_answers
from reweighting.data.load_chains import iterate_candidates, load_evaluation, load_meta, load_training
from reweighting.data.readers.base import ReadingOptions
from reweighting.data.row_files import iterate_rows
from reweighting.data.sources import Source
from reweighting.errors import UserError

FILES = Path(__file__).parent / "data" / "readers" / "files"
OPTIONS = ReadingOptions()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (4, 4), "red").save("a.png")
    for file in FILES.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def answers(path):
    found = iterate_answers(Source(str(path)), None, OPTIONS, LoadReport())
    return [(a.question, a.steps, a.labels, a.correct(), a.domain, a.images) for a in found]


@pytest.mark.parametrize("name", [file.stem for file in FILES.iterdir()])
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_what_is_written_reads_as_the_original(folder, name, ending, capsys):
    (folder / "out").mkdir()
    main([f"{name}.jsonl", "--output", f"out/rows.{ending}"])
    assert answers(f"out/rows.{ending}") == answers(f"{name}.jsonl")
    assert f"1 {name})" in capsys.readouterr().out


def test_published_rows_become_the_same_chains(demo, tmp_path, capsys):
    names = ("train", "meta", "test")
    for name in names:
        main([str(demo / f"{name}.json"), "--output", str(tmp_path / f"{name}.jsonl")])
    one, other = (
        [Source(str(base / f"{name}.{end}")) for name in names] for base, end in ((demo, "json"), (tmp_path, "jsonl"))
    )
    for sources in zip(one[:1], other[:1], strict=True):
        old, new = (load_training([source], None, OPTIONS, min_domains=2) for source in sources)
        assert old.domains == new.domains
        assert [(c.question, c.steps, c.images, c.targets, c.domain) for c in old.chains] == [
            (c.question, c.steps, c.images, c.targets, c.domain) for c in new.chains
        ]
    old, new = (load_meta([sources[1]], None, OPTIONS).chains for sources in (one, other))
    assert [(c.prompt, c.steps, c.label) for c in old] == [(c.prompt, c.steps, c.label) for c in new]
    old, new = (list(iterate_candidates([sources[2]], None, OPTIONS, LoadReport())) for sources in (one, other))
    assert [(row.input, row.image_files, row.candidates) for row in old] == [
        (row.input, row.image_files, row.candidates) for row in new
    ]
    labelled, _ = load_evaluation([other[0]], None, OPTIONS, 0.25)
    expected, _ = load_evaluation([one[0]], None, OPTIONS, 0.25)
    assert [(x.domain, x.accuracies, x.correct) for x in labelled] == [
        (x.domain, x.accuracies, x.correct) for x in expected
    ]


def test_several_images_from_each_form(tmp_path, monkeypatch):
    """Published rows with lists of images, and what convert makes of them: the same chains for each use."""
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        Image.new("RGB", (4, 4), "red").save(f"{name}.png")
    (tmp_path / "out").mkdir()
    a, b, c = (tmp_path.resolve() / f"{name}.png" for name in "abc")
    shared = [("<image>\n<image> Same?", ["a.png", "b.png"]), ("Is <image> in <image>?", ["b.png", "a.png"]),
              ("Which of three?", ["a.png", "b.png", "c.png"]), ("Which?", None), ("How many?", "c.png")]  # fmt: skip
    seen = [("Same?", (a, b)), ("Is <image> in <image>?", (b, a)), ("Which of three?", (a, b, c)), ("Which?", ()),
            ("How many?", (c,))]  # fmt: skip
    files = {
        "train": [{"input": q, "image_path": i, "add": f"Step 1: {n}", "dataset": d, "accuracy": n / 5}
                  for d in "xy" for n, (q, i) in enumerate(shared)],
        "meta": [{"input": f"{q}\nStep 1: {n}", "image_path": i, "true_false": n % 2 == 0}
                 for n, (q, i) in enumerate(shared)],
        "test": [{"id": n, "input": q, "image_path": i, "candidates": ["Step 1: a", "Step 1: b"],
                  "true_false": [True, False]} for n, (q, i) in enumerate(shared)],
    }  # fmt: skip
    for name, rows in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
        main([f"{name}.json", "--output", f"out/{name}.jsonl"])
    for folder, ending in (("", "json"), ("out/", "jsonl")):
        train, metas, test = ([Source(f"{folder}{name}.{ending}")] for name in files)
        chains = load_training(train, None, OPTIONS, min_domains=2)
        assert [chain.prompt for chain in chains.chains] == seen * 2 and chains.domains == ["x", "y"]
        assert [chain.prompt for chain in load_meta(metas, None, OPTIONS).chains] == seen
        found = list(iterate_candidates(test, None, OPTIONS, LoadReport()))
        assert [candidate_chains(row)[1].prompt for row in found] == seen
        assert len({labelled.key for labelled in load_evaluation(train, None, OPTIONS, 0.5)[0]}) == 10
    keys = [labelled.key for labelled in load_evaluation([Source("train.json")], None, OPTIONS, 0.5)[0]]
    assert keys[3:5] == ["x\nWhich?\nNone", "x\nHow many?\nc.png"] and keys[1].endswith("?\nb.png\na.png")
    without = load_training([Source("train.json")], None, ReadingOptions(ignore_images=True), min_domains=2).chains
    assert [chain.prompt for chain in without[:3]] == [("Same?", ()), ("Is  in ?", ()), ("Which of three?", ())]


def test_the_report(folder, capsys):
    (folder / "more.jsonl").write_bytes((folder / "processbench.jsonl").read_bytes())
    main(["processbench.jsonl", "more.jsonl", "prmbench.jsonl", "visualprm.jsonl", "--sample", "1"])
    out = capsys.readouterr().out
    assert "processbench.jsonl: row 0, domain processbench, correct: False" in out and " 0.00 | 3 + 4 = 8." in out
    assert "files       4 (2 processbench, 1 prmbench, 1 visualprm)" in out
    assert "answers     7 to 2 questions" not in out and "answers     7 to 3 questions" in out  # one has an image
    assert "steps       15 (8 correct, 5 incorrect, 2 unlabelled)" in out
    assert "domains     5: " in out and "images      1 found, 0 answers with a missing one" in out
    assert "3 answers repeat another one word for word" in out and "2 questions are in more than one file" in out
    assert "prmbench.jsonl: 1 answer is left out: its error_steps name a step" in out
    assert [path.name for path in folder.iterdir() if path.suffix == ".parquet"] == []


def test_missing_images_are_counted(folder, capsys):
    (folder / "a.png").unlink()
    main(["visualprm.jsonl", "--output", "rows.jsonl"])
    out = capsys.readouterr().out
    assert "images      0 found, 1 answers with a missing one, the first: visualprm.jsonl: row 0: found 'a.png'" in out
    assert next(iterate_rows(Path("rows.jsonl")))["images"] == ["a.png"]
    Image.new("RGB", (4, 4), "red").save("b.png")
    (folder / "two.json").write_text(
        '[{"question": "<image> or <image>?", "steps": ["x"], "images": ["b.png", "a.png"]}]'
    )
    main(["two.json", "--output", "rows.jsonl"])  # what is there and what is not, in order
    assert "images      1 found, 1 answers with a missing one" in capsys.readouterr().out
    (row,) = iterate_rows(Path("rows.jsonl"))
    assert (row["question"], row["images"]) == ("<image> or <image>?", ["b.png", "a.png"])
    main(["two.json", "--output", "other/rows.jsonl"])  # a folder that is made; what is there is found from it
    (row,) = iterate_rows(Path("other/rows.jsonl"))
    assert row["images"] == ["../b.png", "a.png"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["unknown.jsonl"], "unknown.jsonl: row 0 is of no known format: {'what': 1}"),
        (["canonical.jsonl", "--output", "canonical.jsonl"], "would overwrite the input"),
        (
            ["canonical.jsonl", "--output", "stepwise.jsonl", "--questions_json_file", "stepwise.jsonl"],
            "would overwrite the input",
        ),
        (["canonical.jsonl", "--output", "rows.txt"], "allowed: a name that ends in .jsonl or .parquet"),
        (["canonical.jsonl", "--sample", "-1"], "--sample: found -1"),
        (["canonical.jsonl", "--format", "nosuch"], "--format: found 'nosuch', allowed: canonical, "),
        (["none.jsonl"], "none.jsonl: no such file"),
        (["bad.jsonl"], "no answer can be used"),
    ],
)
def test_what_the_user_can_fix(folder, argv, said):
    (folder / "unknown.jsonl").write_text('{"what": 1}')
    row = {"modified_question": "q", "modified_process": ["a"], "error_steps": [2]}
    (folder / "bad.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError) as caught:
        main(argv)
    assert said in str(caught.value)
