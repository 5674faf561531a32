"""What goes wrong during a run: numbers that are not finite, images that vanish, full disks, two runs in a folder."""

import json
import resource

import pytest
import torch

from reweighting import main as main_module
from reweighting.bilevel.domain_weights import collapsed
from reweighting.bilevel.problems import DomainReweighting, PRMFineTuning
from reweighting.errors import UnreadableImage, UserError
from reweighting.main import main
from reweighting.training import engine as engine_module
from reweighting.training.checkpoints import checkpoints, load_checkpoint
from reweighting.training.dry_run import same
from reweighting.training.output_dir import lock_output_dir
from tests.runs import flags, history, same_results, weights
from tests.tiny import tiny_backbone


@pytest.fixture
def tiny(demo):
    """flags(), with the tiny backbone."""
    return lambda output, *more: flags(demo, output, "--reward_model", str(tiny_backbone()), *more)


def poison(monkeypatch, problem: type, method: str, times: int) -> None:
    """Let the n-th and following `times` calls of a loss give a NaN; they come in the second window."""
    original, calls = getattr(problem, method), []

    def spoilt(self, batch):
        calls.append(None)
        loss = original(self, batch)
        first = 12 if problem is PRMFineTuning else 2
        if first <= len(calls) < first + times:
            loss = loss * float("nan")
            self.loss = loss.detach()
        return loss

    monkeypatch.setattr(problem, method, spoilt)


def test_a_loss_that_is_no_number_stops_before_the_parameters_are_touched(tiny, tmp_path, monkeypatch):
    poison(monkeypatch, PRMFineTuning, "domain_loss", times=1)
    with pytest.raises(UserError, match=r"step 6: the training loss .* is not finite .*train.json: row.*saved at step"):
        main(tiny(tmp_path))
    (path,) = (tmp_path / "diagnostics").iterdir()
    found = json.loads(path.read_text())
    assert found["step"] == 6 and found["level"] == "lower" and len(found["rows"]) == 2
    assert found["losses"].count("nan") == 1 and found["parameters"] and len(found["weights"]) == 10
    before, after = (load_checkpoint(checkpoint_dir) for checkpoint_dir in checkpoints(tmp_path / "checkpoints"))
    assert (before["step"], after["step"]) == (5, 6)
    assert same(before["problems"]["lower"]["module"], after["problems"]["lower"]["module"])
    main(tiny(tmp_path, "--resume"))  # past the step that was left out
    assert history(tmp_path)[-1]["step"] == 10 and all(torch.tensor(list(weights(tmp_path).values())).isfinite())


@pytest.mark.parametrize("problem", [PRMFineTuning, DomainReweighting])
def test_so_many_are_tolerated_and_no_more(tiny, tmp_path, monkeypatch, problem, capsys):
    method = "domain_loss" if problem is PRMFineTuning else "training_step"
    with monkeypatch.context() as patch:
        poison(patch, problem, method, times=1)
        main(tiny(tmp_path / "one", "--max_skipped_steps", "1"))
    assert "is skipped" in capsys.readouterr().err
    assert [line["step"] for line in history(tmp_path / "one")] == [5, 10]
    assert all(torch.tensor(list(weights(tmp_path / "one").values())).isfinite())
    more = ("--iteration_num", "15", "--max_skipped_steps", "1")
    poison(monkeypatch, problem, method, times=99)
    with pytest.raises(UserError, match=r"--max_skipped_steps \(now 1\)"):
        main(tiny(tmp_path / "two", *more))


def test_a_poisoned_update_leaves_the_weights_as_they_were(tiny, tmp_path, monkeypatch):
    poison(monkeypatch, DomainReweighting, "training_step", times=1)
    with pytest.raises(UserError, match="step 10: the meta loss or its hypergradient .*meta.json: row"):
        main(tiny(tmp_path))
    lines = history(tmp_path)
    assert [line["step"] for line in lines] == [5, 10] and lines[1]["meta_loss"] is None
    assert lines[1]["weights"] == lines[0]["weights"]
    state = load_checkpoint(checkpoints(tmp_path / "checkpoints")[-1])
    assert state["step"] == 10
    main(tiny(tmp_path, "--resume", "--iteration_num", "15"))
    assert weights(tmp_path) != lines[0]["weights"]


def test_collapsing_weights_are_reported():
    assert collapsed({"a": 1.0, "b": 1.2, "c": 0.8}) == {}
    assert collapsed({"a": 0.04, "b": 1.16, "c": 1.8}) == {
        "a": "the weight of a has nearly vanished (0.040)",
        "c": "c has more than half of the total weight (1.80 of 3)",
    }
    assert collapsed({"a": 0.5, "b": 1.5}) == {}


def test_a_collapse_is_reported_once(tiny, tmp_path, capsys):
    main(tiny(tmp_path, "--meta_lr", "9", "--iteration_num", "20"))
    err = capsys.readouterr().err
    low = [domain for domain, weight in history(tmp_path)[0]["weights"].items() if weight < 0.05]
    assert low and all(err.count(f"the weight of {domain} has nearly vanished") == 1 for domain in low)


