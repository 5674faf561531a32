"""How fast the command trains, against Betty as it comes, against itself without an upper level, and against the floor.

    python benchmarks/throughput.py            # about half an hour on two cores

Each case is a process of its own; the cases take turns, so that whatever else the machine does strikes all alike.

    stock            Betty 0.2.1 as it comes: one step row at a time, a forward pass and an image encoding for each
                     prefix, finite differences (`darts`) on the last row of every five. See `stock_betty.py`
    stock, as many   the same with as many rows in an optimizer step as ours, all in one batch: for its memory only
    ours             the command
    no upper level   the command with --baseline
    bare loop        forward and backward of the same batches, made beforehand: nothing can be faster without other
                     mathematics

Steps to warm up do not count. Writing checkpoints is left out (`benchmarks/faults.py` and the README tell of it).
"""

import argparse
import json
import resource
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from common import ROOT, make_data, run_case, write_results
from stopwatch import Stopwatch

CASES = ("stock", "stock, as many", "ours", "no upper level", "bare loop")
PARTS = {  # what is timed: part -> (level, method)
    "data": (("lower", "prefetch"), ("upper", "prefetch"), ("lower", "get_batch")),
    "lower forward": (("lower", "training_step_exec"),),
    "lower backward": (("lower", "backward"),),
    "meta": (("upper", "step_normal"),),
    "optimizer": (("lower", "optimizer_step"),),
}
# The default's proportions, in a window as short as ten domains allow; answers to one question share their prompt.
SMALL = ("--group_by_question", "--gradient_accumulation", "1", "--unroll_steps", "10", "--meta_batch_size", "16")
# backbone -> (image tokens, the flags of ours, its optimizer steps: to warm up and to measure; the same for stock)
# The embedded one makes a whole default run: images are seen for the first time in its first fifth only.
BACKBONES = {
    "embedded": (16, (), (20, 580), (10, 100)),
    "30 M, 16 image tokens": (16, SMALL, (10, 10), (5, 40)),
    "30 M, 256 image tokens": (256, SMALL, (10, 10), (5, 20)),
}
BARE_STEPS = (5, 20)


def make_backbone(folder: Path, image_tokens: int) -> Path:
    """A random Qwen2-VL of 30 M parameters that reads the demo's words; an image takes so many tokens."""
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, Qwen2VLForConditionalGeneration

    config = AutoConfig.from_pretrained(ROOT / "backbone")
    text, vision = config.text_config, config.vision_config
    text.hidden_size = vision.hidden_size = 512
    text.intermediate_size, text.num_hidden_layers = 1536, 8
    text.layer_types = ["full_attention"] * 8
    text.num_attention_heads = text.num_key_value_heads = 8
    text.rope_parameters = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}
    text.initializer_range = config.initializer_range = 0.02
    vision.embed_dim, vision.depth, vision.num_heads, vision.initializer_range = 256, 4, 4, 0.02
    torch.manual_seed(0)
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "backbone").save_pretrained(folder)
    pixels = image_tokens * (2 * vision.patch_size) ** 2
    size = {"shortest_edge": pixels, "longest_edge": pixels}
    AutoImageProcessor.from_pretrained(ROOT / "backbone", size=size).save_pretrained(folder)
    return folder


class Meter:
    """Stands in for the signals that a run looks for after each step: starts the clock once the run is warm."""

    def __init__(self, warm_up: int, rows_seen, watch: Stopwatch):
        self.warm_up, self.rows_seen, self.watch, self.steps = warm_up, rows_seen, watch, 0

    @property
    def received(self) -> None:
        """Called after each step; there is never a signal."""
        self.steps += 1
        if self.steps == self.warm_up:
            self.watch.seconds.clear()
            self.rows, self.started = self.rows_seen(), time.perf_counter()

    def result(self) -> dict:
        """Rows, seconds in all and by part, since the clock started."""
        seconds = time.perf_counter() - self.started
        return {"rows": self.rows_seen() - self.rows, "seconds": seconds, "parts": dict(self.watch.seconds)}


def ours(case: str, backbone: str, name: str, data: Path, folder: Path) -> dict:
    """The command, or its batches in a bare loop."""
    from reweighting.config.training import TrainingConfig
    from reweighting.main import build_engine
    from reweighting.training.resume import run_settings
    from reweighting.training.run_data import read_run_data

    _, flags, (warm_up, steps), _ = BACKBONES[name]
    files = ["--train_json_file", str(data / "train.json"), "--weights_path", str(folder), "--reward_model", backbone]
    if case == "ours":
        files += ["--meta_json_file", str(data / "meta.json")]
    else:
        files += ["--baseline"]
        flags = flags[:-2]  # without the meta batch size
    config = TrainingConfig.parse([*files, *flags, "--iteration_num", str(warm_up + steps)])
    engine = build_engine(config, run_settings(config), read_run_data(config), folder)
    lower = engine.lower
    if case == "bare loop":
        return bare_loop(lower, *(steps * lower.gas for steps in BARE_STEPS))
    engine.save = lambda **_: None
    meter = measured(engine, warm_up)
    engine.run(meter)
    return meter.result()


