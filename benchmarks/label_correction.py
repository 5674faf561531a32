"""Do corrected labels come nearer to the true chance than Monte Carlo labels of few rollouts?

    python benchmarks/label_correction.py --work /tmp/label_correction     # resumable: finished runs are not repeated

A demo world (seed 31) whose domains are all clean, with labels of 4 rollouts. The simulated policy knows each step's
chance that a rollout ends correct, `Policy.chance`. Head-only runs of 600 steps with equal domain weights, seeds 1, 2,
…, correct the labels; the states of the backbone are computed once for all of them. Given are the errors of the labels
that may move, before and after, overall and by the label, and the correlation of the moves with what the labels are off
by.
"""

import argparse
import json
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow.parquet
from common import ROOT, read_results, train, use_one_thread, write_results

sys.path.insert(0, str(ROOT / "data"))
import make_demo  # noqa: E402
from demo_world.solutions import Policy  # noqa: E402

TIMES, WORLD = 4, 31
SAME = ("--train", "head", "--lr", "1e-3", "--min_weight", "1", "--max_weight", "1")
ADAMW = ("--meta_optimizer", "adamw")
RULES = {
    "interval": ("--correct_labels", "interval", *ADAMW),
    "interval, calm": ("--correct_labels", "interval"),
    "published": ("--correct_labels", "published", *ADAMW),
}


class RecordingPolicy(Policy):
    """Notes each chance that a label is drawn from, in the order of the training rows."""

    def __init__(self):
        self.chances: list[float] = []

    def chance(self, *args) -> float:
        self.chances.append(super().chance(*args))
        return self.chances[-1]


def make_world(folder: Path, rows: int) -> None:
    """The world, and `chances.json`: the true chance of each training row."""
    if (folder / "chances.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    policy = RecordingPolicy()
    with patch.object(make_demo, "TIMES", TIMES), patch.object(make_demo, "policy", policy):
        make_demo.make_demo(folder, WORLD, dict.fromkeys(make_demo.QUALITY, 1.0), rows, 300, 1, 2)
    if len(policy.chances) != rows:
        raise RuntimeError(f"{len(policy.chances)} chances for {rows} rows: give a multiple of 100 rows")
    (folder / "chances.json").write_text(json.dumps(policy.chances))


def errors(folder: Path, output: Path) -> dict[str, float]:
    """How far a run's labels are from the true chances, before and after."""
    table = pyarrow.parquet.read_table(output / "corrected_labels.parquet").to_pydict()
    chances = np.array(json.loads((folder / "chances.json").read_text()))[table["row"]]
    label, corrected, low, high = (np.array(table[name]) for name in ("label", "corrected_label", "low", "high"))
    free = low < high
    before, after, move = (label - chances)[free], (corrected - chances)[free], (corrected - label)[free]
    kinds = {"0": label[free] == 0, "between": (label[free] > 0) & (label[free] < 1), "1": label[free] == 1}
    return {
        "by_label": {
            name: {
                "labels": int(own.sum()),
                "rms_before": float(np.sqrt(np.mean(before[own] ** 2))),
                "rms_after": float(np.sqrt(np.mean(after[own] ** 2))),
                "correlation_with_chance": float(np.corrcoef(move[own], chances[free][own])[0, 1]),
            }
            for name, own in kinds.items()
        },
        "labels": int(free.sum()),
        "rms_before": float(np.sqrt(np.mean(before**2))),
        "rms_after": float(np.sqrt(np.mean(after**2))),
        "mean_before": float(np.abs(before).mean()),
        "mean_after": float(np.abs(after).mean()),
        "moved": float(np.mean(move != 0)),
        "mean_move": float(np.abs(move).mean()),
        "nearer_of_moved": float(np.mean(np.abs(after) < np.abs(before), where=move != 0)),
        "correlation": float(np.corrcoef(move, -before)[0, 1]) if move.any() else 0.0,
        "best_multiple": float(-(move @ before) / (move @ move)) if move.any() else 0.0,  # of the moves
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/tmp/label_correction"), help="runs and made data")
    parser.add_argument("--rows", type=int, default=3000, help="training rows")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    args = parser.parse_args()
    use_one_thread()
    world, found = args.work / "world", read_results("label_correction")
    make_world(world, args.rows)
    states = ("--step_states_dir", str(args.work / "states"))
    for seed in args.seeds:
        for rule in args.rules:
            output = args.work / f"{rule.replace(', ', '-')}-{seed}"
            train(world, output, seed, *SAME, *states, *RULES[rule])
            found.setdefault(rule, {})[str(seed)] = result = errors(world, output)
            print(rule, seed, json.dumps(result), flush=True)
            write_results("label_correction", found | {"rows": args.rows, "times": TIMES})


if __name__ == "__main__":
    main()
