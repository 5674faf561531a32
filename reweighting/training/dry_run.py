"""`--dry_run`: do everything that a run does once, and print what the whole run would take."""

import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from reweighting.config.training import TrainingConfig
from reweighting.devices import choose_device
from reweighting.distributed import collectives
from reweighting.errors import UserError
from reweighting.files import temporary_dir
from reweighting.terminal import printable
from reweighting.training.checkpoints import load_latest
from reweighting.training.engine import ReweightingEngine
from reweighting.training.hypergradient_choice import estimate_memory
from reweighting.training.memory_estimate import table
from reweighting.training.preflight import check_possible
from reweighting.training.run_data import RunData


def dry_run(
    config: TrainingConfig,
    settings: dict,
    data: RunData,
    folder: Path,
    build_engine: Callable[..., ReweightingEngine],
) -> None:
    """Train one window, save and read a checkpoint, and print time, memory and disk of the whole run.

    Everything is written into a temporary folder inside `folder` and removed again.

    Args:
        config: the settings of the whole run.
        settings: what its checkpoints remember.
        data: what it reads.
        folder: its output folder.
        build_engine: makes the engine of a run, see `main.py`.

    Raises:
        UserError: as a run does, and if a checkpoint is not read as it was written.
    """
    steps = config.upper.unroll_steps  # one window: every level steps
    short = config.with_changes(iteration_num=steps, warmup_iterations=0)
    device = choose_device(config.run.device)
    check_possible(config, device, settings["precision"])
    expected = estimate_memory(config, data, device, settings["precision"])
    print(f"expected memory on {device}, with a micro-batch of the longest chains (no weights are loaded yet):")
    print(table(expected))
    before = psutil.Process().memory_info().rss
    with temporary_dir(folder, "dry-run") as trial:
        started = time.monotonic()
        engine = build_engine(short, settings, data, trial)
        loading = time.monotonic() - started
        engine.run()
        seconds = engine.seconds / steps
        saving = time.monotonic() - started - loading - engine.seconds  # with the validation, if there is one
        state = engine.state_dict()
        if not collectives.is_rank0():
            return
        latest = load_latest(trial / "checkpoints")
        if latest is None or not same(latest[1], state):
            raise UserError(f"{folder}: a checkpoint was not read as it was written: check the disk")
        size = sum(path.stat().st_size for path in latest[0].rglob("*") if path.is_file())
    size += expected.kept  # a checkpoint inside a window holds these too; this one was saved at the end of one
    # The newest checkpoints, the best one, the one being written, and the final reward model.
    disk = size * (config.run.keep_checkpoints + 3)
    free = shutil.disk_usage(folder).free
    saves = -(-config.lower.iteration_num // config.run.save_every_iterations)
    hours = (loading + config.lower.iteration_num * seconds + saves * saving) / 3600
    print(f"\ndry run: made {steps} steps, saved a checkpoint and read it again; the whole run would take about")
    later = "; less, since the backbone reads each chain only once" if engine.lower.module.step_states else ""
    print(f"  time    {hours:.2f} hours for {config.lower.iteration_num} steps: {1 / seconds:.2f} steps a second, "
          f"{loading:.0f} s before the first{later}")  # fmt: skip
    print(f"  memory  {_peak_memory(engine.device, before)}; expected: {expected.total / 1e9:.2f} GB")
    print(
        f"  disk    {disk / 1e9:.2f} GB ({size / 1e6:.0f} MB a checkpoint); {free / 1e9:.0f} GB are free in "
        f"{printable(folder)}"
    )
    if disk > free:
        print("warning: the disk is too small for that: lower --keep_checkpoints or use --lora_rank", file=sys.stderr)


def same(one, other) -> bool:
    """Compare two nested containers of tensors, numbers and text bitwise."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one.cpu(), other.cpu())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def _peak_memory(device: torch.device, before: int) -> str:
    """Describe the peak memory so far; `before`: bytes of main memory in use before a model was loaded."""
    # Kilobytes on Linux, bytes on macOS.
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    text = f"{resident / 1e9:.2f} GB of main memory"
    if device.type != "cuda":
        return f"{text}, {(resident - before) / 1e9:.2f} GB of it since the data were read"
    total = torch.cuda.get_device_properties(device).total_memory
    return f"{text}, and of {total / 1e9:.2f} GB of the GPU {torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB"
