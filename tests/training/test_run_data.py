"""run_data.py and preflight.check_data: what is odd about the files is said, and what cannot be used is left out."""

from dataclasses import replace

import pytest

from reweighting.config.training import TrainingConfig
from reweighting.data.chains import Chain
from reweighting.errors import UserError
from reweighting.training.build import meta_batch_size, windows_per_meta_pass
from reweighting.training.preflight import check_data
from reweighting.training.run_data import RunData, read_run_data
from tests.rows import candidate, meta, training, write
from tests.runs import flags
from tests.tiny import tiny_backbone

STEPS = "Step 1: one\nStep 2: two"


@pytest.fixture
def config(folder):
    """Makes the config of a run on these rows."""

    def make(*more, train=None, meta_rows=None, validation=None):
        train = train or [training(add=STEPS, dataset=name) for name in ("A", "B")]
        write(train, "train.json")
        write(meta_rows or [meta(input=f"Q\n{STEPS}", true_false=label) for label in (True, False)], "meta.json")
        if validation is not None:
            write([row | {"input": "Which?"} for row in validation], "validation.json")
            more = ("--validation_json_file", "validation.json", *more)
        run = flags(folder, folder / "out", "--reward_model", str(tiny_backbone()), "--batch_size", "1", *more)
        return TrainingConfig.parse([word.replace(f"{folder}/", "") for word in run])

    return make


def warnings(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]


def test_files_with_nothing_odd_give_no_warning(config, capsys):
    data = read_run_data(config(validation=[candidate(candidates=[STEPS, STEPS], true_false=[True, False])]))
    assert [len(chain.steps) for chain in data.train + data.meta] == [2] * 4 and data.correct == [[True, False]]
    assert warnings(capsys) == []


def test_single_steps_and_odd_numbers_are_counted(config, capsys):
    rows = [training(add=text, dataset=name) for name in "AB" for text in ("no marker", STEPS, "Step 2: a\nStep 3: b")]
    answers = [meta(input=f"Q\n{text}", true_false=label) for text in ("Step 1: a", STEPS) for label in (True, False)]
    read_run_data(config(train=rows, meta_rows=[*answers, meta(input="Q")]))
    lines = warnings(capsys)
    assert [line.partition(",")[0] for line in lines] == [
        "warning: train.json: 2 of 6 answers are a single step",
        "warning: train.json: the steps of 2 of 6 answers are not numbered 1",
        "warning: meta.json: 1 of 5 rows have no `Step N` marker and are left out",
        "warning: meta.json: 2 of 4 answers are a single step",
    ]
    assert "Step 1:" in lines[0]  # the remedy


def test_a_batch_larger_than_a_domain_is_said_and_one_larger_than_all_refused(config, capsys):
    rows = [
        training(add=STEPS, dataset=name, input=f"Q{n}") for name, count in (("A", 5), ("B", 2)) for n in range(count)
    ]
    read_run_data(config("--batch_size", "5", train=rows))
    (line,) = warnings(capsys)
    assert line.startswith(
        "warning: --batch_size 5: 1 of 2 domains have fewer chains, so each of their batches repeats"
    )
    assert line.endswith("the smallest, 'B', has 2")
    with pytest.raises(UserError, match="--batch_size 1000000000: there are 7 chains"):
        read_run_data(config("--batch_size", "1000000000", train=rows))


def test_validation_leaves_out_what_cannot_be_decided(config, capsys):
    known = candidate(candidates=[f"{STEPS}\nFinal answer: {n}" for n in (4, 5)] + [STEPS], ground_truth="4")
    units = candidate(candidates=[f"{STEPS}\nFinal answer: 4 cm", STEPS], ground_truth="4 mm")
    silent = candidate(candidates=[STEPS, STEPS], ground_truth="4")
    data = read_run_data(config(validation=[silent, known, units]))
    assert [row.index for row in data.validation] == [1] and data.correct == [[True, False, None]]
    (line,) = warnings(capsys)
    assert "4 of 7 candidates state no answer, and for 1 it cannot be decided" in line and "2 questions" in line
    with pytest.raises(
        UserError, match="no checkpoint can be chosen by it: 2 of 2 candidates state no answer.*Final answer"
    ):
        read_run_data(config(validation=[silent]))
    with pytest.raises(UserError, match="row 1: needs true_false or ground_truth"):
        read_run_data(config(validation=[known, candidate()]))


