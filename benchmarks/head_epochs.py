"""What `--train head` saves by remembering step states: seconds of each epoch of the demo, with and without.

    python benchmarks/head_epochs.py

The same run in turns: with the states of the backbone remembered, and with a pass of the backbone over every batch. One
thread. The embedded backbone has 1.1 M parameters: with a larger one, the first epoch takes more and the others do not.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

from common import learned_weights, make_data, write_results

STEPS, EPOCHS, BATCH = 20, 4, 16  # of a window, which is an epoch: two micro-batches a step


def one_run(output: str, data: str, remembered: bool) -> None:
    """The run, in a process of its own."""
    from reweighting.main import main as command
    from reweighting.training import build

    flags = ["--train_json_file", f"{data}/train.json", "--meta_json_file", f"{data}/meta.json", "--train", "head"]
    flags += ["--weights_path", output, "--unroll_steps", str(STEPS), "--iteration_num", str(STEPS * EPOCHS)]
    flags += ["--batch_size", str(BATCH), "--score_head", "mlp"]
    states = build.StepStates if remembered else lambda *_: None
    with patch.object(build, "StepStates", states):
        command(flags)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=3200, help="training rows")
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)  # of a process of its own
    args = parser.parse_args()
    if args.case:
        one_run(args.case[0], args.case[1], args.case[2] == "remembered")
        return
    results = {}
    with TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        make_data(data, 1, "--train_rows", str(args.rows), "--meta_rows", "64", "--test_questions", "1")
        for name in ("remembered", "every batch", "remembered again", "every batch again"):
            output = Path(folder) / name
            case = [str(output), str(data), name.removesuffix(" again")]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            subprocess.run([sys.executable, __file__, "--case", *case], check=True, env=environment)
            lines = [json.loads(line) for line in (output / "history.jsonl").read_text().splitlines()]
            ends = [0.0, *(line["seconds"] for line in lines)]
            seconds = [round(after - before, 2) for before, after in zip(ends, ends[1:], strict=False)]
            results[name] = {
                "seconds": seconds,
                "rows_seen": lines[-1]["rows_seen"],
                "weights": learned_weights(output),
            }
            print(name, seconds, flush=True)
    print(write_results("head_epochs", {"rows": args.rows, "steps": STEPS, "batch": BATCH, "cases": results}))


if __name__ == "__main__":
    main()
