"""Is the memory estimate right? The estimate against the measured peak of the real command, on the CPU.

    python benchmarks/memory_check.py

Each case is a process of its own, or two. Measured is the peak resident memory (`VmHWM`, set back before the model is
built) of a run of two windows after every image was seen once, less what the process holds before: imports, the rows
of the data, and the libraries that a first step of the embedded backbone loads. glibc is set to return freed blocks
above 64 kB back at once (MALLOC_MMAP_THRESHOLD_), and smaller ones before the measurement (malloc_trim), so that
resident memory is what tensors need and not what the allocator keeps; by default it may keep more.
"""

import argparse
import ctypes
import gc
import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from common import ROOT, make_data, run_case, write_results
from throughput import make_backbone

SMALL = ("--batch_size", "4", "--gradient_accumulation", "2", "--unroll_steps", "5", "--meta_batch_size", "8")
ALL = ("--no_freeze_vision",)
LORA = ("--lora_rank", "16")
CHECKPOINTED = ("--gradient_checkpointing",)
IMAGE_TOKENS = 256  # of the 30 M backbone
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
TWO = ("--batch_size", "8", "--meta_batch_size", "16")  # of two processes
CASES = {  # name, which begins with the backbone and may end with "two processes" and more -> flags
    "embedded, frozen vision": (),
    "embedded, full": ALL,
    "embedded, full, checkpointed": ALL + CHECKPOINTED,
    "embedded, LoRA": LORA,
    "embedded, baseline": ("--baseline",),
    "30 M, frozen vision": SMALL,
    "30 M, frozen vision, checkpointed": SMALL + CHECKPOINTED,
    "30 M, full": SMALL + ALL,
    "30 M, full, checkpointed": SMALL + ALL + CHECKPOINTED,
    "30 M, full, jvp": (*SMALL, *ALL, "--hypergradient", "jvp"),
    "30 M, full, finite_difference": (*SMALL, *ALL, "--hypergradient", "finite_difference"),
    "30 M, full, sgd": (*SMALL, *ALL, "--optimizer", "sgd"),
    "30 M, full, bf16": (*SMALL, *ALL, "--precision", "bf16"),
    "30 M, LoRA": SMALL + LORA,
    "30 M, LoRA, checkpointed": SMALL + LORA + CHECKPOINTED,
    "30 M, full, two processes": SMALL + ALL + TWO,
    "30 M, full, two processes, sharded": (*SMALL, *ALL, *TWO, "--shard"),
    "30 M, LoRA, two processes, sharded": (*SMALL, *LORA, *TWO, "--shard"),
}


def status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def one_case(backbone: str, data: Path, flags: list[str]) -> None:
    """Print estimate and measurement of one run, as JSON, of process 0 if there are two. In a process of its
    own."""
    from reweighting.config.training import EMBEDDED_BACKBONE, TrainingConfig
    from reweighting.devices import choose_device
    from reweighting.distributed.collectives import process_group
    from reweighting.distributed.rank0_output import rank0_output
    from reweighting.main import build_engine
    from reweighting.training.hypergradient_choice import estimate_memory
    from reweighting.training.resume import run_settings
    from reweighting.training.run_data import read_run_data

    torch.set_num_threads(1)

    def arguments(folder: str, *more: str):
        files = ["--train_json_file", str(data / "train.json"), "--weights_path", folder]
        if "--baseline" not in more:
            files += ["--meta_json_file", str(data / "meta.json")]
        return TrainingConfig.parse([*files, *more])

    def run(config, rows) -> None:
        engine = build_engine(config, run_settings(config), rows, Path(config.data.weights_path))
        engine.save = lambda **_: None
        for chain in (*rows.train, *rows.meta):
            engine.lower.module.chain_tokenizer.encode(chain)  # its image is remembered
        engine.run()

    with TemporaryDirectory() as folder, rank0_output(), process_group(torch.device("cpu"), 30):
        small = ("--batch_size", "2", "--gradient_accumulation", "5", "--unroll_steps", "2", "--iteration_num", "2")
        small = arguments(folder, *small, "--meta_batch_size", "2", "--reward_model", str(EMBEDDED_BACKBONE))
        run(small, read_run_data(small))  # loads what a first step loads
        config = arguments(folder, "--reward_model", backbone, *flags)
        config = config.with_changes(iteration_num=2 * config.upper.unroll_steps)
        rows = read_run_data(config)
        settings = run_settings(config)
        estimate = estimate_memory(config, rows, choose_device("cpu"), settings["precision"])
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = status("VmRSS")
        run(config, rows)
        measured = status("VmHWM") - before
        print("RESULT", json.dumps({"estimate": vars(estimate), "measured": measured, "before": before}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="cases whose name holds this")
    parser.add_argument("--case", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)  # of a process of its own
    args = parser.parse_args()
    if args.case:
        backbone, data, *flags = args.case
        one_case(backbone, Path(data), flags)
        return
    results = {}
    with TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        make_data(data, 1, "--train_rows", "2000", "--meta_rows", "100", "--test_questions", "1")
        backbones = {"30 M": make_backbone(Path(folder) / "random", IMAGE_TOKENS), "embedded": ROOT / "backbone"}
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**16), "OMP_NUM_THREADS": "1"}
        for name, flags in CASES.items():
            if args.only and args.only not in name:
                continue
            start = TORCHRUN if "two processes" in name else []
            backbone = str(backbones[name.split(",")[0]])
            command = [sys.executable, *start, __file__, "--case", backbone, str(data), *flags]
            found = run_case(command, environment)
            found["ratio"] = round(found["estimate"]["total"] / found["measured"], 3)
            results[name] = {"flags": " ".join(flags), **found}
            print(f"{name:<36} estimated {found['estimate']['total'] / 1e6:6.0f} MB, measured "
                  f"{found['measured'] / 1e6:6.0f} MB: {found['ratio']:.2f}", flush=True)  # fmt: skip
    if not args.only:
        print(write_results("memory_check", {"cases": results}))


if __name__ == "__main__":
    main()
