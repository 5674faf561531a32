"""Does reweighting find the good domains, and does it pay? The tables of the README.

    python benchmarks/demo_runs.py --work /tmp/demo_runs        # resumable: finished runs are not repeated

`shipped`: the demo data as shipped, five training seeds, three methods on the same rows for the same steps: equal
weights (`--baseline`), learned weights, and weights proportional to the true quality (what perfect knowledge would
give, the ceiling). `reassigned`: five other demo worlds, each with other data and the qualities dealt anew among the
domains; learned weights only.
"""

import argparse
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import numpy as np
from common import (
    ROOT,
    ProcessRewardModel,
    agreement,
    best_of,
    learned_weights,
    make_data,
    share_cores,
    step_auc,
    train,
    write_results,
)


def evaluate(data: Path, output: Path, seed: int, *flags: str) -> dict:
    """Train one model (unless that is done) and score it; everything that the tables need."""
    scored = output / "scores.json"
    if not scored.exists():
        seconds = train(data, output, seed, *flags)
        model = ProcessRewardModel.from_pretrained(output / "prm")
        scores = {"seconds": seconds, "auc": step_auc(model), **best_of(model, data)}
        scored.write_text(json.dumps(scores))
    return json.loads(scored.read_text())


def oracle_weights(data: Path, folder: Path) -> Path:
    """A file of weights proportional to the true quality."""
    path = folder / "oracle.json"
    path.write_text((data / "quality.json").read_text())
    return path


def summary(values: list[float]) -> dict[str, float]:
    """Mean and standard deviation over seeds."""
    return {"mean": round(float(np.mean(values)), 4), "sd": round(float(np.std(values, ddof=1)), 4)}


def shipped(work: Path, seeds: list[int], run: Callable) -> dict:
    """The three methods on the shipped demo."""
    data = ROOT / "data"
    quality = json.loads((data / "quality.json").read_text())
    oracle = str(oracle_weights(data, work))
    methods = {"baseline": ("--baseline",), "learned": (), "true qualities": ("--domain_weights", oracle)}
    jobs = [(method, seed) for seed in seeds for method in methods]
    folders = {job: work / f"shipped-{job[0].replace(' ', '_')}-{job[1]}" for job in jobs}
    found = dict(zip(jobs, run(lambda job: evaluate(data, folders[job], job[1], *methods[job[0]]), jobs), strict=True))
    table = {}
    for method in methods:
        rows = [found[method, seed] for seed in seeds]
        table[method] = {name: summary([row[name] for row in rows]) for name in rows[0] if name != "auc"} | {
            f"auc_{name}": summary([row["auc"][name] for row in rows]) for name in rows[0]["auc"]
        }
    weights = {seed: learned_weights(folders["learned", seed]) for seed in seeds}
    ranking = {seed: agreement(weights[seed], quality) for seed in seeds}
    gains = {m: table[m]["best_of_8"]["mean"] - table["baseline"]["best_of_8"]["mean"] for m in methods}
    return {
        "seeds": seeds,
        "methods": table,
        "gain_of_learned_in_points": round(100 * gains["learned"], 2),
        "share_of_the_true_qualities_gain": round(gains["learned"] / gains["true qualities"], 3),
        "ranking": ranking,
        "weights": weights,
        "quality": quality,
        "per_seed": {f"{method} {seed}": found[method, seed] for method, seed in jobs},
    }


def reassigned(work: Path, seeds: list[int], run: Callable) -> dict:
    """Learned weights against quality in other worlds."""
    base = json.loads((ROOT / "data" / "quality.json").read_text())

    def one(seed: int) -> dict:
        values = list(base.values())
        Random(seed).shuffle(values)
        quality = dict(zip(base, values, strict=True))
        data, output = work / f"world-{seed}", work / f"reassigned-{seed}"
        make_data(data, seed, quality)
        seconds = train(data, output, seed)
        weights = learned_weights(output)
        return {"seconds": seconds, **agreement(weights, quality), "weights": weights, "quality": quality}

    found = dict(zip(seeds, run(one, seeds), strict=True))
    names = ("spearman", "better_half_auc")
    return {"worlds": found, **{name: summary([row[name] for row in found.values()]) for name in names}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/tmp/demo_runs"), help="runs and made data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="of the shipped demo's runs")
    parser.add_argument("--worlds", type=int, nargs="+", default=[11, 12, 13, 14, 15], help="of the other worlds")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time (wall times are then not comparable)")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    share_cores(args.parallel)
    with ThreadPoolExecutor(args.parallel) as pool:
        content = {
            "parallel": args.parallel,
            "reassigned": reassigned(args.work, args.worlds, pool.map),
            "shipped": shipped(args.work, args.seeds, pool.map),
        }
    print(json.dumps({k: v for k, v in content["shipped"].items() if k not in ("per_seed", "weights")}, indent=1))
    print(json.dumps({k: v for k, v in content["reassigned"].items() if k != "worlds"}, indent=1))
    print(write_results("demo_runs", content))


if __name__ == "__main__":
    main()
