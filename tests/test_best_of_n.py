"""best_of_n.py: the real command, its output, resuming, streaming and refusals."""

import json
import math
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from reweighting.best_of_n import main
from reweighting.data.load_rows import iterate_candidate_rows, load_candidate_rows
from reweighting.data.schema import CandidateRow
from reweighting.errors import UserError
from reweighting.inference.best_of_n_metrics import candidate_counts, logits_of, measure
from reweighting.inference.candidates import score_candidates
from reweighting.inference.selections_file import Selections
from reweighting.modeling.reward_model import ProcessRewardModel

ROOT = Path(__file__).resolve().parent.parent


def flags(demo: Path, weights_path: Path, output: Path, *more: str) -> list[str]:
    files = ["--weights_path", str(weights_path), "--candidates_json_file", str(demo / "test.json")]
    return [*files, "--output", str(output), "--batch_size", "1", *more]


@pytest.fixture(scope="module")
def finished(demo, weights_path, tmp_path_factory):
    """What the real command wrote and printed."""
    output = tmp_path_factory.mktemp("selections") / "selections.json"
    command = [sys.executable, str(ROOT / "reweighting" / "best_of_n.py"), *flags(demo, weights_path, output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return output, done.stdout


def test_what_the_command_writes(finished, demo, weights_path):
    output, stdout = finished
    rows, selections = load_candidate_rows(demo / "test.json"), json.loads(output.read_text())
    model = ProcessRewardModel.from_pretrained(weights_path / "prm")
    for row, choice in zip(rows, selections, strict=True):
        assert list(choice) == ["id", "chosen", "aggregates", "scores"] and choice["id"] == row.id
        for response, aggregate, scores in zip(row.candidates, choice["aggregates"], choice["scores"], strict=True):
            assert scores == pytest.approx(model.score(row.image, row.input, response), abs=1e-5)
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
    ("more", "said"),
    [
        (("--batch_size", "0"), "--batch_size: found 0"),
        (("--weights_path", "nowhere"), "nowhere"),
        (("--candidates_json_file", "none.json"), "none.json: no such file"),
        (("--output", "/proc/nothing/x.json"), "cannot be written"),
    ],
)
def test_what_the_user_can_fix(demo, weights_path, tmp_path, more, said):
    with pytest.raises(UserError, match=said):
        main(flags(demo, weights_path, tmp_path / "out.json", *more))


def test_a_wrong_row_ends_the_command_with_2_before_anything_is_written(demo, weights_path, tmp_path):
    rows = json.loads((demo / "test.json").read_text())
    rows[3]["candidates"] = []
    (demo / "wrong.json").write_text(json.dumps(rows))
    arguments = flags(demo, weights_path, tmp_path / "out.json", "--candidates_json_file", str(demo / "wrong.json"))
    command = [sys.executable, str(ROOT / "reweighting" / "best_of_n.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
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
