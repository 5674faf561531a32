"""What a run of the real command loses to each fault: the table in `docs/outputs.md`.

    python benchmarks/faults.py --work /tmp/faults

Every fault strikes a run of 60 steps on a small demo world. The run is then resumed to its end and its files compared
with those of a run that nothing struck: weights, history, figures, every tensor of the reward model.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

from common import ROOT, make_data, write_results
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from reweighting.training.checkpoints import checkpoints, read_manifest
from tests.runs import history, same_results
from tests.tiny import tiny_backbone

MAIN = str(ROOT / "reweighting" / "main.py")
# For images that vanish: a run that reads every image anew, as one whose images do not fit into memory.
FORGETFUL = f"""
import sys
sys.argv = sys.argv[1:]
sys.path.insert(0, {str(ROOT)!r})
from reweighting import entrypoint
from reweighting.modeling.tokenization import ChainTokenizer
ChainTokenizer._has_room = lambda *_: False
entrypoint.run_command("reweighting.main")
"""
# Memory that runs out in the second micro-batch of step 25, as torch reports it.
OUT_OF_MEMORY = f"""
import sys
sys.argv = sys.argv[1:]
sys.path.insert(0, {str(ROOT)!r})
import torch
from reweighting import entrypoint
from reweighting.bilevel.problems import PRMFineTuning
original, calls = PRMFineTuning.domain_loss, []
def domain_loss(self, batch):
    calls.append(None)
    if len(calls) == 50:
        torch.empty(2**50)
    return original(self, batch)
PRMFineTuning.domain_loss = domain_loss
entrypoint.run_command("reweighting.main")
"""


class Bench:
    """The demo world, the flags and the folders of the runs, all under `work`."""

    def __init__(self, work: Path):
        shutil.rmtree(work, ignore_errors=True)
        self.work, self.data = work, work / "data"
        make_data(self.data, 9, "--train_rows", "1000", "--meta_rows", "60", "--test_questions", "4")
        self.backbone = str(tiny_backbone())
        self.whole = work / "whole"
        self.check(self.run(self.whole), 0)

    def flags(self, folder: Path, *more: str) -> list[str]:
        """The flags of a run into `folder`."""
        return [
            *("--train_json_file", str(self.data / "train.json"), "--meta_json_file", str(self.data / "meta.json")),
            *("--weights_path", str(folder), "--reward_model", self.backbone, "--iteration_num", "60"),
            *("--save_every_iterations", "10", *more),
        ]

    def start(self, folder: Path, *more: str, program: tuple[str, ...] = (MAIN,)) -> subprocess.Popen:
        """Start a run."""
        command = [sys.executable, *program, *self.flags(folder, *more)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def run(self, folder: Path, *more: str) -> tuple[int, str]:
        """Run to the end: exit code and what was written to stderr."""
        return self.wait(self.start(folder, *more))

    @staticmethod
    def wait(process: subprocess.Popen) -> tuple[int, str]:
        errors = process.communicate(timeout=600)[1]
        return process.returncode, errors

    @staticmethod
    def check(done: tuple[int, str], code: int) -> str:
        """The last line of stderr; raises if the exit code is another or there is a traceback."""
        lines = [line for line in done[1].splitlines() if line and "step/s" not in line and "s/step" not in line]
        if done[0] != code or "Traceback" in done[1]:
            raise RuntimeError(f"exit code {done[0]}, expected {code}:\n{done[1][-2000:]}")
        return lines[-1] if lines else ""

    @staticmethod
    def wait_for_step(folder: Path, step: int) -> None:
        """Wait until a run has written the history of this step."""
        for _ in range(6000):
            if (folder / "history.jsonl").exists() and any(
                f'"step": {step},' in line for line in open(folder / "history.jsonl")
            ):
                return
            time.sleep(0.02)
        raise RuntimeError(f"{folder} never came to step {step}")

    def resume_and_compare(self, folder: Path, *more: str) -> str:
        """Resume to the end; what the fault has cost."""
        self.check(self.run(folder, "--resume", *more), 0)
        same_results(self.whole, folder)
        return "nothing: every final file is that of the undisturbed run"

    def reached(self, folder: Path) -> int:
        """The step of the newest checkpoint."""
        places = checkpoints(folder / "checkpoints")
        return read_manifest(places[-1]).step if places else 0


def kills(bench: Bench, count: int, seed: int) -> dict:
    """SIGKILL at random moments from the start of the process on."""
    rng, folder, moments = Random(seed), bench.work / "killed", []
    while len(moments) < count:
        process, moment = bench.start(folder, "--resume"), rng.uniform(0.0, 12.0)
        try:
            code, errors = process.wait(timeout=moment), ""
            if code == 0:  # ended before the kill: the folder goes, so that the next kill strikes again
                process.communicate()
                same_results(bench.whole, folder)
                shutil.rmtree(folder)
                continue
            raise RuntimeError(f"exit code {code}: {process.communicate()[1] or errors}")
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            moments.append({"seconds": round(moment, 2), "checkpoint": bench.reached(folder)})
    lost = bench.resume_and_compare(folder)
    return {"injected": f"{count} times, at random moments (0 to 12 s after the start)", "lost": lost, "kills": moments}


def asked_to_stop(bench: Bench, name: str) -> dict:
    """A signal in the middle of a window."""
    folder, number = bench.work / name, getattr(signal, name)
    process = bench.start(folder)
    bench.wait_for_step(folder, 20)
    process.send_signal(number)
    message = bench.check(bench.wait(process), 128 + number)
    at = bench.reached(folder)
    return {"injected": f"sent after step 20; saved at step {at}, exit code {128 + number}", "message": message,
            "lost": bench.resume_and_compare(folder)}  # fmt: skip


def damaged(bench: Bench) -> dict:
    """The newest checkpoint's state is cut off."""
    folder = shutil.copytree(bench.whole, bench.work / "damaged")
    newest = checkpoints(folder / "checkpoints")[-1]
    os.truncate(newest / "state.pt", 1000)
    lost = bench.resume_and_compare(folder)
    return {"injected": "state.pt of the newest checkpoint cut to 1,000 bytes", "lost": lost}


