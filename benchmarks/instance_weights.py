"""Do weights of single chains find wrong labels, do they pay, and what do they cost?

    python benchmarks/instance_weights.py --work /tmp/instance_weights     # resumable: finished runs are not repeated

In the domains of the shipped demo whose quality is at least 0.6, 30 % of the chains get the labels of others among
them, dealt at random. Many labels hardly change by that, since two correct answers have similar labels: the AUC of
telling the chains is given for all of them, and for those whose labels have changed by more than 0.2 on average. A
perfect knowledge of the change would have an AUC of `ceiling`.

Seeds 1, 2, …; a run is added for each seed and rule, and none is left out. `--variant` makes shorter runs, of which
only the weights are judged: 300 steps, or the head alone on the frozen backbone.
"""

import argparse
import json
from pathlib import Path
from random import Random

import numpy as np
import pyarrow.parquet
from common import ROOT, auc, learned_weights, read_results, train, use_one_thread, write_results
from demo_runs import evaluate

DATA = ROOT / "data"
SHUFFLED, GOOD, CHANGED = 0.3, 0.6, 0.2
ADAMW = ("--meta_optimizer", "adamw")
RULES = {
    "equal": ("--baseline",),
    "domain": (),
    "instance": ("--weights_for", "instance"),
    "both": ("--weights_for", "both"),
    "table": (*ADAMW, "--weights_for", "both"),
    "net": (*ADAMW, "--weights_for", "both", "--instance_weights_form", "net"),
}
VARIANTS = {"300 steps": ("--iteration_num", "300"), "head": ("--train", "head")}


def make_world(folder: Path) -> None:
    """The demo with shuffled labels, and how much each row's label has changed; None: not dealt."""
    if (folder / "changes.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rows, quality = (json.loads((DATA / name).read_text()) for name in ("train.json", "quality.json"))
    chains, last = [], None  # indices of the rows of each
    for number, row in enumerate(rows):
        extends = last is not None and row["dataset"] == last["dataset"] and row["add"].startswith(last["add"])
        chains[-1].append(number) if extends else chains.append([number])
        last = row
    rng, changes = Random(5), [None] * len(rows)
    for domain in sorted(name for name, value in quality.items() if value >= GOOD):
        mine = [chain for chain in chains if rows[chain[0]]["dataset"] == domain]
        chosen = rng.sample(mine, round(SHUFFLED * len(mine)))
        labels = [[(rows[n]["score"], rows[n]["times"], rows[n]["accuracy"]) for n in chain] for chain in chosen]
        rng.shuffle(labels)
        for chain, new in zip(chosen, labels, strict=True):
            for number, (score, times, accuracy) in zip(chain, new, strict=True):
                changes[number] = abs(accuracy - rows[number]["accuracy"])
                rows[number] |= {"score": score, "times": times, "accuracy": accuracy}
    (folder / "train.json").write_text(json.dumps(rows))
    for name in ("meta.json", "test.json", "quality.json"):
        (folder / name).write_bytes((DATA / name).read_bytes())
    (folder / "images").symlink_to(DATA / "images")
    (folder / "changes.json").write_text(json.dumps(changes))


def telling(folder: Path, output: Path) -> dict[str, float]:
    """How well the weights of a run tell the shuffled chains of the good domains from the others."""
    changes, quality = (json.loads((folder / name).read_text()) for name in ("changes.json", "quality.json"))
    table = pyarrow.parquet.read_table(output / "instance_weights.parquet").to_pylist()
    chains = [row for row in table if quality[row["domain"]] >= GOOD]
    weight = np.array([row["weight"] for row in chains])
    change = np.array([np.mean([changes[n] or 0.0 for n in row["rows"]]) for row in chains])
    dealt = np.array([changes[row["rows"][0]] is not None for row in chains])
    clear = ~dealt | (change > CHANGED)
    return {
        "auc": auc(weight, ~dealt),
        "auc_changed": auc(weight[clear], ~dealt[clear]),
        "ceiling": auc(-change, ~dealt),
        "dealt": int(dealt.sum()),
        "changed": int((change > CHANGED).sum()),
        "mean_weight_of_changed": float(weight[change > CHANGED].mean() / weight.mean()),
    }


def short(work: Path, rule: str, variant: str, seed: int) -> dict:
    """A shorter run in the shuffled world, and how well its weights tell the shuffled chains."""
    folder, output = work / "world", work / f"{rule}-{variant.replace(' ', '-')}-{seed}"
    make_world(folder)
    more = ("--step_states_dir", str(work / "states")) if variant == "head" else ()
    seconds = train(folder, output, seed, *RULES[rule], *VARIANTS[variant], *more)
    return {"processor_seconds": seconds, "weights": learned_weights(output), "telling": telling(folder, output)}


def one(work: Path, rule: str, seed: int) -> dict:
    """A run in the shuffled world."""
    folder, output = work / "world", work / f"{rule}-{seed}"
    make_world(folder)
    scores = evaluate(folder, output, seed, *RULES[rule])
    result = {name: scores[name] for name in ("processor_seconds", "best_of_8", "best_of_4") if name in scores}
    result["auc"] = scores["auc"]["answers"]
    if rule != "equal":
        result["weights"] = learned_weights(output)
    if (output / "instance_weights.parquet").exists():
        result["telling"] = telling(folder, output)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/tmp/instance_weights"), help="runs and made data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--variant", choices=VARIANTS, help="shorter runs")
    args = parser.parse_args()
    use_one_thread()
    found = read_results("instance_weights")
    for seed in args.seeds:
        for rule in args.rules:
            name = f"{rule}, {args.variant}" if args.variant else rule
            result = short(args.work, rule, args.variant, seed) if args.variant else one(args.work, rule, seed)
            found.setdefault(name, {})[str(seed)] = result
            print(name, seed, json.dumps(result), flush=True)
            write_results("instance_weights", found)


if __name__ == "__main__":
    main()