def measured(engine, warm_up: int) -> Meter:
    """A meter of the engine's lower level."""
    watch, levels = Stopwatch(time.perf_counter), {problem.name: problem for problem in engine.problems}
    for part, places in PARTS.items():
        for level, method in places:
            if level in levels and hasattr(levels[level], method):
                watch.watch(levels[level], method, part)
    return Meter(warm_up, lambda: engine.lower.rows_seen, watch)


def bare_loop(lower, warm_up: int, count: int) -> dict:
    """Forward and backward of the same micro-batches, made beforehand."""
    batches = [lower.fetch_batch(number)[1] for number in range(warm_up + count)]
    params = lower.trainable_parameters()
    for number, batch in enumerate(batches):
        if number == warm_up:
            started = time.perf_counter()
        torch.autograd.grad(lower.domain_loss(batch), params, allow_unused=True)
    return {
        "rows": sum(batch.num_labeled_steps for batch in batches[warm_up:]),
        "seconds": time.perf_counter() - started,
    }


def one_case(case: str, name: str, backbone: str, data: Path) -> None:
    """Run one case in this process and print what came out as JSON."""
    with TemporaryDirectory() as folder:
        if case.startswith("stock"):
            from stock_betty import stock

            as_many = 80 if name == "embedded" else 40
            warm_up, steps = BACKBONES[name][3] if case == "stock" else (1, 2)
            engine = stock(backbone, data, 1 if case == "stock" else as_many, warm_up + steps)
            meter = measured(engine, warm_up)
            engine.train()
            for engine.global_step in range(1, warm_up + steps + 1):
                engine.train_step()
                meter.received  # noqa: B018
            result = meter.result()
        else:
            result = ours(case, backbone, name, data, Path(folder))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print("RESULT " + json.dumps(result | {"peak_bytes": peak, "threads": torch.get_num_threads()}))


def summary(runs: dict[str, list[dict]]) -> dict:
    """Of one backbone: medians of rows a second, shares of time and memory, and ratios, run by run."""
    table, speeds = {}, {}
    for case, results in runs.items():
        speeds[case] = [result["rows"] / result["seconds"] for result in results]
        shares = [{p: s / r["seconds"] for p, s in r.get("parts", {}).items()} for r in results]
        table[case] = {
            "rows_per_second": round(statistics.median(speeds[case]), 2),
            "peak_mb": round(statistics.median(result["peak_bytes"] for result in results) / 1e6),
        }
        if shares[0]:
            parts = {part: statistics.median(share.get(part, 0) for share in shares) for part in PARTS}
            parts["everything else"] = 1 - sum(parts.values())
            table[case]["share_of_time"] = {part: round(share, 3) for part, share in parts.items()}

    def ratio(one: str, other: str) -> float:
        return round(statistics.median(a / b for a, b in zip(speeds[one], speeds[other], strict=True)), 3)

    ratios = {
        "rows per second, ours / stock": ratio("ours", "stock"),
        "wall time, ours / no upper level": ratio("no upper level", "ours"),
        "rows per second, ours / bare loop": ratio("ours", "bare loop"),
        "peak memory, ours / stock": round(table["ours"]["peak_mb"] / table["stock"]["peak_mb"], 3),
        "peak memory, ours / stock with as many rows": round(
            table["ours"]["peak_mb"] / table["stock, as many"]["peak_mb"], 3
        ),
    }
    return {"cases": table, "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--backbones", nargs="+", choices=BACKBONES, default=list(BACKBONES))
    parser.add_argument("--case", nargs=4, help=argparse.SUPPRESS)  # of a process of its own
    args = parser.parse_args()
    if args.case:
        case, name, backbone, data = args.case
        one_case(case, name, backbone, Path(data))
        return
    runs: dict[str, dict[str, list[dict]]] = {name: defaultdict(list) for name in args.backbones}
    with TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        make_data(data, 1, "--test_questions", "1")
        for repeat in range(args.repeats):
            for name in args.backbones:
                backbone = ROOT / "backbone"
                if name != "embedded":
                    backbone = make_backbone(Path(folder) / name.replace(" ", "_"), BACKBONES[name][0])
                for case in CASES:
                    command = [sys.executable, __file__, "--case", case, name, str(backbone), str(data)]
                    result = run_case(command)
                    runs[name][case].append(result)
                    print(f"{repeat + 1}. {name}, {case}: {result['rows'] / result['seconds']:.2f} rows/s, "
                          f"{result['peak_bytes'] / 1e6:.0f} MB", flush=True)  # fmt: skip
    content = {"repeats": args.repeats, "backbones": {name: summary(found) for name, found in runs.items()}}
    print(json.dumps(content["backbones"], indent=1))
    print(write_results("throughput", content | {"runs": runs}))


if __name__ == "__main__":
    main()
