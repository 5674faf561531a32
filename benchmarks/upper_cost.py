"""What the upper level costs: weights of domains, of chains too, and how sure they are.

    python benchmarks/upper_cost.py            # ten minutes on an idle core

Each case trains on the shipped demo in this process, on one thread; the cases take turns by windows. Processor seconds
of a window's steps and of the update behind it count: not the start, not the images, which are read beforehand, and no
checkpoint.

Uncertainty cannot be switched off. Its cost is the time in the methods that gather the windows' slopes and turn them
into errors and verdicts, against the rest of the same run; and once, at the end of a run, what the tables and the
figure of the slopes take.
"""

import argparse
import contextlib
import io
import json
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from common import ROOT, use_one_thread, write_results
from stopwatch import Stopwatch

from reweighting.bilevel.evidence import SlopeEvidence
from reweighting.bilevel.instance_evidence import InstanceEvidence
from reweighting.config.training import TrainingConfig
from reweighting.main import build_engine
from reweighting.plots import draw_slopes
from reweighting.training.engine import ReweightingEngine
from reweighting.training.results import summarize_evidence
from reweighting.training.resume import run_settings
from reweighting.training.run_data import read_run_data

CALM, ADAMW, BOTH = ("--meta_optimizer", "calm"), ("--meta_optimizer", "adamw"), ("--weights_for", "both")
CASES = {
    "no upper level": ("--baseline",),
    "domain, adamw": ADAMW,
    "domain, calm": CALM,
    "both, finite_difference": (*BOTH, *CALM, "--hypergradient", "finite_difference"),  # what `auto` takes here
    "both, jvp": (*BOTH, *CALM, "--hypergradient", "jvp"),
}
REFERENCE = "domain, calm"
WINDOW = 20  # optimizer steps, the default
EVIDENCE = {SlopeEvidence: ("add", "slopes", "state_dict"), InstanceEvidence: ("add", "true_slopes", "state_dict")}


def make_engine(flags: tuple[str, ...], steps: int, seed: int, folder: Path) -> ReweightingEngine:
    """An engine that can make so many steps, which writes no checkpoint."""
    files = ["--train_json_file", str(ROOT / "data" / "train.json")]
    if "--baseline" not in flags:
        files += ["--meta_json_file", str(ROOT / "data" / "meta.json")]
    same = ["--weights_path", str(folder), "--seed", str(seed), "--iteration_num", str(steps), "--device", "cpu"]
    config = TrainingConfig.parse([*files, *same, *flags])
    engine = build_engine(config, run_settings(config), read_run_data(config), folder)
    engine.save = lambda **_: None
    return engine


def window(engine: ReweightingEngine, number: int, evidence: Stopwatch) -> dict[str, float]:
    """Make the steps of a window (from 0) and the update; the processor seconds, and those of the evidence in them."""
    lower, steps = engine.lower, engine.lower.config.unroll_steps
    for micro_step in range(number * steps * lower.gas, (number + 1) * steps * lower.gas):
        lower.fetch_batch(micro_step)  # its images are remembered
    if engine.reweights:
        engine.upper.fetch_batch(number)
    engine.train_iters = (number + 1) * steps
    evidence.seconds.clear()
    started = time.process_time()
    with contextlib.redirect_stderr(io.StringIO()):
        engine.run()
    return {"seconds": time.process_time() - started, "evidence_seconds": evidence.seconds["evidence"]}


def end_seconds(engine: ReweightingEngine, folder: Path) -> float:
    """What the tables and the figure of the slopes take at the end of a run."""
    started = time.process_time()
    draw_slopes(summarize_evidence(engine.upper, engine.domains)["domains"], folder / "slopes.png")
    return time.process_time() - started


def summary(runs: dict[str, list[dict]]) -> dict:
    """Of each case: seconds of a window, and ratios to the reference, window by window: median, least and largest."""
    table = {}
    for case, windows in runs.items():
        ratios = [one["seconds"] / domain["seconds"] for one, domain in zip(windows, runs[REFERENCE], strict=True)]
        shares = [one["evidence_seconds"] / (one["seconds"] - one["evidence_seconds"]) for one in windows]
        table[case] = {
            "seconds_of_a_window": round(statistics.median(one["seconds"] for one in windows), 2),
            "times_domain_weights": [round(one, 3) for one in (statistics.median(ratios), min(ratios), max(ratios))],
            "largest_share_of_evidence": round(max(shares), 6),
        }
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=3, help="of twenty steps, of each case")
    parser.add_argument("--seed", type=int, default=5)
    flags = parser.parse_args()
    use_one_thread()
    evidence = Stopwatch(time.process_time)
    for owner, names in EVIDENCE.items():
        for name in names:
            evidence.watch(owner, name, "evidence")
    runs: dict[str, list[dict]] = {case: [] for case in CASES}
    with TemporaryDirectory() as name:
        folders = {case: Path(name) / str(number) for number, case in enumerate(CASES)}
        engines = {}
        for case, more in CASES.items():
            folders[case].mkdir()
            engines[case] = make_engine(more, flags.windows * WINDOW, flags.seed, folders[case])
        for number in range(flags.windows):
            for case, engine in engines.items():
                runs[case].append(window(engine, number, evidence))
                print(case, json.dumps(runs[case][-1]), flush=True)
            at_the_end = end_seconds(engines[REFERENCE], folders[REFERENCE])
            result = {"evidence_seconds_at_the_end": at_the_end, "cases": summary(runs), "windows": runs}
            print(write_results("upper_cost", {"seed": flags.seed, "threads": torch.get_num_threads(), **result}))
    print(json.dumps(result["cases"], indent=1))


if __name__ == "__main__":
    main()
