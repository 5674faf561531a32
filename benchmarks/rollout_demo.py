"""Does reweighting pay on `data/rollouts`, whose answers and labels are a policy's own?

    python benchmarks/rollout_demo.py --work /tmp/rollout_demo        # resumable: finished runs are not repeated

The worth of a domain: a PRM is trained on it alone for 100 steps; the AUC of its step scores on the clean held-out
steps, of which those are correct whose rollouts are for more than half. It is also written into `quality.json` there.
Then runs of 600 steps with equal weights, and with those learned by the default rule and by AdamW: their best of N on
the test questions, their AUC on answers of the simulated policy, and how the weights rank the domains by worth. Writes
`results/rollout_demo.json`; methods that `--methods` leaves out stay in it.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from common import (
    ROOT,
    ProcessRewardModel,
    agreement,
    auc,
    learned_weights,
    read_results,
    use_one_thread,
    write_results,
)
from demo_runs import evaluate, summary, train_alone

from reweighting.data.load_chains import load_evaluation
from reweighting.data.readers.base import ReadingOptions
from reweighting.data.sources import Source
from reweighting.inference.step_metrics import score_chains

DATA = ROOT / "data" / "rollouts"
CORRECT_ABOVE = 0.5
METHODS = {"equal weights": ("--baseline",), "learned weights": (), "learned by AdamW": ("--meta_optimizer", "adamw")}
MEASURES = ("best_of_8", "best_of_4", "majority_of_8", "pass@1", "pass@8")


def worth(work: Path, domain: str) -> float:
    """The step AUC of a PRM that was trained on one domain alone."""
    done = work / f"alone-{domain}" / "worth.json"
    if not done.exists():
        model = ProcessRewardModel.from_pretrained(train_alone(DATA, work, domain) / "prm")
        chains, _ = load_evaluation([Source(str(DATA / "held_out.json"))], None, ReadingOptions(), CORRECT_ABOVE)
        scored = score_chains(model, chains, 50)
        scores, correct = (np.concatenate([getattr(one, name) for one in scored]) for name in ("scores", "correct"))
        done.write_text(json.dumps(auc(scores, correct)))
    return json.loads(done.read_text())


def one(work: Path, method: str, seed: int, quality: dict[str, float]) -> dict:
    """A run: its measures on the test questions, and its weights."""
    output = work / f"{method.replace(' ', '_')}-{seed}"
    scores = evaluate(DATA, output, seed, *METHODS[method])
    result = {name: scores[name] for name in MEASURES} | {f"auc_{n}": value for n, value in scores["auc"].items()}
    if method != "equal weights":
        weights = learned_weights(output)
        result |= {"spearman": agreement(weights, quality)["spearman"], "weights": weights}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/tmp/rollout_demo"), help="runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    args = parser.parse_args()
    use_one_thread()
    causes = json.loads((DATA / "quality.json").read_text())
    quality = {domain: worth(args.work, domain) for domain in causes}
    for domain, value in quality.items():
        causes[domain]["worth"] = round(value, 4)
    (DATA / "quality.json").write_text(json.dumps(causes, indent=1) + "\n")
    methods = read_results("rollout_demo").get("methods", {})
    for method in args.methods:
        runs = {seed: one(args.work, method, seed, quality) for seed in args.seeds}
        names = [name for name in runs[args.seeds[0]] if name != "weights"]
        means = {name: summary([run[name] for run in runs.values()]) for name in names}
        methods[method] = {"means": means, "runs": runs}
        print(method, json.dumps(means, indent=1), flush=True)
    print(write_results("rollout_demo", {"seeds": args.seeds, "worth": quality, "methods": methods}))


if __name__ == "__main__":
    main()
