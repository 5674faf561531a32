"""Resuming with other settings than the checkpoint's: the hypergradient's method, and learned or fixed weights. The
others are in `test_resume.py`."""

import shutil

import pytest

from reweighting.errors import UserError
from reweighting.main import main
from reweighting.training import hypergradient_choice
from reweighting.training.checkpoints import checkpoints, load_checkpoint
from reweighting.training.signals import Stopped
from tests.runs import StopAtStep, flags, weights, without_times
from tests.tiny import tiny_backbone


@pytest.fixture
def tiny(demo):
    """flags(), with the tiny backbone."""
    return lambda output, *more: flags(demo, output, "--reward_model", str(tiny_backbone()), *more)


@pytest.fixture
def finished(tiny, tmp_path):
    """A finished run."""
    main(tiny(tmp_path / "finished"))
    return tmp_path / "finished"


def test_auto_keeps_the_method_of_the_run_so_far(tiny, tmp_path, finished, monkeypatch, capsys):
    """Inside a window, though another method would be chosen now."""
    folder = tmp_path / "cut"
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr("reweighting.main.StopSignals", lambda: StopAtStep(3))
        main(tiny(folder))
    with pytest.raises(UserError, match="hypergradient was auto and is jvp now"):
        main(tiny(folder, "--hypergradient", "jvp", "--resume"))
    monkeypatch.setattr(hypergradient_choice, "choose_method", lambda *_: ("jvp", "as it were"))
    main(tiny(folder, "--resume"))
    assert "hypergradient: unrolled: as when the run was started" in capsys.readouterr().out
    assert without_times(folder) == without_times(finished) and weights(folder) == weights(finished)
    state = load_checkpoint(checkpoints(folder / "checkpoints")[-1])
    assert state["settings"]["planned_hypergradient"] == "unrolled"


def test_what_is_learned_cannot_be_changed_on_the_way(tiny, tmp_path, finished):
    learned, fixed = shutil.copytree(finished, tmp_path / "learned"), tmp_path / "fixed"
    main(tiny(fixed, "--baseline"))
    to_fixed, to_learned = "learns the weights .*, and this one trains with fixed", "fixed .* this one learns"
    given = ("--domain_weights", str(finished / "domain_weights.json"))
    instances = ("--weights_for", "instance")
    to_instances = r"learns the weights \(--weights_for domain\), and this one .* \(--weights_for instance\)"
    cases = ((learned, ("--baseline",), to_fixed), (learned, given, to_fixed), (fixed, (), to_learned),
             (learned, instances, to_instances))  # fmt: skip
    for folder, more, words in cases:
        for how in (("--resume",), ("--resume_from", str(folder))):
            before = sorted(folder.rglob("*"))
            with pytest.raises(UserError, match=f"{words}.*: a resumed run cannot change that"):
                main(tiny(folder, *more, *how, "--iteration_num", "15", "--allow_changed_settings"))
            assert sorted(folder.rglob("*")) == before
    main(tiny(fixed, *given, "--resume", "--iteration_num", "15", "--allow_changed_settings"))  # other fixed ones
