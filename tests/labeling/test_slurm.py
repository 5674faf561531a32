"""examples/label.sh, with a server and a labeller that only note how they are called."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from reweighting.config.labeling import LabelConfig

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "label.sh"
SERVER = "#!/bin/bash\necho $@ > served; trap 'echo > ended; exit' TERM; while true; do sleep 0.02; done\n"
LABELLER = "#!/bin/bash\nprintf '%q ' \"$@\" > labelled\nexit ${LABELLER_CODE:-0}\n"


@pytest.fixture
def machine(tmp_path):
    """A machine of a Slurm job: its folder, and how to run the script there."""
    programs = {"bin/vllm": SERVER, "bin/curl": "#!/bin/bash\ntest -f served\n", ".venv/bin/python": LABELLER,
                "bin/sleep": "#!/bin/bash\nexec /bin/sleep 0.02\n"}  # fmt: skip
    for name, text in programs.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)

    def run(*words: str, **variables: str) -> subprocess.CompletedProcess:
        slurm = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "123456", "SLURM_GPUS_ON_NODE": "4"}
        found = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"} | slurm | variables
        return subprocess.run(["bash", str(SCRIPT), *words], env=found, capture_output=True, text=True, timeout=60)

    return tmp_path, run


def test_a_job_serves_the_policy_and_asks_it(machine):
    folder, run = machine
    done = run("owner/model", "questions.jsonl", "--output_train", "train.jsonl", SLURM_ARRAY_TASK_ID="3",
               SLURM_ARRAY_TASK_COUNT="8")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (folder / "served").read_text().startswith("serve owner/model --host 127.0.0.1 --port 23456 --data-parallel")
    assert (folder / "ended").exists()
    script, *flags = shlex.split((folder / "labelled").read_text())
    config = LabelConfig.parse(flags)
    assert script == "reweighting/label.py"
    assert config.policy.policy == ["http://127.0.0.1:23456/v1"] and config.policy.policy_model == "owner/model"
    assert config.labeling.questions == ["questions.jsonl"] and config.policy.concurrency == 256
    assert [path.name for path in config.rows.outputs().values()] == ["train.part-3-of-8.jsonl"]


@pytest.mark.parametrize(
    ("variables", "part"),
    [({}, "1/1"), ({"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "2", "PARTS": "8"}, "5/8")],
)  # fmt: skip
def test_the_array_decides_the_part(machine, variables, part):
    folder, run = machine
    assert run("owner/model", "questions.jsonl", **variables).returncode == 0
    assert shlex.split((folder / "labelled").read_text())[-2:] == ["--part", part]


def test_the_job_fails_with_its_server_or_its_labeller(machine):
    folder, run = machine
    assert run("owner/model", LABELLER_CODE="2").returncode == 2 and (folder / "ended").exists()
    (folder / "labelled").unlink()
    (folder / "served").unlink()
    (folder / "bin" / "vllm").write_text("#!/bin/bash\nexit 1\n")
    assert run("owner/model").returncode != 0 and not (folder / "labelled").exists()
