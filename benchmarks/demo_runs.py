"""Does reweighting find the good domains, and does it pay? The tables of README and docs/demo.md.

    python benchmarks/demo_runs.py --work /tmp/demo_runs        # resumable: finished runs are not repeated

The demo data as shipped, five training seeds, each method on the same rows for the same steps. Methods that `--methods`
leaves out stay in the result as they are, if data and seeds are the same. `calm_weights.py` has other worlds.
"""

import argparse
import json
import math
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from chain_selection import balanced_information, first_share, share_of_each_domain
from common import (
    ROOT,
    ProcessRewardModel,
    agreement,
    auc,
    best_of,
    learned_weights,
    read_results,
    share_cores,
    step_auc,
    train,
    verdicts,
    write_results,
)

from reweighting.data.chains import meta_chains, training_chains
from reweighting.data.load_rows import load_meta_rows, load_training_rows
from reweighting.devices import choose_device
from reweighting.files import digest
from reweighting.modeling.aggregation import aggregate


def evaluate(data: Path, output: Path, seed: int, *flags: str) -> dict:
    """Train one model (unless that is done) and score it; everything that the tables need."""
    scored = output / "scores.json"
    if not scored.exists():
        device, seconds = choose_device(None), train(data, output, seed, *flags)
        model = ProcessRewardModel.from_pretrained(output / "prm", device=device)
        scores = {"device": device.type, "auc": step_auc(model), **best_of(model, data)}
        if device.type == "cpu":  # beside a GPU they would say nothing
            scores["processor_seconds"] = seconds
        scored.write_text(json.dumps(scores))
    return json.loads(scored.read_text())


