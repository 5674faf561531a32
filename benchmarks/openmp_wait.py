"""How OpenMP threads that wait change the training time, on an idle machine and where one core is busy otherwise.

    python benchmarks/openmp_wait.py            # an hour on two cores; nothing else should run

By default a waiting thread spins for a while before it sleeps, and is awake at once. Where a core is taken, the others
spin until the thread on that core gets its turn, and take its time. OMP_WAIT_POLICY=PASSIVE lets them sleep at once.
The commands set it where they find a busy core as they start, unless the user has set a policy. `default` here is
training without any policy, `passive` with this one, `command` as the command decides. The cases take turns; the time
is that of training steps alone, after 20 steps to warm up.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from common import ROOT, make_data, write_results

POLICIES = ("default", "passive", "command")
WARM_UP = 20  # steps; the run writes its history every 20
BUSY = "while True: pass"
COMMAND = [str(ROOT / "reweighting" / "main.py")]
# Past `entrypoint.py`, which would decide.
TRAIN = ["-c", "import sys; from reweighting.main import main; main(sys.argv[1:])"]


def step_seconds(data: Path, output: Path, policy: str, steps: int, seed: int) -> float:
    """Seconds of one optimizer step of a `--baseline` run on all cores, the mean over `steps` after the warm-up."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    for name in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "GOMP_SPINCOUNT"):
        environment.pop(name, None)
    if policy == "passive":
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
    flags = ["--baseline", "--iteration_num", str(WARM_UP + steps), "--seed", str(seed), "--device", "cpu"]
    files = ["--train_json_file", str(data / "train.json"), "--weights_path", str(output)]
    start = COMMAND if policy == "command" else TRAIN
    subprocess.run([sys.executable, *start, *files, *flags], env=environment, check=True, capture_output=True)
    lines = [json.loads(line) for line in (output / "history.jsonl").read_text().splitlines()]
    seconds = {line["step"]: line["seconds"] for line in lines}
    return (seconds[WARM_UP + steps] - seconds[WARM_UP]) / steps


def measure(data: Path, work: Path, rounds: int, steps: dict[str, int]) -> dict[str, dict[str, list[float]]]:
    """{idle or busy: {policy: seconds of a step in each round}}; the order of the policies changes each round."""
    seconds = {load: {policy: [] for policy in POLICIES} for load in steps}
    for number in range(rounds):
        for load, count in steps.items():
            for policy in POLICIES[number % 3 :] + POLICIES[: number % 3]:
                busy = subprocess.Popen([sys.executable, "-c", BUSY]) if load == "busy" else None
                try:
                    output = work / f"{load}-{policy}-{number}"
                    seconds[load][policy].append(step_seconds(data, output, policy, count, seed=number + 1))
                finally:
                    if busy is not None:
                        busy.kill()
                        busy.wait()
                print(f"round {number + 1}, {load}, {policy}: {seconds[load][policy][-1]:.4f} s a step", flush=True)
    return seconds


def main() -> None:
    """Measure all cases in turn and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="runs of each case, with the seeds 1, 2, …")
    parser.add_argument("--idle_steps", type=int, default=200, help="measured steps on the idle machine; times 20")
    parser.add_argument("--busy_steps", type=int, default=20, help="measured steps with a busy core; times 20")
    parser.add_argument("--name", default="openmp_wait", help="name of the result file")
    args = parser.parse_args()
    began = time.monotonic()
    with TemporaryDirectory() as folder:
        work = Path(folder)
        make_data(work / "data", 1)
        seconds = measure(work / "data", work, args.rounds, {"idle": args.idle_steps, "busy": args.busy_steps})
    over_default = {
        load: {policy: statistics.median(by[policy]) / statistics.median(by["default"]) for policy in POLICIES[1:]}
        for load, by in seconds.items()
    }
    summary = {
        "seeds": list(range(1, args.rounds + 1)),
        "measured_steps": {"idle": args.idle_steps, "busy": args.busy_steps},
        "seconds_per_step": seconds,
        "median_over_default": over_default,
        "minutes": round((time.monotonic() - began) / 60, 1),
    }
    print(f"over default (the command on an idle machine: at most 1.03 is wanted): {over_default}")
    print(write_results(args.name, summary))


if __name__ == "__main__":
    main()