def forget_images(monkeypatch, vanish) -> None:
    """Let a run read every image anew, and call `vanish(chain_tokenizer)` when it is about to train."""
    original = main_module.build_engine

    def build_engine(*args):
        engine = original(*args)
        tokenizer = engine.lower.module.chain_tokenizer
        tokenizer._images, tokenizer._tokens, tokenizer._last_images, tokenizer._cache_bytes_left = {}, {}, {}, 0
        vanish(tokenizer)
        return engine

    monkeypatch.setattr(main_module, "build_engine", build_engine)
    monkeypatch.setattr(engine_module, "FIRST_PAUSE", 0.01)


def test_an_image_that_vanishes_is_named_and_the_run_resumes(demo, tiny, tmp_path, monkeypatch):
    main(tiny(tmp_path / "whole"))
    gone = [path for path in (demo / "images" / "dice").iterdir()]
    hidden = [path.with_suffix(".hidden") for path in gone]
    with monkeypatch.context() as patch:
        forget_images(patch, lambda _: [a.rename(b) for a, b in zip(gone, hidden, strict=True)])
        try:
            with pytest.raises(UserError, match="train.json: row.*dice.* cannot be read .*tried 4 times.*saved"):
                main(tiny(tmp_path / "cut"))
        finally:
            for a, b in zip(gone, hidden, strict=True):
                b.rename(a)
    main(tiny(tmp_path / "cut", "--resume"))
    same_results(tmp_path / "whole", tmp_path / "cut")


def test_an_image_that_vanishes_from_the_validation_rows(demo, tiny, tmp_path, monkeypatch):
    main(tiny(tmp_path / "whole"))
    gone = next((demo / "images" / "test").iterdir())
    hidden = gone.with_suffix(".hidden")
    more = ("--validation_json_file", str(demo / "test.json"))
    with monkeypatch.context() as patch:
        forget_images(patch, lambda _: gone.rename(hidden))
        try:
            with pytest.raises(UserError, match="test.json: row.* cannot be read .*tried 4 times.*saved at step 5"):
                main(tiny(tmp_path / "cut", *more))
        finally:
            hidden.rename(gone)
    main(tiny(tmp_path / "cut", *more, "--resume"))
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


def test_an_image_that_comes_back_in_time_costs_nothing(tiny, tmp_path, monkeypatch):
    main(tiny(tmp_path / "whole"))
    with monkeypatch.context() as patch:

        def stumble(tokenizer):
            original, failures = tokenizer.read_images, [True, False, True, True]

            def read_images(images):
                if images and failures and failures.pop():
                    raise UnreadableImage(f"cannot read the images {images}")
                return original(images)

            tokenizer.read_images = read_images

        forget_images(patch, stumble)
        main(tiny(tmp_path / "cut"))
    same_results(tmp_path / "whole", tmp_path / "cut")


def test_a_full_disk_leaves_the_last_checkpoint_whole(tiny, tmp_path, monkeypatch):
    """The system refuses to write more than 50 kB into a file, as a full disk would, from the second checkpoint on."""
    main(tiny(tmp_path / "whole"))
    original, limits = engine_module.save_checkpoint, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save(folder, step, *rest):
        if step > 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        return original(folder, step, *rest)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(engine_module, "save_checkpoint", save)
            with pytest.raises(
                UserError, match=r"00000010 cannot be written: .*; complete checkpoints: step-00000005$"
            ):
                main(tiny(tmp_path / "cut"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step-00000005"]
    main(tiny(tmp_path / "cut", "--resume"))
    same_results(tmp_path / "whole", tmp_path / "cut")


def test_two_runs_may_not_write_one_folder(tiny, tmp_path):
    with lock_output_dir(str(tmp_path), {}):
        with pytest.raises(UserError, match="another run writes there .process .* on .*, since 20"):
            main(tiny(tmp_path))
    left = tmp_path / ".tmp-01234567-new-dry-run"  # by a run that was killed
    left.mkdir()
    main(tiny(tmp_path))
    assert weights(tmp_path) and not left.exists()


def test_a_dry_run_that_meets_a_nan_promises_nothing(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(PRMFineTuning, "domain_loss", lambda self, batch: self.module(batch).sum() * float("nan"))
    with pytest.raises(UserError, match=r"step 1: the training loss .*changed\. Fix .*\. A dry run keeps nothing"):
        main(tiny(tmp_path, "--dry_run"))
    assert "see" not in capsys.readouterr().err  # a file that is removed again
    assert not {"checkpoints", "diagnostics"} & {path.name for path in tmp_path.iterdir()}


def test_a_dry_run_tells_the_cost_and_leaves_nothing(tiny, tmp_path, capsys):
    main(tiny(tmp_path, "--dry_run", "--iteration_num", "1000"))
    out = capsys.readouterr().out
    assert all(word in out for word in ("dry run: made 5 steps", "hours for 1000 steps", "memory", "GB are free"))
    assert "step states" not in out and "only once" not in out
    assert out.index("expected memory on cpu") < out.index("kept gradients  ") < out.index("dry run: made 5 steps")
    assert "GB of it since the data were read; expected: " in out
    assert not {"checkpoints", "history.jsonl", "prm"} & {path.name for path in tmp_path.iterdir()}
    assert not list(tmp_path.glob(".tmp-*"))
    with pytest.raises(UserError, match="images/none.png"):
        rows = [{"input": "q", "add": "Step 1: a", "image_path": "images/none.png", "dataset": d, "accuracy": 1}
                for d in "ab"]  # fmt: skip
        (tmp_path / "bad.json").write_text(json.dumps(rows))
        main(tiny(tmp_path, "--dry_run", "--train_json_file", str(tmp_path / "bad.json")))