def train_alone(data: Path, work: Path, domain: str) -> Path:
    """The folder of a short run on one domain of some data."""
    folder = work / f"alone-{domain}"
    if not (folder / "train.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        rows = json.loads((data / "train.json").read_text())
        (folder / "train.json").write_text(json.dumps([row for row in rows if row["dataset"] == domain]))
    train(folder, folder / "run", 1, "--baseline", "--iteration_num", "100", "--image_root", str(data))
    return folder / "run"


def best_domains(data: Path, work: Path, run: Callable) -> Path:
    """A file of weights 1 for half of the domains and 0 for the rest: what a careful person would try.

    A PRM is trained on each domain alone, and those domains are kept whose PRM judges the meta answers best (AUC).
    """
    rows = json.loads((data / "train.json").read_text())
    meta, _ = meta_chains(load_meta_rows(data / "meta.json"))

    def score(domain: str) -> float:
        scored = work / f"alone-{domain}" / "auc.json"
        if not scored.exists():
            model = ProcessRewardModel.from_pretrained(train_alone(data, work, domain) / "prm")
            logits = model.chain_logits(meta, batch_size=50)
            scored.write_text(json.dumps(auc(aggregate(*logits).numpy(), [chain.label == 1 for chain in meta])))
        return json.loads(scored.read_text())

    domains = sorted({row["dataset"] for row in rows})
    found = dict(zip(domains, run(score, domains), strict=True))
    kept = sorted(domains, key=found.get)[len(domains) // 2 :]
    path = work / "best_domains.json"
    path.write_text(json.dumps({domain: float(domain in kept) for domain in domains}))
    return path


def chains_of(data: Path) -> list[dict]:
    """The training chains, as `chain_selection.py` takes them."""
    chains, domains = training_chains(load_training_rows(data / "train.json"), "train.json")
    targets = [[None if math.isnan(target) else target for target in chain.targets] for chain in chains]
    return [
        {"dataset": domains[chain.domain], "labels": labels, "chain": chain}
        for chain, labels in zip(chains, targets, strict=True)
    ]


def only(chains: list[dict], data: Path, path: Path) -> tuple[str, ...]:
    """The flags of plain fine-tuning on some of the chains, whose rows are written to `path`."""
    rows, kept = json.loads((data / "train.json").read_text()), sorted(n for one in chains for n in one["chain"].rows)
    path.write_text(json.dumps([rows[number] for number in kept]))
    return "--baseline", "--train_json_file", str(path), "--image_root", str(data)


def most_informative(data: Path, work: Path, share: float) -> tuple[str, ...]:
    """Plain fine-tuning on the chains of each domain with the highest balanced-information score (arXiv 2602.04145)."""
    chains = share_of_each_domain(chains_of(data), share, lambda one: -balanced_information(one["labels"]))
    return only(chains, data, work / f"bis-{share}.json")


def low_loss(data: Path, work: Path, seed: int) -> tuple[str, ...]:
    """Plain fine-tuning on the half of all chains with the lowest loss after 100 steps on all, equally weighted.

    Early in training, chains with wrong labels have a higher loss than others; later they are learned too.
    """
    scored = work / f"early-{seed}" / "losses.json"
    chains = chains_of(data)
    if not scored.exists():
        train(data, scored.parent, seed, "--baseline", "--iteration_num", "100")
        model = ProcessRewardModel.from_pretrained(scored.parent / "prm")
        logits, _ = model.chain_logits([one["chain"] for one in chains], batch_size=50)
        losses = []
        for scores, one in zip(logits.sigmoid().tolist(), chains, strict=True):
            errors = [(s - p) ** 2 for s, p in zip(scores, one["labels"], strict=False) if p is not None]
            losses.append(sum(errors) / len(errors))
        scored.write_text(json.dumps(losses))
    chains = [one | {"loss": loss} for one, loss in zip(chains, json.loads(scored.read_text()), strict=True)]
    return only(first_share(chains, 0.5, lambda one: one["loss"]), data, scored.parent / "kept.json")


# The published settings of both levels (recipes/qwen2_vl_2b.yaml); the batch sizes are ours, for the same budget.
PUBLISHED = (
    *("--no_center_meta_scores", "--hypergradient", "darts", "--unroll_steps", "5"),
    *("--lr", "5e-7", "--weight_decay", "0", "--scheduler", "step"),
    *("--meta_optimizer", "adamw", "--meta_lr", "0.01", "--meta_weight_decay", "1e-3"),
)
ADAMW = ("--meta_optimizer", "adamw")

# Method -> the flags of a run, from the data, the working folder, the seed and what runs jobs in parallel.
METHODS = {
    "equal weights": lambda data, work, seed, run: ("--baseline",),
    "learned weights": lambda data, work, seed, run: (),
    "learned by AdamW": lambda data, work, seed, run: ADAMW,
    "true qualities": lambda data, work, seed, run: ("--domain_weights", str(data / "quality.json")),
    "learned by AdamW, then frozen": lambda data, work, seed, run: (
        "--domain_weights", str(folder_of(work, "learned by AdamW", seed) / "domain_weights.json"),
    ),
    "best domains only": lambda data, work, seed, run: ("--domain_weights", str(best_domains(data, work, run))),
    "meta loss of the last step": lambda data, work, seed, run: (*ADAMW, "--aggregation_function", "last"),
    "Betty's darts": lambda data, work, seed, run: (*ADAMW, "--hypergradient", "darts"),
    "bis_10": lambda data, work, seed, run: most_informative(data, work, 0.1),
    "bis_25": lambda data, work, seed, run: most_informative(data, work, 0.25),
    "loss_filtered": lambda data, work, seed, run: low_loss(data, work, seed),
    "published": lambda data, work, seed, run: PUBLISHED,
}  # fmt: skip


def folder_of(work: Path, method: str, seed: int) -> Path:
    """Where a run of the shipped demo is."""
    return work / f"{re.sub('[^a-z0-9]+', '_', method.lower())}-{seed}"


def summary(values: list[float]) -> dict[str, float]:
    """Mean and standard deviation over seeds; a single one has no deviation."""
    deviation = round(float(np.std(values, ddof=1)), 4) if len(values) > 1 else None
    return {"mean": round(float(np.mean(values)), 4), "sd": deviation}


def shipped(work: Path, seeds: list[int], methods: list[str], run: Callable, earlier: dict) -> dict:
    """The methods on the shipped demo, and those of an earlier result with the same data and seeds."""
    data = ROOT / "data"
    same = {"seeds": seeds, "data": digest(*(data / f"{name}.json" for name in ("train", "meta", "test")))}
    quality = json.loads((data / "quality.json").read_text())
    found: dict[tuple[str, int], dict] = {}
    for method in methods:  # one after the other: some start from another one's weights
        flags = {seed: METHODS[method](data, work, seed, run) for seed in seeds}
        done = run(lambda s, m=method, f=flags: evaluate(data, folder_of(work, m, s), s, *f[s]), seeds)  # noqa: B023
        found |= {(method, seed): row for seed, row in zip(seeds, done, strict=True)}
    table, weights, told = {}, {}, {}
    for method in methods:
        rows = [found[method, seed] for seed in seeds]
        numbers = [name for name in rows[0] if name not in ("auc", "device") and all(name in row for row in rows)]
        table[method] = {name: summary([row[name] for row in rows]) for name in numbers} | {
            f"auc_{name}": summary([row["auc"][name] for row in rows]) for name in rows[0]["auc"]
        }
        weights[method] = {seed: learned_weights(folder_of(work, method, seed)) for seed in seeds}
        told[method] = {seed: verdicts(folder_of(work, method, seed)) for seed in seeds}
        if all(len(set(own.values())) > 1 for own in weights[method].values()):
            ranking = [agreement(weights[method][seed], quality) for seed in seeds]
            table[method] |= {name: summary([row[name] for row in ranking]) for name in ranking[0]}
    per_seed = {f"{method} {seed}": row for (method, seed), row in found.items()}
    new = {"methods": table, "weights": weights, "verdicts": told, "per_seed": per_seed}
    if all(earlier.get(name) == value for name, value in same.items()):
        new = {name: earlier.get(name, {}) | own for name, own in new.items()}
        table = new["methods"]
    result = {**same, "quality": quality, **new}
    if {"equal weights", "learned weights", "true qualities"} <= set(table):
        gains = {m: table[m]["best_of_8"]["mean"] - table["equal weights"]["best_of_8"]["mean"] for m in table}
        result["gain_of_learned_in_points"] = round(100 * gains["learned weights"], 2)
        result["share_of_the_true_qualities_gain"] = round(gains["learned weights"] / gains["true qualities"], 3)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/tmp/demo_runs"), help="runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time, each with its share of the cores")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    share_cores(args.parallel)
    earlier = read_results("demo_runs").get("shipped", {})
    with ThreadPoolExecutor(args.parallel) as pool:
        methods = shipped(args.work, args.seeds, args.methods, lambda *job: list(pool.map(*job)), earlier)
    print(json.dumps({k: v for k, v in methods.items() if k not in ("per_seed", "weights")}, indent=1))
    print(write_results("demo_runs", {"parallel": args.parallel, "shipped": methods}))


if __name__ == "__main__":
    main()