def full_disk(bench: Bench) -> dict:
    """The system refuses large files while the third checkpoint is written."""
    import resource

    folder = bench.work / "full"
    process = bench.start(folder)
    bench.wait_for_step(folder, 20)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
    message = bench.check(bench.wait(process), 2)
    return {"injected": "after step 20 the system refuses to write files above 50 kB", "message": message,
            "lost": bench.resume_and_compare(folder)}  # fmt: skip


def out_of_memory(bench: Bench) -> dict:
    """A tensor that fits into no memory, in the middle of a step."""
    folder = bench.work / "memory"
    message = bench.check(bench.wait(bench.start(folder, program=("-c", OUT_OF_MEMORY, "main.py"))), 2)
    at = bench.reached(folder)
    return {"injected": f"in the second micro-batch of step 25; saved at step {at}", "message": message,
            "lost": bench.resume_and_compare(folder)}  # fmt: skip


def vanished_image(bench: Bench) -> dict:
    """Images of one domain go away in the middle of a run that must read them again."""
    folder, images = bench.work / "vanished", bench.data / "images" / "dice"
    process = bench.start(folder, program=("-c", FORGETFUL, "main.py"))
    bench.wait_for_step(folder, 20)
    hidden = images.rename(images.with_name("hidden"))
    message = bench.check(bench.wait(process), 2)
    hidden.rename(images)
    return {"injected": "a folder of images renamed after step 20", "message": message,
            "lost": bench.resume_and_compare(folder)}  # fmt: skip


def not_finite(bench: Bench) -> dict:
    """A row with a letter whose embedding is damaged, in the backbone and in that row alone."""
    folder, backbone = bench.work / "nonfinite", shutil.copytree(bench.backbone, bench.work / "backbone")
    tensors = load_file(backbone / "model.safetensors")
    (name,) = [name for name in tensors if "embed_tokens" in name]
    tensors[name][AutoTokenizer.from_pretrained(backbone).convert_tokens_to_ids("Z")] = float("nan")
    save_file(tensors, backbone / "model.safetensors", metadata={"format": "pt"})
    rows = json.loads((bench.data / "train.json").read_text())
    assert not any("Z" in row["input"] + row["add"] for row in rows)
    rows[4]["add"] += " Z"  # the last step of a chain
    (bench.data / "odd.json").write_text(json.dumps(rows))
    flags = ("--train_json_file", str(bench.data / "odd.json"), "--reward_model", str(backbone))
    message = bench.check(bench.run(folder, *flags), 2)
    (found,) = (folder / "diagnostics").iterdir()
    at = bench.reached(folder)
    bench.check(bench.run(folder, *flags, "--resume", "--max_skipped_steps", "99"), 0)
    return {"injected": "a NaN in the embedding of a letter that stands in one row", "message": message[:400],
            "diagnostic": json.loads(found.read_text())["losses"],
            "lost": f"nothing: rows named, no parameter touched, saved at step {at}, resumed to the end"}  # fmt: skip


def second_run(bench: Bench) -> dict:
    """A second run into the folder of one that still runs."""
    folder = bench.work / "shared"
    process = bench.start(folder)
    bench.wait_for_step(folder, 20)
    message = bench.check(bench.run(folder), 2)
    bench.check(bench.wait(process), 0)
    same_results(bench.whole, folder)
    return {"injected": "a second run started into the same folder", "message": message,
            "lost": "nothing: the second ends, the first continues undisturbed"}  # fmt: skip


def bad_row(bench: Bench) -> dict:
    """A bad value in the last row of the training file."""
    rows = json.loads((bench.data / "train.json").read_text())
    rows[-1]["accuracy"] = "high"
    (bench.data / "bad.json").write_text(json.dumps(rows))
    message = bench.check(bench.run(bench.work / "bad", "--train_json_file", str(bench.data / "bad.json")), 2)
    return {"injected": "accuracy \"high\" in the last row", "message": message,
            "lost": "nothing: found before a model is loaded"}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/tmp/faults"), help="data and runs; emptied first")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1, help="of the moments of the kills")
    args = parser.parse_args()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup the runs would inherit that it is ignored
    bench = Bench(args.work)
    faults: dict[str, Callable[[], dict]] = {
        "kill -9": lambda: kills(bench, args.kills, args.seed),
        **{name: (lambda name=name: asked_to_stop(bench, name)) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")},
        "damaged checkpoint": lambda: damaged(bench),
        "full disk": lambda: full_disk(bench),
        "memory runs out": lambda: out_of_memory(bench),
        "images that vanish": lambda: vanished_image(bench),
        "loss that is no number": lambda: not_finite(bench),
        "two runs in a folder": lambda: second_run(bench),
        "bad row": lambda: bad_row(bench),
    }
    table = {}
    for name, inject in faults.items():
        table[name] = inject()
        print(f"{name}: {table[name]['injected']}; lost {table[name]['lost']}", flush=True)
    print(write_results("faults", {"steps": history(bench.whole)[-1]["step"], "seed": args.seed, "faults": table}))


if __name__ == "__main__":
    main()
