"""How the two rules (`--meta_optimizer calm`, `adamw`) and the verdicts do, where domains differ and where they do not.

    python benchmarks/calm_weights.py --work /tmp/calm_weights        # resumable: finished runs are not repeated

Cases, each a run of the command for 600 steps unless it says otherwise:

    alike    worlds in which all ten domains are equally clean: spread of the weights, share of domains with a verdict
    names    150 rows of one domain under four names, 400 steps: nothing to be found
    worlds   other worlds, with the qualities dealt anew: Spearman with the true quality, verdicts
    long     the shipped demo for 2,400 steps against 600: weights outside each other's interval

`--cases`, `--seeds` and `--rules` choose; what has been measured before stays in the result.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from common import (
    ROOT,
    agreement,
    learned_weights,
    make_data,
    make_reassigned,
    read_results,
    train,
    use_one_thread,
    verdicts,
    write_results,
)

DATA = ROOT / "data"
RULES = {rule: ("--meta_optimizer", rule) for rule in ("calm", "adamw")}


def worlds(work: Path, rule: str, seed: int) -> dict:
    """A run in a world with other data and the qualities dealt anew: world 11 for seed 1, 12 for seed 2, …"""
    world = 10 + seed
    data, output = work / f"world-{world}", work / f"reassigned-{rule}-{seed}"
    quality = make_reassigned(data, world)
    train(data, output, seed, *RULES[rule])
    weights = learned_weights(output)
    return {
        "world": world,
        **agreement(weights, quality),
        "weights": weights,
        "verdicts": verdicts(output),
        "quality": quality,
    }


def alike(work: Path, rule: str, seed: int) -> dict:
    """A run in a world of clean domains; seeds in turn take world 31 and 32."""
    world = 31 if seed % 2 else 32
    data, output = work / f"world-{world}", work / f"alike-{rule}-{seed}"
    clean = [f"{domain}=1" for domain in json.loads((DATA / "quality.json").read_text())]
    make_data(data, world, "--quality", *clean)
    train(data, output, seed, *RULES[rule])
    return {"world": world} | spread(output)


def names(work: Path, rule: str, seed: int) -> dict:
    """A run on one domain's rows under four names."""
    folder, output = work / "names", work / f"names-{rule}-{seed}"
    if not (folder / "meta.json").exists():
        folder.mkdir(parents=True)
        rows = [row for row in json.loads((DATA / "train.json").read_text()) if row["dataset"] == "dice"][:150]
        rows = [row | {"dataset": name, "id": f"{name}-{row['id']}"} for name in "abcd" for row in rows]
        (folder / "train.json").write_text(json.dumps(rows))
        (folder / "meta.json").write_bytes((DATA / "meta.json").read_bytes())
    flags = ("--image_root", str(DATA), "--iteration_num", "400")
    train(folder, output, seed, *flags, *RULES[rule])
    return spread(output)


def spread(output: Path) -> dict:
    """How far the weights of alike domains are apart, and which verdicts are chance."""
    weights, found = learned_weights(output), verdicts(output)
    with_verdict = np.mean([verdict != "cannot be told" for verdict in found.values()])
    return {"sd": float(np.std(list(weights.values()))), "share_with_verdict": float(with_verdict), "weights": weights}


def long(work: Path, rule: str, seed: int) -> dict:
    """A long run on the shipped demo against the short one."""
    short, output = work / f"demo-{rule}-{seed}", work / f"long-{rule}-{seed}"
    train(DATA, short, seed, *RULES[rule])
    train(DATA, output, seed, "--iteration_num", "2400", *RULES[rule])
    result = {
        "weights": learned_weights(output),
        "weights_at_600": learned_weights(short),
        "verdicts": verdicts(output),
    }
    if rule == "calm":
        ends = [json.loads((folder / "domain_weights.json").read_text())["evidence"] for folder in (short, output)]
        result["outside_each_other"] = [
            name
            for name, weight in result["weights"].items()
            if not _inside(weight, ends[0], name) and not _inside(result["weights_at_600"][name], ends[1], name)
        ]
    return result


def _inside(weight: float, evidence: dict, name: str) -> bool:
    low, high = evidence["domains"][name]["weight_interval"]
    return low <= weight <= high


CASES = {case.__name__: case for case in (worlds, alike, names, long)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/tmp/calm_weights"), help="runs and made data")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    use_one_thread()
    found = read_results("calm_weights")
    for case in args.cases:
        for seed in args.seeds:
            for rule in args.rules:
                result = CASES[case](args.work, rule, seed)
                found.setdefault(case, {}).setdefault(rule, {})[str(seed)] = result
                print(case, rule, seed, json.dumps(result), flush=True)
                write_results("calm_weights", found)


if __name__ == "__main__":
    main()
