"""The output folder: held by one run at a time, what an earlier run left set aside, files whole or absent."""

import itertools
import json
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from reweighting.config.training import TrainingConfig
from reweighting.distributed import collectives
from reweighting.distributed.rank0_output import dist_env
from reweighting.errors import UserError
from reweighting.files import atomic_write_dir, atomic_write_text
from reweighting.training.checkpoints import HISTORY_FILE

OUTPUTS = ("checkpoints", "history.jsonl", "domain_weights.json", "prm", "figures", "diagnostics")
HOLDER_FILE = "run.json"  # who writes into the folder, or did last


@contextmanager
def lock_output_dir(path: str) -> Iterator[Path]:
    """The output folder, made if it is missing, held by this process as long as the context is open; of several
    processes, by the main one.

    The system drops the lock when a process ends, however it ends. Raises UserError if nothing can be written, or if
    another run holds the folder, and says which.
    """
    folder = Path(path)
    if dist_env()[0]:
        yield folder
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write-test"
        probe.write_text("")
        probe.unlink()
        lock = FileLock(folder / ".lock")
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"--weights_path {folder}: another run writes there ({_holder(folder)}): wait for it, end it, "
                        "or name another folder") from error  # fmt: skip
    except OSError as error:
        raise UserError(f"--weights_path {folder}: cannot be written: {error.strerror or error}") from error
    try:
        clean_up(folder)
        holder = {
            "process": os.getpid(),
            "host": socket.gethostname(),
            "started": datetime.now().isoformat(timespec="seconds"),
            "command": sys.argv,
        }
        atomic_write_text(folder / HOLDER_FILE, json.dumps(holder, indent=1) + "\n")
        yield folder
    finally:
        lock.release()


def clean_up(folder: Path) -> None:
    """Put in order what a run that was killed has left in its folder."""
    for old in (*folder.glob("checkpoints/.step-*.old"), *folder.glob(".prm.old")):
        place = old.with_name(old.name.removeprefix(".").removesuffix(".old"))
        if not place.exists():  # killed just before the new one got its name: the old one is whole
            old.rename(place)
    for pattern in (".dry-run-*", "checkpoints/.step-*", ".taken-over", ".prm.*"):
        for left in folder.glob(pattern):
            shutil.rmtree(left, ignore_errors=True)


def _holder(folder: Path) -> str:
    """Who holds the folder, in words."""
    try:
        holder = json.loads((folder / HOLDER_FILE).read_text(encoding="utf-8"))
        return f"process {holder['process']} on {holder['host']}, since {holder['started']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "it has not said who it is"


def archive_previous_run(folder: Path) -> None:
    """Move what an earlier run left into `earlier-1`, `earlier-2`, …: nothing is lost, nothing of two runs is mixed."""
    left = [folder / name for name in OUTPUTS if (folder / name).exists()]
    if left:
        place = next(p for n in itertools.count(1) if not (p := folder / f"earlier-{n}").exists())
        place.mkdir()
        for item in left:
            item.rename(place / item.name)
        print(f"what an earlier run left in {folder} is now in {place}")


def prepare_output_dir(config: TrainingConfig, folder: Path, place: Path | None) -> None:
    """Make the output folder ready for a run that starts (place None) or goes on from the checkpoint at `place`.

    What an earlier run left is moved aside, but with --resume; history goes back to the checkpoint. A checkpoint from
    elsewhere is copied, so that --resume finds it from the first moment on. The main process does all this.
    """
    if not collectives.is_rank0():
        return
    if place is None:
        archive_previous_run(folder)
        (folder / "checkpoints").mkdir(exist_ok=True)  # now, not at the first save: it might not be possible
        return
    history = (place / HISTORY_FILE).read_text(encoding="utf-8")
    if config.run.resume_from is not None:
        waiting = folder / ".taken-over"
        atomic_write_dir(waiting, lambda aside: shutil.copytree(place, aside, dirs_exist_ok=True))
        archive_previous_run(folder)
        (folder / "checkpoints").mkdir()
        waiting.rename(folder / "checkpoints" / place.name)
    atomic_write_text(folder / HISTORY_FILE, history)
