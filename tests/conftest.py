"""Shared by the tests: one thread each, no network, and a small demo world."""

import os

# Kernels of a GPU round otherwise and add in no fixed order. The tests of CUDA: CUDA_VISIBLE_DEVICES=0 pytest …
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")

import pytest
import torch
from make_demo import QUALITY, make_demo
from PIL import Image

from reweighting import plots

torch.set_num_threads(1)
SAVE = plots._save


@pytest.fixture(scope="session", autouse=True)
def blank_figures():
    """Write a pixel for each figure: rendering takes more time than the short runs of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "_save", lambda figure, path: Image.new("L", (1, 1)).save(path))
        yield


@pytest.fixture(scope="module")
def whole_figures():
    """Render figures in this module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "_save", SAVE)
        yield


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """A folder with a demo world of 200 step rows, 20 meta rows and 6 questions with 4 candidates each."""
    folder = tmp_path_factory.mktemp("demo")
    make_demo(folder, seed=5, quality=QUALITY, train=200, meta=20, test=6, n=4)
    return folder


@pytest.fixture(scope="session")
def weights_path(tmp_path_factory):
    """The folder of a run whose model has the embedded backbone and a head that is not trained but not small."""
    from reweighting.config.training import EMBEDDED_BACKBONE
    from reweighting.modeling.reward_model import ProcessRewardModel

    torch.manual_seed(0)
    model = ProcessRewardModel.from_backbone(EMBEDDED_BACKBONE)
    torch.nn.init.normal_(model.score_head.weight, std=0.3)
    folder = tmp_path_factory.mktemp("weights")
    model.save_pretrained(folder / "prm")
    return folder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder, so that messages show short relative paths."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
