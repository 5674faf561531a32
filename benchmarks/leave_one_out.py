"""What is a weight worth? Each domain left out in turn, against its learned weight and verdict.

    python benchmarks/leave_one_out.py --work /tmp/leave_one_out        # resumable: finished runs are not repeated

For each world (the shipped demo, and others with new data and the qualities dealt anew) and each seed: a run with equal
weights on all domains, one without each domain, and one that learns the weights by the calm rule. All train an MLP head
on the frozen embedded backbone (`--train head`), whose states are computed once, so that the hundreds of runs take
seconds each. What leaving out a domain does is the fall of the answer AUC, and of the best-of-8 accuracy, on the
world's test questions: above 0, the domain was of use. It is compared with the logarithm of the weight (Spearman), and
its sign with the verdict. Left-out runs have as many steps as the full ones.

Worlds 1 (shipped), 11, 12, …; seeds 1, 2, 3; no run is left out.
"""

import argparse
import json
import os
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
from common import ROOT, auc, make_reassigned, use_one_thread, write_results
from scipy.stats import spearmanr

from reweighting.data.chains import candidate_chains
from reweighting.data.load_rows import load_candidate_rows
from reweighting.main import main as train
from reweighting.modeling.reward_model import CACHE_BYTES, ProcessRewardModel
from reweighting.modeling.state_files import StateFiles
from reweighting.modeling.step_states import StepStates

FIXED = ("--train", "head", "--score_head", "mlp", "--lr", "1e-3", "--save_every_iterations", "1000")
SHIPPED = 1


class World:
    """A demo world: its data, and the states of its chains."""

    def __init__(self, number: int, work: Path):
        self.folder, self.runs = work / f"world-{number}", work / f"runs-{number}"
        self.quality = json.loads((ROOT / "data" / "quality.json").read_text())
        if number == SHIPPED:
            self.folder = ROOT / "data"
        else:
            self.quality = make_reassigned(self.folder, number)
        self.states = work / "states"
        self.rows = json.loads((self.folder / "train.json").read_text())
        model = ProcessRewardModel.from_backbone(ROOT / "backbone", train="head", score_head="mlp")
        files = StateFiles(self.states, model.base_identity, model.base, model.chain_tokenizer, "fp32")
        self.step_states = StepStates(model.base, model.chain_tokenizer, "fp32", CACHE_BYTES, files)
        tests = load_candidate_rows(self.folder / "test.json")
        self.chains = [chain for row in tests for chain in candidate_chains(row)]
        self.correct = np.array([row.true_false for row in tests])  # [questions, 8]

    def run(self, name: str, seed: int, domains: list[str], *flags: str) -> dict:
        """Train on these domains, unless that is done; the measures, and the weights if they are learned."""
        output = self.runs / f"{name}-{seed}"
        done = output / "measured.json"
        if not done.exists():
            self.runs.mkdir(parents=True, exist_ok=True)
            file = self.runs / f"{name}.json"
            file.write_text(json.dumps([row for row in self.rows if row["dataset"] in domains]))
            command = ["--train_json_file", str(file), "--image_root", str(self.folder), "--weights_path", str(output)]
            command += ["--seed", str(seed), "--step_states_dir", str(self.states), *FIXED, *flags]
            with open(os.devnull, "w") as quiet, redirect_stdout(quiet), redirect_stderr(quiet):
                train(command)
            done.write_text(json.dumps(self.measure(output)))
        return json.loads(done.read_text())

    def measure(self, output: Path) -> dict:
        """The answer AUC and the best-of-8 accuracy of a run on the test questions, and what it learned."""
        model = ProcessRewardModel.from_pretrained(output / "prm")
        model.step_states = self.step_states
        logits, mask = model.chain_logits(self.chains, 50)
        scores = ((logits * mask).sum(1) / mask.sum(1)).numpy().reshape(self.correct.shape)  # mean_logit
        best = self.correct[np.arange(len(scores)), scores.argmax(1)].mean()
        saved = json.loads((output / "domain_weights.json").read_text())
        found = {
            "auc": auc(scores.ravel(), self.correct.ravel()),
            "best_of_8": float(best),
            "weights": saved["weights"],
        }
        if "evidence" in saved:
            found["verdicts"] = {name: one["verdict"] for name, one in saved["evidence"]["domains"].items()}
        return found

    def one_seed(self, seed: int) -> dict:
        """All runs of a seed."""
        domains = sorted(self.quality)
        learned = self.run("learned", seed, domains, "--meta_json_file", str(self.folder / "meta.json"))
        full = self.run("all", seed, domains, "--baseline")
        without = {
            name: self.run(f"without-{name}", seed, [one for one in domains if one != name], "--baseline")
            for name in domains
        }
        return {
            "learned": learned,
            "all": full,
            "worth_auc": {name: full["auc"] - one["auc"] for name, one in without.items()},
            "worth_best_of_8": {name: full["best_of_8"] - one["best_of_8"] for name, one in without.items()},
        }


def summarize(world: World, seeds: dict[int, dict]) -> dict:
    """Correlations over the domains of means over seeds, and how often a verdict has the sign of the worth."""
    names = sorted(world.quality)

    def means(values: list[dict[str, float]]) -> np.ndarray:
        return np.array([np.mean([one[name] for one in values]) for name in names])

    weights = means([{name: np.log(w) for name, w in one["learned"]["weights"].items()} for one in seeds.values()])
    quality = np.array([world.quality[name] for name in names])
    result = {"seeds": seeds, "quality": world.quality, "weight_against_quality": _spearman(weights, quality)}
    for measure in ("worth_auc", "worth_best_of_8"):
        values = [one[measure] for one in seeds.values()]
        worth = means(values)
        spread = np.array([[one[name] for one in values] for name in names]).std(1, ddof=1)
        agree = [
            (worth[number] > 0) == (verdict == "helps")
            for one in seeds.values()
            for number, name in enumerate(names)
            if (verdict := one["learned"]["verdicts"][name]) != "cannot be told"
        ]
        result[measure] = {
            "mean": dict(zip(names, worth.tolist(), strict=True)),
            "sd_over_seeds": dict(zip(names, spread.tolist(), strict=True)),
            "spearman_with_weight": _spearman(weights, worth),
            "spearman_with_quality": _spearman(quality, worth),
            "verdicts": len(agree),
            "verdicts_with_its_sign": int(sum(agree)),
        }
    return result


def _spearman(one: np.ndarray, other: np.ndarray) -> float | None:
    return None if np.ptp(one) == 0 or np.ptp(other) == 0 else float(spearmanr(one, other).statistic)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/tmp/leave_one_out"), help="runs and made data")
    parser.add_argument("--worlds", type=int, nargs="+", default=[SHIPPED, 11, 12])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    use_one_thread()
    found = {}
    for number in args.worlds:
        world = World(number, args.work)
        found[number] = summarize(world, {seed: world.one_seed(seed) for seed in args.seeds})
        shown = {name: value for name, value in found[number].items() if name not in ("seeds", "quality")}
        print(number, json.dumps(shown, indent=1), flush=True)
        write_results("leave_one_out", {"flags": " ".join(FIXED), "worlds": found})


if __name__ == "__main__":
    main()
