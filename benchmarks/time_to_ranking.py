"""How long until the weights rank the demo's domains rightly, and keep doing so: the command against stock Betty.

    python benchmarks/time_to_ranking.py        # an hour and a half

Rightly: Spearman with the domains' true quality of at least 0.8, and never below it again. Each case is a process of
its own with one thread, and seconds are its processor's: what it takes alone on a core, whatever else goes on. Stock
Betty (`stock_betty.py`) is given LONGER times what the command took. It takes both of two learning rates of the
weights: the published one and the command's.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

from common import ROOT, write_results
from scipy.stats import spearmanr

DATA = ROOT / "data"
ENOUGH, LONGER = 0.8, 12
CASES = {"ours": None, "stock, meta lr 0.01": 0.01, "stock, meta lr 0.2": 0.2}


class Course:
    """Notes the ranking after each update of the weights. Stands in for the signals that a run looks for."""

    def __init__(self, engine, domains: list[str]):
        quality = json.loads((DATA / "quality.json").read_text())
        self.engine, self.quality = engine, [quality[domain] for domain in domains]
        self.points: list[tuple[float, float]] = []  # processor seconds, Spearman
        self.updates, self.started = 0, time.process_time()

    @property
    def received(self) -> None:
        """Called after each step; there is never a signal."""
        if self.engine.upper.count > self.updates:
            self.updates = self.engine.upper.count
            weights = self.engine.lower.upper.module().tolist()
            self.points.append((time.process_time() - self.started, float(spearmanr(weights, self.quality).statistic)))


def ours(seed: int) -> Course:
    """The command with its defaults, but the rule of stock Betty's course: AdamW."""
    from reweighting.config.training import TrainingConfig
    from reweighting.main import build_engine
    from reweighting.training.resume import run_settings
    from reweighting.training.run_data import read_run_data

    with TemporaryDirectory() as folder:
        config = TrainingConfig.parse(["--train_json_file", str(DATA / "train.json"), "--meta_json_file",
                                str(DATA / "meta.json"), "--weights_path", folder, "--seed", str(seed),
                                "--meta_optimizer", "adamw"])  # fmt: skip
        engine = build_engine(config, run_settings(config), read_run_data(config), Path(folder))
        engine.save = lambda **_: None
        course = Course(engine, engine.domains)
        engine.run(course)
    return course


def stock(seed: int, meta_lr: float, seconds: float) -> Course:
    """Betty as it comes, for so many processor seconds."""
    from stock_betty import stock

    engine = stock(str(ROOT / "backbone"), DATA, 1, 10**9, seed=seed, meta_lr=meta_lr)
    engine.train()
    course = Course(engine, engine.domains)
    while time.process_time() - course.started < seconds:
        engine.global_step += 1
        engine.train_step()
        course.received  # noqa: B018
    return course


def time_to(points: list[tuple[float, float]]) -> float | None:
    """Seconds from which on the ranking is right; None if it is not at the end."""
    wrong = [number for number, (_, rho) in enumerate(points) if not rho >= ENOUGH]
    first = wrong[-1] + 1 if wrong else 0
    return points[first][0] if first < len(points) else None


def run(case: str, seed: int, seconds: float) -> list[tuple[float, float]]:
    """A case in a process of its own."""
    command = [sys.executable, __file__, "--child", case, str(seed), str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(f"{case}: {done.stderr[-3000:]}")
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--parallel", type=int, default=2)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        case, seed, seconds = args.child
        course = ours(int(seed)) if case == "ours" else stock(int(seed), CASES[case], float(seconds))
        print("RESULT " + json.dumps(course.points))
        return
    found = {}
    with ThreadPoolExecutor(args.parallel) as pool:
        courses = dict(zip(args.seeds, pool.map(lambda seed: run("ours", seed, 0), args.seeds), strict=True))
        ours_took = {seed: time_to(points) for seed, points in courses.items()}
        print("ours:", ours_took, flush=True)
        found["ours"] = courses
        limit = LONGER * statistics.median(ours_took.values())
        jobs = [(case, seed) for case in CASES if case != "ours" for seed in args.seeds]
        for (case, seed), points in zip(jobs, pool.map(lambda job: run(*job, limit), jobs), strict=True):
            found.setdefault(case, {})[seed] = points
            print(f"{case}, seed {seed}: {time_to(points)}, at the end {points[-1]}", flush=True)
    summary = {
        case: {
            seed: {"seconds": time_to(points), "updates": len(points), "given": points[-1][0], "last": points[-1][1],
                   "best": max(rho for _, rho in points)}
            for seed, points in runs.items()
        }
        for case, runs in found.items()
    }  # fmt: skip
    print(json.dumps(summary, indent=1))
    thinned = {case: {seed: points[:: max(1, len(points) // 100)] for seed, points in runs.items()}
               for case, runs in found.items()}  # fmt: skip
    print(write_results("time_to_ranking", {"enough": ENOUGH, "cases": summary, "courses": thinned}))


if __name__ == "__main__":
    main()
