"""state_files.py: states from a folder are those of the backbone, to the bit, or they are computed again."""

import errno
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from reweighting.data.chains import Chain
from reweighting.errors import UnreadableImage, UserError
from reweighting.main import main
from reweighting.modeling import state_files
from reweighting.modeling.reward_model import ProcessRewardModel
from reweighting.modeling.saved_model import BaseIdentity
from reweighting.modeling.state_files import StateFiles
from reweighting.modeling.step_states import StepStates
from tests.runs import flags, same_results, weights
from tests.tiny import build, draw_cells, tiny_backbone

STEPS = ("Step 1: two in the first row", "Step 2: so 3 in all", "Step 3: that is 3")


@pytest.fixture
def computed(monkeypatch) -> list[Chain]:
    """The chains that went through a backbone."""
    read, compute = [], StepStates.compute
    monkeypatch.setattr(StepStates, "compute", lambda self, chain: read.append(chain) or compute(self, chain))
    return read


@pytest.fixture
def chains(tmp_path) -> list[Chain]:
    """A chain with an image, and a part of it without one."""
    image = draw_cells(tmp_path / "cells.png")
    return [Chain("How many red cells?", STEPS, (image,)), Chain("How many red cells?", STEPS[:2])]


def new_states(folder: Path, backbone: Path | None = None, precision: str = "fp32", **settings) -> StepStates:
    """What a process has that has just started."""
    model = ProcessRewardModel.from_backbone(backbone or tiny_backbone(), train="head", **settings)
    files = StateFiles(folder, model.base_identity, model.base, model.chain_tokenizer, precision)
    return StepStates(model.base, model.chain_tokenizer, precision, 2**20, files)


def the_file(folder: Path) -> Path:
    (path,) = folder.rglob("*.states")
    return path


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_states_are_read_back_to_the_bit(tmp_path, chains, computed, precision):
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    first = new_states(tmp_path / "states", precision=precision, dtype=dtype)
    second = new_states(tmp_path / "states", precision=precision, dtype=dtype)
    for chain in chains:
        expected = first.of(chain)
        with torch.inference_mode():  # as validation reads
            found = second.of(replace(chain, targets=(1.0,) * len(chain.steps), label=1.0))
        assert torch.equal(found, expected) and found.dtype == dtype and not found.is_inference()
        first.files.write(chain, expected)  # as another run does that has computed it at the same time
        assert torch.equal(second.files.read(chain), expected)
    assert computed == chains
    assert sorted(path.suffix for path in tmp_path.rglob("*") if path.is_file() and path.parent.name != "states") == [
        ".json", ".png", ".states", ".states",
    ]  # fmt: skip


@pytest.mark.parametrize("damage", [
    lambda content: content[:-1],
    lambda content: content[:40],
    lambda content: b"",
    lambda content: content[:-5] + bytes([content[-5] ^ 1]) + content[-4:],
], ids=["cut", "almost all cut", "empty", "a bit"])  # fmt: skip
def test_a_damaged_file_is_noticed_and_replaced(tmp_path, chains, computed, capsys, damage):
    expected = new_states(tmp_path / "states").of(chains[1])
    path = the_file(tmp_path / "states")
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert torch.equal(new_states(tmp_path / "states").of(chains[1]), expected)
    assert len(computed) == 2 and path.read_bytes() == whole
    assert capsys.readouterr().err.count(f"warning: --step_states_dir: {path} is damaged.") == 1
    assert torch.equal(new_states(tmp_path / "states").of(chains[1]), expected) and len(computed) == 2


def test_a_file_under_the_name_of_another_is_noticed(tmp_path, chains, computed, capsys):
    for chain in chains:
        new_states(tmp_path / "states").of(chain)
    one, other = (tmp_path / "states").rglob("*.states")
    shutil.copy(one, other)
    found = new_states(tmp_path / "states")
    assert [len(found.of(chain)) for chain in chains] == [3, 2]
    assert len(computed) == 3 and "is damaged" in capsys.readouterr().err


