"""best_of_n.py: the real command, its output, resuming, streaming and refusals."""

import json
import math
import os
import shutil
import tracemalloc
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from reweighting.best_of_n import main
from reweighting.config.training import EMBEDDED_BACKBONE
from reweighting.data.load_rows import iterate_candidate_rows, load_candidate_rows
from reweighting.data.schema import CandidateRow
from reweighting.errors import UserError
from reweighting.inference.best_of_n_metrics import candidate_counts, logits_of, measure, warnings
from reweighting.inference.candidates import score_candidates
from reweighting.inference.selections_file import Selections
from reweighting.modeling.reward_model import ProcessRewardModel
from tests.forked import PIPE, Command, run

ROOT = Path(__file__).resolve().parent.parent


def flags(demo: Path, weights_path: Path, output: Path, *more: str) -> list[str]:
    files = ["--weights_path", str(weights_path), "--candidates_json_file", str(demo / "test.json")]
    return [*files, "--output", str(output), "--batch_size", "1", *more]


@pytest.fixture(scope="module")
def finished(demo, weights_path, tmp_path_factory):
    """What the real command wrote and printed."""
    output = tmp_path_factory.mktemp("selections") / "selections.json"
    done = run("best_of_n.py", *flags(demo, weights_path, output))
    assert done.returncode == 0, done.stderr
    return output, done.stdout


def test_what_the_command_writes(finished, demo, weights_path):
    output, stdout = finished
    rows, selections = load_candidate_rows(demo / "test.json"), json.loads(output.read_text())
    model = ProcessRewardModel.from_pretrained(weights_path / "prm")
    for row, choice in zip(rows, selections, strict=True):
        assert list(choice) == ["id", "chosen", "aggregates", "scores"] and choice["id"] == row.id
        for response, aggregate, scores in zip(row.candidates, choice["aggregates"], choice["scores"], strict=True):
            assert scores == pytest.approx(model.score(row.image_files, row.input, response), abs=1e-5)
            assert aggregate == pytest.approx(sum(math.log(s / (1 - s)) for s in scores) / len(scores), abs=1e-4)
        assert choice["chosen"] == choice["aggregates"].index(max(choice["aggregates"]))
    content = json.loads(output.with_name("selections.json.metrics").read_text())
    metrics = content["best_of"]
    assert content["questions"] == len(rows) and content["answers"] == 4 * len(rows)
    assert list(metrics) == ["1", "2", "4"] and metrics["4"]["questions"] == len(rows)
    chosen = [row.true_false[choice["chosen"]] for row, choice in zip(rows, selections, strict=True)]
    assert metrics["4"]["ways"]["best of N, mean_logit"]["mean"] == pytest.approx(sum(chosen) / len(chosen))
    best = metrics["4"]["ways"]["pass@N"]
    assert best["mean"] == sum(any(row.true_false) for row in rows) / len(rows)
    assert 0 <= best["low"] <= best["mean"] <= best["high"] <= 1
    assert "best of N, product" in stdout and "N = 4" in stdout


def test_logits_are_read_off_the_scores_again(finished, demo, weights_path):
    rows, selections = load_candidate_rows(demo / "test.json"), json.loads(finished[0].read_text())
    model = ProcessRewardModel.from_pretrained(weights_path / "prm")
    for (z, mask), choice in zip(score_candidates(model, rows), selections, strict=True):
        read, read_mask = logits_of(choice["scores"])
        assert (read_mask == mask).all() and (read - z)[mask].abs().max() < 1e-5


@pytest.mark.parametrize("name", ["cut.json", "cut.jsonl"])
def test_a_cut_off_file_is_continued_and_nothing_is_scored_twice(demo, weights_path, tmp_path, monkeypatch, name):
    whole, cut = tmp_path / f"whole{Path(name).suffix}", tmp_path / name
    main(flags(demo, weights_path, whole, "--aggregation_function", "min"))
    scored = []
    chain_logits = ProcessRewardModel.chain_logits

    def counted(self, chains, *more):
        scored.extend(chain.rows[0] for chain in chains)
        return chain_logits(self, chains, *more)

    monkeypatch.setattr(ProcessRewardModel, "chain_logits", counted)
    append, blocks = Selections.append, []

    def killed(self, rows):
        append(self, rows)
        blocks.append(self.done)
        if len(blocks) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Selections, "append", killed)
    with pytest.raises(KeyboardInterrupt):
        main(flags(demo, weights_path, cut, "--aggregation_function", "min"))
    assert 0 < blocks[-1] < 6
    cut.write_bytes(cut.read_bytes() + b'{"id": 4, "chosen": 1, "aggre')  # the row that a kill cut off
    scored.clear()
    monkeypatch.setattr(Selections, "append", append)
    main(flags(demo, weights_path, cut, "--aggregation_function", "min"))
    assert set(scored) == set(range(blocks[-1], 6))
    assert cut.read_bytes() == whole.read_bytes()
    scored.clear()
    main(flags(demo, weights_path, cut, "--aggregation_function", "min"))
    assert not scored and cut.read_bytes() == whole.read_bytes()


