"""Every tensor is where it belongs: runs on a device beside the CPU are the CPU's, and no tensor of the one meets one
of the other. No GPU is needed; see `second_device.py` for what that can and cannot tell. Where there is one, the same
runs are made on it too."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from tests.device_work import RUNS
from tests.runs import ROOT
from tests.second_device import NAME
from tests.tiny_families import DEVICE_FAMILIES

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"))


@pytest.fixture(scope="module", params=[NAME, CUDA])
def found(request, demo, tmp_path_factory):
    """What all work came to on the CPU and on the other device, by name."""
    folder = shutil.copytree(demo, tmp_path_factory.mktemp("second"), dirs_exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "tests.device_work", str(folder), request.param],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "work.json").read_text())


def both(found: dict, name: str) -> tuple[list, list]:
    """What the other device found, and the CPU."""
    for work in found.values():
        assert isinstance(work[name], list), work[name]
    cpu, other = found.values()
    return other[name], cpu[name]


def test_tensors_of_both_devices_do_not_meet(found):
    (summed, device, mixed), cpu = both(found, "meet")
    assert cpu == [[2, 2, 2], "cpu", [2, 2, 2]]
    assert (summed, device) == ([2, 2, 2], [*found][1])
    errors = {NAME: "aten.add.Tensor: [(3,)] on the CPU, others on second", "cuda": "Expected all tensors to be on"}
    assert mixed.startswith(errors[device])


@pytest.mark.parametrize("name", RUNS)
def test_a_run_on_another_device_is_the_cpus(found, name):
    second, cpu = both(found, name)
    assert len(cpu) == (2 if name == "unrolled" else 1)
    for ours, theirs in zip(second, cpu, strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)
        assert ours["weights"] == pytest.approx(theirs["weights"], abs=2e-3)


@pytest.mark.parametrize("family", DEVICE_FAMILIES)
def test_each_family_scores_and_learns_on_another_device(found, family):
    for ours, theirs in zip(*both(found, family), strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=1e-6)