LONG = f"Step 1: {'long ' * 300}\nStep 2: two"


def test_chains_that_are_too_long_are_one_message_or_are_dropped(config, capsys):
    rows = [training(add=STEPS, dataset=name, input=f"Q{n}") for name in "AB" for n in range(3)]
    rows += [training(add=LONG, dataset=name, input=f"Q{n}") for name in "AB" for n in range(3, 7)]
    answers = [meta(input=f"Q\n{text}", true_false=label) for text in (STEPS, LONG) for label in (True, False)]
    questions = [candidate(candidates=[STEPS, text], true_false=[True, False]) for text in (STEPS, LONG)]
    made = {"train": rows, "meta_rows": answers, "validation": questions}
    one = config(**made)
    with pytest.raises(UserError) as caught:
        check_data(one, read_run_data(one))
    head, line, remedy = str(caught.value).split("\n")
    assert head == "11 of 22 chains cannot be used" and line.startswith("train.json: row 6: ")
    assert "tokens, but the model takes 1024" in line and line.endswith("train.json: row 10 and 6 more)")
    assert remedy.endswith("--drop_too_long")

    dropping = config("--drop_too_long", **made)
    capsys.readouterr()
    data = check_data(dropping, read_run_data(dropping))
    assert [len(data.train), len(data.meta), len(data.validation), len(data.correct)] == [6, 2, 1, 1]
    assert capsys.readouterr().out.splitlines() == [
        f"--drop_too_long: {name}: {count} are left out, which are longer than 1024 tokens"
        for name, count in (("train.json", "8 of 14 chains"), ("meta.json", "2 of 4 chains"),
                            ("validation.json", "1 of 2 questions"))
    ]  # fmt: skip


@pytest.mark.parametrize(
    "rows, message",
    [
        ({"train": [training(add=STEPS), training(add=LONG, dataset="B")]}, r"no chain of 1 domains \('B'\)"),
        (
            {"meta_rows": [meta(input=f"Q\n{STEPS}"), meta(input=f"Q\n{LONG}", true_false=False)]},
            "only one kind of meta",
        ),
        ({"validation": [candidate(candidates=[LONG], true_false=[True])]}, "no validation question"),
    ],
)
def test_dropping_leaves_enough_to_train_on(config, rows, message):
    one = config("--drop_too_long", **rows)
    with pytest.raises(UserError, match=message):
        check_data(one, read_run_data(one))


def test_the_check_reads_no_weights(config, tmp_path):
    """A 70-billion-parameter backbone would take minutes to load, only to refuse the rows."""
    broken = tmp_path / "backbone"
    broken.mkdir()
    for path in tiny_backbone().iterdir():
        if path.suffix != ".safetensors":
            (broken / path.name).write_bytes(path.read_bytes())
    one = config("--reward_model", str(broken))
    assert len(check_data(one, read_run_data(one)).train) == 2


@pytest.mark.parametrize(
    ("answers", "copies", "size"), [(3, 1, 2), (22, 1, 3), (22, 5, 3), (447, 1, 63), (2000, 1, 64)]
)
def test_updates_read_a_seventh_of_the_different_meta_answers(answers, copies, size):
    config = TrainingConfig.parse(["--train_json_file", "train.json", "--meta_json_file", "meta.json"])
    chains = [Chain("Q", (f"Step 1: {number}",), label=1.0) for number in range(answers)] * copies
    data = RunData([], [], chains, [], [])
    assert meta_batch_size(config.upper, data) == size
    assert windows_per_meta_pass(config.upper, data) == answers / size
    assert meta_batch_size(replace(config.upper, meta_batch_size=5), data) == 5