def test_what_the_states_depend_on_keeps_them_apart(tmp_path, chains, computed):
    other = build(tmp_path / "other", seed=1)
    folder = tmp_path / "states"
    runs = ({}, {"backbone": other}, {"precision": "bf16"}, {"max_image_side": 32}, {"dtype": torch.bfloat16},
            {"attn_implementation": "eager"})  # fmt: skip
    for number, run in enumerate(runs, 1):
        new_states(folder, **run).of(chains[0])
        assert len(computed) == len(list(folder.iterdir())) == number
    changed = tmp_path / "changed"  # a tokenizer that cuts the same text in another way
    shutil.copytree(tiny_backbone(), changed)
    text = (changed / "chat_template.jinja").read_text()
    (changed / "chat_template.jinja").write_text(text.replace("a helpful", "an attentive"))
    new_states(folder, changed).of(chains[0])
    assert len(computed) == len(runs) + 1
    moved = shutil.copytree(tiny_backbone(), tmp_path / "moved")
    new_states(folder, Path(moved)).of(chains[0])
    new_states(folder, max_length=500).of(chains[0])  # which changes no token
    assert len(computed) == len(runs) + 1


def test_the_content_of_images_counts_and_not_their_place(tmp_path, chains, computed):
    (image,) = chains[0].images
    new_states(tmp_path / "states").of(chains[0])
    copy = Path(shutil.copy(image, tmp_path / "copy.png"))
    new_states(tmp_path / "states").of(replace(chains[0], images=(copy,)))
    assert len(computed) == 1
    from PIL import Image

    Image.new("RGB", (64, 64), "green").save(image)
    new_states(tmp_path / "states").of(chains[0])
    assert len(computed) == 2
    image.unlink()
    with pytest.raises(UnreadableImage, match="the given chain: the image .*cells.png cannot be read"):
        new_states(tmp_path / "states").of(chains[0])


def test_a_full_disk_is_warned_of_once(tmp_path, chains, computed, capsys, monkeypatch):
    @contextmanager
    def full(path, sync=True):
        raise OSError(errno.ENOSPC, "No space left on device")
        yield

    monkeypatch.setattr(state_files, "atomic_file", full)
    states = new_states(tmp_path / "states")
    expected = [states.of(chain) for chain in chains]
    assert all(torch.equal(states.of(chain), one) for chain, one in zip(chains, expected, strict=True))
    warning = capsys.readouterr().err
    assert warning.count("warning") == 1 and "free some disk space. The run continues" in warning
    assert len(computed) == 2 and not list((tmp_path / "states").rglob("*.states"))


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--step_states_dir .*file: cannot be made: File exists"):
        new_states(tmp_path / "file")


def test_what_a_killed_run_left_unfinished_is_never_read(tmp_path, chains, computed):
    new_states(tmp_path / "states").of(chains[1])
    path = the_file(tmp_path / "states")
    path.rename(path.with_name(f".tmp-00000000-new-{path.name}"))
    new_states(tmp_path / "states").of(chains[1])
    assert len(computed) == 2 and path.exists()


def test_later_runs_need_no_backbone_and_have_the_same_results(demo, tmp_path, computed):
    more = ("--reward_model", str(tiny_backbone()), "--train", "head", "--batch_size", "8")
    more += ("--validation_json_file", str(demo / "test.json"))
    main(flags(demo, tmp_path / "without", *more))
    assert computed
    kept = ("--step_states_dir", str(tmp_path / "states"))
    computed.clear()
    main(flags(demo, tmp_path / "first", *more, *kept))
    written = len(computed)
    assert written == len(list((tmp_path / "states").rglob("*.states")))
    main(flags(demo, tmp_path / "second", *more, *kept))
    assert len(computed) == written
    for name in ("first", "second"):
        same_results(tmp_path / "without", tmp_path / name)
    assert len(set(weights(tmp_path / "second").values())) > 1


@pytest.mark.parametrize("more", [(), ("--train", "lora")])
def test_it_is_refused_where_it_would_do_nothing(demo, tmp_path, more):
    with pytest.raises(UserError, match="--step_states_dir does nothing without --train head"):
        main(flags(demo, tmp_path / "weights", "--step_states_dir", str(tmp_path / "states"), *more))


def test_a_base_is_told_by_its_digest(tmp_path):
    model = ProcessRewardModel.from_backbone(tiny_backbone(), train="head")
    folders = {
        StateFiles(tmp_path, BaseIdentity(name), model.base, model.chain_tokenizer, "fp32").folder for name in "ab"
    }
    assert len(folders) == 2
