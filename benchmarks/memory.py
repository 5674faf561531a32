"""Does a run's memory stay flat? Resident memory over 2,000 steps and the slope of a line through it.

python benchmarks/memory.py
"""

import argparse
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from common import make_data, write_results

from reweighting import main as command
from reweighting.training.signals import StopSignals

EVERY, WARM_UP = 20, 400  # steps between two samples; steps that do not count: caches and allocators fill up


class Watch(StopSignals):
    """Notes the resident memory in MB now and then, where a run looks for signals."""

    samples: list[tuple[int, float]] = []
    steps = 0

    @property
    def received(self) -> None:
        Watch.steps += 1
        if Watch.steps % EVERY == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            Watch.samples.append((Watch.steps, pages * os.sysconf("SC_PAGE_SIZE") / 1e6))

    @received.setter
    def received(self, value) -> None:
        """There is never a signal."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args()
    command.StopSignals = Watch
    with TemporaryDirectory() as name:
        folder = Path(name)
        make_data(folder / "data", 1, "--train_rows", "1000", "--meta_rows", "60", "--test_questions", "4")
        data = [f"--{kind}_json_file={folder / 'data' / kind}.json" for kind in ("train", "meta")]
        command.main(
            [
                *data,
                "--weights_path",
                str(folder / "run"),
                "--iteration_num",
                str(args.steps),
                "--batch_size",
                "2",
                "--meta_batch_size",
                "8",
                "--save_every_iterations",
                "100",
            ]
        )
    step, memory = np.array([sample for sample in Watch.samples if sample[0] > WARM_UP]).T
    slope = np.polyfit(step, memory, 1)[0] * 1000
    result = {
        "steps": args.steps,
        "warm_up": WARM_UP,
        "slope_mb_per_1000_steps": round(float(slope), 3),
        "mean_mb": round(float(memory.mean()), 1),
        "least_mb": round(float(memory.min()), 1),
        "most_mb": round(float(memory.max()), 1),
        "samples": [(step, round(memory, 1)) for step, memory in Watch.samples],
    }
    print({name: value for name, value in result.items() if name != "samples"})
    print(write_results("memory", result))


if __name__ == "__main__":
    main()
