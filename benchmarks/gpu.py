"""What a GPU makes of published sizes: steps a second, and the memory estimate against the measured peak.

    python benchmarks/gpu.py                 # needs a CUDA GPU of 80 GB; minutes
    python benchmarks/gpu.py --only "2B"     # the cases whose name holds this; writes nothing

The models have the shapes of the published ones and random weights (nothing is downloaded), the embedded backbone's
tokenizer, and images of 324 tokens; the rows are the demo's. So the cost is real, and what is learned says nothing.
Each case is a process of its own: two windows to warm up, in which most images are seen for the first time, then the
windows that are timed.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from common import ROOT, make_data, run_case, write_results
from memory_table import IMAGE, MODELS
from stopwatch import Stopwatch
from throughput import Meter

WARM_UP, TIMED = 2, 4  # windows
WINDOW = ("--unroll_steps", "5", "--batch_size", "2")
META = (*WINDOW, "--meta_batch_size", "8")
LORA, CHECKPOINTED = ("--lora_rank", "16", "--lr", "1e-4"), ("--gradient_checkpointing",)
FULL = ("--train", "full", "--no_freeze_vision", "--lr", "5e-7", *CHECKPOINTED)
CASES = {  # name, which begins with the model's -> flags
    "Qwen2-VL-2B, LoRA": (*META, *LORA),
    "Qwen2-VL-2B, LoRA, no upper level": (*WINDOW, *LORA, "--baseline"),
    "Qwen2-VL-2B, full, darts": (*META, *FULL, "--hypergradient", "darts"),
    "Qwen2.5-VL-7B, 4-bit LoRA": (*META, *LORA, *CHECKPOINTED, "--load_in_4bit"),
    "Qwen2-VL-2B, full, no upper level": (*WINDOW, *FULL, "--baseline"),
    "Qwen2-VL-2B, LoRA, jvp": (*META, *LORA, "--hypergradient", "jvp"),
    "Qwen2.5-VL-7B, LoRA": (*META, *LORA, *CHECKPOINTED),
}


def make_backbone(name: str, folder: Path) -> Path:
    """The model of this shape in bfloat16 with random weights, drawn on the GPU, and the demo's tokenizer."""
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

    config, own = MODELS[name][0], AutoConfig.from_pretrained(ROOT / "backbone")
    for token in ("image", "video", "vision_start", "vision_end"):
        setattr(config, f"{token}_token_id", getattr(own, f"{token}_token_id"))
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "backbone").save_pretrained(folder)
    pixels, patch = IMAGE * 28**2, config.vision_config.patch_size
    size = {"shortest_edge": pixels, "longest_edge": pixels}
    AutoImageProcessor.from_pretrained(ROOT / "backbone", size=size, patch_size=patch).save_pretrained(folder)
    return folder


def rows_seen(engine) -> int:
    """Rows that the lower level has trained on, once the GPU has done what it was given."""
    torch.cuda.synchronize()
    return engine.lower.rows_seen


def one_case(backbone: str, data: Path, flags: list[str]) -> None:
    """Print estimate and measurement of one run, as JSON. In a process of its own."""
    from reweighting.config.training import TrainingConfig
    from reweighting.devices import choose_device, choose_precision
    from reweighting.main import build_engine
    from reweighting.training.hypergradient_choice import estimate_memory
    from reweighting.training.resume import run_settings
    from reweighting.training.run_data import read_run_data

    files = ["--train_json_file", str(data / "train.json"), "--reward_model", backbone]
    if "--baseline" not in flags:
        files += ["--meta_json_file", str(data / "meta.json")]
    with TemporaryDirectory() as folder:
        config = TrainingConfig.parse([*files, "--weights_path", folder, *flags])
        window = config.upper.unroll_steps
        config = config.with_changes(iteration_num=(WARM_UP + TIMED) * window)
        rows, device = read_run_data(config), choose_device(None)
        estimate = estimate_memory(config, rows, device, choose_precision(None, device))
        started = time.perf_counter()
        engine = build_engine(config, run_settings(config), rows, Path(folder))
        loaded = time.perf_counter() - started
        engine.save = lambda **_: None
        meter = Meter(WARM_UP * window, lambda: rows_seen(engine), Stopwatch(time.perf_counter))
        engine.run(meter)
    rows, seconds = rows_seen(engine) - meter.rows, time.perf_counter() - meter.started
    peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    print("RESULT", json.dumps({"estimate": vars(estimate), "allocated": peak, "reserved": reserved,
                                "seconds_to_build": round(loaded, 1), "rows_per_second": round(rows / seconds, 2),
                                "seconds_a_step": round(seconds / (TIMED * window), 4)}))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--case", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)  # of a process of its own
    args = parser.parse_args()
    if args.case:
        backbone, data, *flags = args.case
        one_case(backbone, Path(data), flags)
        return
    results = {}
    cases = {name: flags for name, flags in CASES.items() if args.only in name}
    with TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        make_data(data, 1, "--train_rows", "300", "--meta_rows", "40", "--test_questions", "1")
        for name, flags in cases.items():
            backbone = Path(folder) / name.split(",")[0]
            if not backbone.exists():
                make_backbone(backbone.name, backbone)
                torch.cuda.empty_cache()
            command = [sys.executable, __file__, "--case", str(backbone), str(data), *flags]
            try:
                found = run_case(command)
            except RuntimeError as error:
                print(f"{name}: FAILED\n{error}", flush=True)
                results[name] = {"flags": " ".join(flags), "failed": str(error).strip().splitlines()[-1]}
                continue
            found["ratio"] = round(found["estimate"]["total"] / found["allocated"], 3)
            results[name] = {"flags": " ".join(flags), **found}
            print(f"{name:<40} {found['seconds_a_step']:.3f} s/step, {found['rows_per_second']:.1f} rows/s, estimated "
                  f"{found['estimate']['total'] / 1e9:.1f} GB, measured {found['allocated'] / 1e9:.1f} GB "
                  f"({found['ratio']:.2f}), reserved {found['reserved'] / 1e9:.1f} GB", flush=True)  # fmt: skip
            if not args.only:
                write_results(
                    "gpu", {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "cases": results}
                )


if __name__ == "__main__":
    main()