def test_another_runs_file_is_refused_and_left_alone(demo, weights_path, finished, tmp_path):
    output, before = finished[0], finished[0].read_bytes()
    with pytest.raises(UserError, match="its aggregation_function differs.*--output"):
        main(flags(demo, weights_path, output, "--aggregation_function", "last"))
    rows = json.loads((demo / "test.json").read_text())
    (demo / "fewer.json").write_text(json.dumps(rows[:-1]))
    with pytest.raises(UserError, match="its input differs"):
        main(flags(demo, weights_path, output, "--candidates_json_file", str(demo / "fewer.json")))
    assert output.read_bytes() == before
    (tmp_path / "mine.json").write_text("[1]")
    with pytest.raises(UserError, match="not known to be a run's"):
        main(flags(demo, weights_path, tmp_path / "mine.json"))
    assert (tmp_path / "mine.json").read_text() == "[1]"


def test_one_command_writes_an_output_at_a_time(demo, weights_path, tmp_path):
    first = Selections(tmp_path / "out.json", {})
    with pytest.raises(UserError, match="another command writes there"):
        main(flags(demo, weights_path, tmp_path / "out.json"))
    del first


def test_an_output_that_was_changed_is_refused(demo, weights_path, tmp_path):
    output = tmp_path / "out.json"
    main(flags(demo, weights_path, output))
    output.write_text(json.dumps(json.loads(output.read_text())[:-1]))
    with pytest.raises(UserError, match="was changed after it was written"):
        main(flags(demo, weights_path, output))
    unfinished = tmp_path / "other.json"
    unfinished.write_text("my notes")
    note = json.loads((tmp_path / "out.json.run").read_text()) | {"finished": False}
    (tmp_path / "other.json.run").write_text(json.dumps(note))
    with pytest.raises(UserError, match="does not begin as a list of choices"):
        main(flags(demo, weights_path, unfinished))
    assert unfinished.read_text() == "my notes"


