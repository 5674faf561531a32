"""From published files to a trained PRM, an evaluation and a best-of-N, with no converter: every set of a folder.

    python benchmarks/public_sets.py --data FOLDER --work /tmp/public_sets

FOLDER holds a folder for each set, with the files as their authors publish them: `processbench`, `bigbench-mistake`,
`prmbench`, `mr-ben`, `gsm8k`, `dreamprm-1.5`, `math-vision` (see docs/data-formats.md for where they come from). Each
command is the real one on the embedded backbone, 4 steps of a chain a domain: it shows that the files are read, not
how good the model gets. A set without step labels is the meta set of a run that trains on ProcessBench.
"""

import argparse
import glob
import json
import re
import subprocess
import sys
import time
from pathlib import Path

from common import ROOT, write_results

# Set: its files; of a set with step labels, which is trained on, those to evaluate on; those with several answers to a
# question; and flags that its files need.
SETS: dict[str, dict] = {
    "processbench": {"files": "processbench/*.json", "evaluate": "processbench/gsm8k.json"},
    "bigbench-mistake": {
        "files": "bigbench-mistake/*.jsonl",
        "evaluate": "bigbench-mistake/multistep_arithmetic.jsonl",
    },
    "prmbench": {"files": "prmbench/*.jsonl", "evaluate": "prmbench/*_circular.jsonl"},
    "mr-ben": {"files": "mr-ben/*.json", "evaluate": "mr-ben/medicine.json", "best_of_n": "mr-ben/medicine.json"},
    "gsm8k": {"files": "gsm8k/example_model_solutions.jsonl", "best_of_n": "gsm8k/example_model_solutions.jsonl"},
    "math-vision": {
        "files": "math-vision/outputs/*.jsonl",
        "best_of_n": "math-vision/outputs/*.jsonl",
        "flags": ("--questions_json_file", "{data}/math-vision/testmini.jsonl", "--step_separator", "\\n\\n"),
    },
    "dreamprm-1.5": {
        "files": "dreamprm-1.5/*.json",
        "best_of_n": "dreamprm-1.5/*.json",
        "flags": ("--ignore_images",),
    },
}
TRAIN = ("--iteration_num", "4", "--unroll_steps", "2", "--batch_size", "1", "--meta_batch_size", "4",
         "--drop_too_long")  # fmt: skip


def run(script: str, *flags: str) -> tuple[str, float]:
    """Run a command; what it prints, and its seconds."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, str(ROOT / "reweighting" / script), *flags], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{script} {' '.join(flags)}\n{done.stderr[-3000:]}")
    return done.stdout, time.perf_counter() - start


def count(data: Path, case: dict, more: list[str]) -> dict[str, int]:
    """What `convert` finds in the files: rows, answers, steps, labelled steps, domains."""
    report, _ = run("convert.py", *files(data, case["files"]), *more)
    numbers = {
        name: int(re.search(rf"^{name} +(\d+)", report, re.M)[1]) for name in ("rows", "answers", "steps", "domains")
    }
    unlabelled = re.search(r"(\d+) unlabelled", report)
    return numbers | {"labelled_steps": numbers["steps"] - (int(unlabelled[1]) if unlabelled else 0)}


def files(data: Path, pattern: str) -> list[str]:
    """The files of a pattern, sorted."""
    return sorted(glob.glob(str(data / pattern)))


def one_set(name: str, data: Path, work: Path) -> dict:
    """Convert, train, evaluate and choose; the numbers of each."""
    case = SETS[name]
    more = [word.replace("{data}", str(data)) for word in case.get("flags", ())]
    weights = str(work / name)
    result: dict = {"files": case["files"], "counts": count(data, case, more)}
    labelled = "evaluate" in case
    trained_on = files(data, case["files"] if labelled else SETS["processbench"]["files"])
    meta = files(data, SETS["mr-ben" if name == "processbench" else "processbench"]["files"])
    if not labelled:
        meta = files(data, case["files"])
    out, seconds = run("main.py", "--train_json_file", *trained_on, "--meta_json_file", *meta,
                       "--weights_path", weights, *TRAIN, *([] if labelled else more))  # fmt: skip
    saved = json.loads((work / name / "domain_weights.json").read_text())["weights"]
    result["train"] = {"seconds": seconds, "domains": len(saved)}
    if labelled:
        _, seconds = run("evaluate.py", "--weights_path", weights, "--eval_json_file", *files(data, case["evaluate"]),
                         "--output", str(work / name / "evaluation"), "--drop_too_long")  # fmt: skip
        found = json.loads((work / name / "evaluation" / "evaluation.json").read_text())["results"]["all"]
        kept = ("chains", "steps", "auc", "position_auc", "process_bench")
        result["evaluate"] = {"files": case["evaluate"], "seconds": seconds, **{key: found[key] for key in kept}}
    if "best_of_n" in case:
        output = work / name / "selections.json"
        out, seconds = run("best_of_n.py", "--weights_path", weights, "--output", str(output), "--drop_too_long",
                           "--candidates_json_file", *files(data, case["best_of_n"]), *more)  # fmt: skip
        questions = int(re.search(r"^(\d+) questions", out, re.M)[1])
        result["best_of_n"] = {"files": case["best_of_n"], "seconds": seconds, "questions": questions}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder of published sets")
    parser.add_argument("--work", type=Path, default=Path("/tmp/public_sets"), help="what the commands write")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    args = parser.parse_args()
    results = {}
    for name in args.sets:
        kept = args.work / name / "result.json"
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(one_set(name, args.data, args.work)))
        results[name] = json.loads(kept.read_text())
        print(name, json.dumps(results[name]), flush=True)
    print(write_results("public_sets", {"flags": TRAIN, "sets": results}))


if __name__ == "__main__":
    main()