def test_a_candidate_that_is_too_long_is_found_before_the_first_is_scored(demo, weights_path, tmp_path):
    rows = json.loads((demo / "test.json").read_text())
    rows[-1]["candidates"][0] = "Step 1: " + "so " * 5000
    (demo / "long.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match="1 of 24 chains cannot be used\n.*long.json: row 5: .* tokens"):
        main(flags(demo, weights_path, tmp_path / "out.json", "--candidates_json_file", str(demo / "long.json")))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--batch_size", "0"), "--batch_size: found 0"),
        (("--weights_path", "nowhere"), "nowhere"),
        (("--candidates_json_file", "none.json"), "none.json: no such file"),
        (("--output", "/proc/nothing/x.json"), "cannot be written"),
    ],
)
def test_what_the_user_can_fix(demo, weights_path, tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        main(flags(demo, weights_path, tmp_path / "out.json", *more))


def test_a_wrong_row_ends_the_command_with_2_before_anything_is_written(demo, weights_path, tmp_path):
    rows = json.loads((demo / "test.json").read_text())
    rows[3]["candidates"] = []
    (demo / "wrong.json").write_text(json.dumps(rows))
    arguments = flags(demo, weights_path, tmp_path / "out.json", "--candidates_json_file", str(demo / "wrong.json"))
    done = run("best_of_n.py", *arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "row 3: candidates: found []" in done.stderr and not (tmp_path / "out.json").exists()


def test_without_known_answers_there_are_choices_and_no_metrics(demo, weights_path, tmp_path, capsys):
    rows = json.loads((demo / "test.json").read_text())[:2]
    for row in rows:
        del row["true_false"], row["ground_truth"]
    (demo / "unknown.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = flags(demo, weights_path, tmp_path / "o.jsonl", "--candidates_json_file", str(demo / "unknown.jsonl"))
    main(arguments)
    assert "no accuracy: it is not known" in capsys.readouterr().out
    assert len((tmp_path / "o.jsonl").read_text().splitlines()) == 2
    assert not (tmp_path / "o.jsonl.metrics").exists()


@pytest.mark.slow
def test_reading_and_measuring_take_no_more_memory_for_more_questions(tmp_path):
    """All but the scoring itself, whose blocks have a fixed size."""

    def peak(count: int) -> int:
        row = {"id": 1, "input": "Q" * 500, "image_path": None, "candidates": ["Step 1: a\nFinal answer: 4"] * 4}
        with open(tmp_path / "rows.jsonl", "w") as file:
            file.writelines(json.dumps(row | {"ground_truth": "4"}) + "\n" for _ in range(count))
        choice = {"scores": [[0.5]] * 4}
        tracemalloc.start()
        rows = iterate_candidate_rows(tmp_path / "rows.jsonl")
        assert measure(((row, choice) for row in rows), "mean", 4).questions == count
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    assert peak(1200) < 1.1 * peak(600)


def question(correct: list[bool] | None, *answers: str, count: int = 0, **fields) -> CandidateRow:
    """A row of candidates that state these answers; `correct`: `true_false`."""
    candidates = [f"Step 1: x\nFinal answer: {answer}" for answer in answers]
    candidates += [f"c{i}" for i in range(len(candidates), len(correct or ()) or count)]
    return CandidateRow(id=1, input="Q", image_path=None, candidates=candidates, true_false=correct, **fields)


def test_every_column_covers_the_same_questions_and_the_largest_n_is_one():
    choices = [{"scores": [[0.5]]}, {"scores": [[0.2], [0.9, 0.8], [0.95]]}]
    pairs = list(zip([question([True]), question([False, False, True])], choices, strict=True))
    found = measure(pairs, "mean_logit", 3)
    assert found.questions == 2 and list(found.best_of) == [1, 2, 3]
    assert [column["questions"] for column in found.best_of.values()] == [2, 1, 1]  # that have N candidates
    assert [column["ways"]["best of N, min"]["mean"] for column in found.best_of.values()] == [0.5, 0.5, 1]
    assert [column["ways"]["pass@N"]["mean"] for column in found.best_of.values()] == [0.5, 0.5, 1]


def test_candidate_counts():
    found = [candidate_counts(largest) for largest in (1, 2, 3, 8, 9)]
    assert found == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8], [1, 2, 4, 8, 9]]


def test_a_resumed_run_has_the_same_batches_wherever_it_was_cut_off(demo, weights_path, tmp_path):
    """With three chains a batch, a question's scores depend in the last bits on the block that it is scored in."""
    rows = json.loads((demo / "test.json").read_text())
    rows = [row | {"id": number} for number, row in enumerate(rows + rows[::-1])]  # 48 candidates: two blocks of 24
    (demo / "twice.json").write_text(json.dumps(rows))
    whole, cut = tmp_path / "whole.json", tmp_path / "cut.json"
    more = ("--candidates_json_file", str(demo / "twice.json"), "--batch_size", "3")
    main(flags(demo, weights_path, whole, *more))
    lines = whole.read_bytes().splitlines(keepends=True)  # "[", a line for each row, "]"
    note = json.loads((tmp_path / "whole.json.run").read_text())
    for done in (0, 2, 6, 8):
        cut.write_bytes(b"".join(lines[: done + 1]) + lines[done + 1][:20])
        (tmp_path / "cut.json.run").write_text(json.dumps(note | {"finished": False}))
        main(flags(demo, weights_path, cut, *more))
        assert cut.read_bytes() == whole.read_bytes(), done


def test_whatever_a_score_depends_on_belongs_to_the_output(demo, weights_path, tmp_path):
    row = json.loads((demo / "test.json").read_text())[0]
    name = Path(row["image_path"]).name
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes((demo / row["image_path"]).read_bytes())
    (tmp_path / "rows.json").write_text(json.dumps([row | {"image_path": name}]))
    output = tmp_path / "out.json"
    more = ["--candidates_json_file", str(tmp_path / "rows.json"), "--image_root"]
    main(flags(demo, weights_path, output, *more, str(tmp_path / "one")))
    main(flags(demo, weights_path, output, *more, str(tmp_path / "one")))
    for changed, differs in (
        ([*more, str(tmp_path / "other")], "image_root"),
        ([*more, str(tmp_path / "one"), "--precision", "bf16"], "precision"),
        ([*more, str(tmp_path / "one"), "--batch_size", "2"], "batch_size"),
        ([*more, str(tmp_path / "one"), "--aggregation_function", "min"], "aggregation_function"),
    ):
        with pytest.raises(UserError, match=f"out.json: holds choices of another run: its {differs} differs"):
            main(flags(demo, weights_path, output, *changed))
    os.utime(tmp_path / "one" / name, ns=(0, 0))
    with pytest.raises(UserError, match="its images differs"):
        main(flags(demo, weights_path, output, *more, str(tmp_path / "one")))


def test_a_base_that_has_moved_is_named_and_one_that_has_changed_is_noticed(demo, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(EMBEDDED_BACKBONE, base)
    ProcessRewardModel.from_backbone(base, train="head").save_pretrained(tmp_path / "prm")
    output = tmp_path / "out.json"
    more = ("--aggregation_function", "min")
    main(flags(demo, tmp_path, output, *more))
    moved = base.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="has moved, name it with --backbone"):
        main(flags(demo, tmp_path, output, *more))
    main(flags(demo, tmp_path, output, *more, "--backbone", str(moved)))  # the same choices: nothing to do
    weights = load_file(moved / "model.safetensors")
    save_file({name: tensor + 1e-3 for name, tensor in weights.items()}, moved / "model.safetensors")
    with pytest.raises(UserError, match="not the one that the model was trained on.*--allow_changed_base"):
        main(flags(demo, tmp_path, output, *more, "--backbone", str(moved)))
    with pytest.raises(UserError, match="its base differs"):
        main(flags(demo, tmp_path, output, *more, "--backbone", str(moved), "--allow_changed_base"))
    with pytest.raises(UserError, match="--backbone does nothing"):
        ProcessRewardModel.from_backbone(moved).save_pretrained(tmp_path / "full")
        main(flags(demo, tmp_path / "full", output, *more, "--backbone", str(moved)))


@pytest.mark.parametrize("name", ["", " ", ".", "..", "/", "x/.."])
def test_an_output_needs_a_name(demo, weights_path, folder, name):
    with pytest.raises(UserError, match="--output: found (an empty value|.*allowed: a path that ends in a name)"):
        main(flags(demo, weights_path, Path("x"), "--output", name))
    assert not list(folder.iterdir())


def test_what_is_no_regular_file_is_refused_and_nothing_is_left_beside_it(demo, weights_path, tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(UserError, match="is no regular file"):
            main(flags(demo, weights_path, tmp_path / name))
    with pytest.raises(UserError, match="/dev/null: is no regular file"):
        main(flags(demo, weights_path, Path("/dev/null")))
    (tmp_path / "mine.json").write_text("[1]")
    with pytest.raises(UserError, match="not known to be a run's"):
        main(flags(demo, weights_path, tmp_path / "mine.json"))
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "pipe", "mine.json"}
    assert not Path("/dev/null.lock").exists()


def test_a_reader_that_goes_away_stops_nothing(demo, weights_path, tmp_path):
    """As `best_of_n.py … | head -1` does."""
    process = Command("best_of_n.py", *flags(demo, weights_path, tmp_path / "o.json"), stdout=PIPE, stderr=PIPE)
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(timeout=120) == 0 and "error" not in errors.lower() and "Broken" not in errors
    assert (tmp_path / "o.json.metrics").exists() and len(json.loads((tmp_path / "o.json").read_text())) == 6


def test_unknown_answers_are_left_out_and_counted():
    """Of four candidates the chosen one states nothing to compare, and counts neither as correct nor as incorrect."""
    row = question(None, "4", "5", "4", count=4, ground_truth="4")
    choices = {"scores": [[0.3], [0.5], [0.2], [0.9]]}
    found = measure([(row, choices)], "mean", 4)
    assert (found.questions, found.answers, found.unjudged_answers, found.silent_answers) == (1, 4, 1, 1)
    ways = found.best_of[4]["ways"]
    assert ways["best of N, mean"]["mean"] == 0 and ways["pass@1"]["mean"] == pytest.approx(2 / 3)
    assert ways["majority vote"]["mean"] == 1 and found.best_of[1]["ways"]["best of N, mean"]["mean"] == 1
    assert "1 of 4 answers state none" in warnings(found)
    assert any("1 of 4 answers cannot be judged" in line for line in warnings(found))
    nothing = question(None, count=2, ground_truth="4")
    found = measure([(row, choices), (nothing, {"scores": [[0.5], [0.6]]})], "mean", 4)
    assert (found.questions, found.unjudged_questions) == (1, 1) and found.best_of[1]["ways"]["pass@1"]["mean"] == 1


def test_without_stated_answers_there_is_no_accuracy_and_no_vote(demo, weights_path, tmp_path, capsys):
    rows = json.loads((demo / "test.json").read_text())[:2]
    for row in rows:
        del row["true_false"], row["answers"]
        row["candidates"] = [text.partition("\nFinal answer")[0] for text in row["candidates"]]
    (demo / "silent.json").write_text(json.dumps(rows))
    main(flags(demo, weights_path, tmp_path / "o.json", "--candidates_json_file", str(demo / "silent.json")))
    out = capsys.readouterr().out
    assert "no accuracy" in out and "8 of 8 answers state none" in out
    assert (
        "pass@" not in out and "vote" not in out.replace("no votes", "") and not (tmp_path / "o.json.metrics").exists()
    )
    known = [(question([True, False]), {"scores": [[0.5], [0.6]]})]
    ways = measure(known, "mean", 2).best_of[2]["ways"]
    assert "pass@N" in ways and not any("vote" in way or "majority" in way for way in ways)


def test_single_steps_are_counted(demo, weights_path, tmp_path, capsys):
    rows = json.loads((demo / "test.json").read_text())[:2]
    rows[0]["candidates"] = [text.replace("Step", "Part") for text in rows[0]["candidates"]]
    (demo / "steps.json").write_text(json.dumps(rows))
    main(flags(demo, weights_path, tmp_path / "o.json", "--candidates_json_file", str(demo / "steps.json")))
    captured = capsys.readouterr()
    assert "4 of 8 answers have a single step: all aggregations agree on it" in captured.out
    assert "steps.json: 4 of 8 answers are a single step" in captured.err and "`Step 1:`" in captured.err


def test_control_characters_are_shown_and_not_sent(demo, weights_path, tmp_path):
    rows = json.loads((demo / "test.json").read_text())[:1]
    rows[0]["id"] = "a\x1b[31m\x07b"
    del rows[0]["true_false"], rows[0]["ground_truth"]
    (demo / "ids.json").write_text(json.dumps(rows))
    output = tmp_path / "o\x1b]0;x\x07.json"
    more = flags(demo, weights_path, output, "--candidates_json_file", str(demo / "ids.json"))
    done = run("best_of_n.py", *more, text=False)
    assert (
        done.returncode == 0 and b"\x1b" not in done.stdout + done.stderr and b"\x07" not in done.stdout + done.stderr
    )
    assert rb"a\x1b[31m\x07b" in done.stdout and rb"o\x1b]0;x\x07.json" in done.stdout


def test_questions_with_an_answer_that_is_too_long_are_an_error_or_left_out(weights_path, tmp_path, capsys):
    rows = [{"id": n, "input": f"Q{n}", "image_path": None, "candidates": ["Step 1: two", "red " * long],
             "true_false": [True, False]} for n, long in enumerate((1, 9000, 2))]  # fmt: skip
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    output = tmp_path / "out.json"
    command = ["--weights_path", str(weights_path), "--candidates_json_file", str(tmp_path / "rows.json"),
               "--output", str(output)]  # fmt: skip
    with pytest.raises(UserError, match="(?s)1 of 6 chains cannot be used.*row 1: .*To choose .*--drop_too_long"):
        main(command)
    for _ in range(2):  # the second time the finished file is read
        main([*command, "--drop_too_long"])
        assert "--drop_too_long: 1 of 3 questions are left out" in capsys.readouterr().out
        assert [row["id"] for row in json.loads(output.read_text())] == [0, 2]
