"""The output folder of a run: one run at a time writes there, and nothing that is not a run's is touched.

`run.json` says which run writes into the folder, or did last, and which of the outputs belong to runs. Only these are
archived when another run starts there.
"""

import itertools
import json
import os
import shutil
import socket
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from reweighting.config.training import TrainingConfig
from reweighting.distributed import collectives
from reweighting.distributed.rank0_output import dist_env
from reweighting.errors import UserError
from reweighting.files import atomic_write_dir, atomic_write_text, open_regular, remove_temporaries, temporary_dir
from reweighting.terminal import printable
from reweighting.training.checkpoints import HISTORY_FILE, checkpoint_name, read_manifest

CHECKPOINTS, RESULTS = (
    "checkpoints",
    (
        "domain_weights.json",
        "instance_weights.parquet",
        "instance_weights.html",
        "instance_net.safetensors",
        "corrected_labels.parquet",
        "prm",
        "figures",
    ),  # fmt: skip
)
OUTPUTS = (CHECKPOINTS, HISTORY_FILE, "diagnostics", *RESULTS)
RUN_FILE = "run.json"


@contextmanager
def lock_output_dir(path: str, inputs: Mapping[str, Sequence[str]]) -> Generator[Path]:
    """Hold the output folder as long as the context is open; of several processes, process 0 does.

    The folder is made if it is missing, and cleared of what killed runs have left unfinished. The system drops the
    lock when a process ends, however it ends.

    Args:
        path: the folder.
        inputs: {what a message calls it: files and folders that the run reads}.

    Yields:
        The folder.

    Raises:
        UserError: if another run holds the folder, a file in it is not a run's, an input lies among the outputs, or
            something in it may not be written.
    """
    folder = Path(path)
    if dist_env()[0]:
        yield folder
        return
    _check_inputs(folder, inputs)
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"--weights_path {folder}: another run writes there ({_holder(folder)}): wait for it, stop it, "
                        "or name another folder") from error  # fmt: skip
    except OSError as error:
        raise _cannot_write(folder, error) from error
    try:
        _prepare_locked(folder)
        yield folder
    finally:
        lock.release()


def _check_inputs(folder: Path, inputs: Mapping[str, Sequence[str]]) -> None:
    """Raise UserError if the run would move or overwrite what it reads."""
    target = Path(os.path.realpath(folder))
    for name, value in ((name, value) for name, values in inputs.items() for value in values):
        path = Path(os.path.realpath(value))
        if not path.is_relative_to(target) or not path.exists():
            continue
        inside = path.relative_to(target).parts
        if (inside and inside[0] in (*OUTPUTS, RUN_FILE)) or (not inside and "reward_model" in name):
            raise UserError(
                f"{name} {value} lies among the outputs in --weights_path {folder}, which this run would move or "
                "overwrite: name another --weights_path, or first move that input elsewhere"
            )


def _prepare_locked(folder: Path) -> None:
    """Clear the folder, check that it can be written and holds nothing but runs' outputs, and sign `run.json`."""
    try:
        remove_temporaries(folder)
        remove_temporaries(folder / CHECKPOINTS)
        outputs = _read_run_file(folder).get("outputs")
        known = outputs if isinstance(outputs, list) else []
        present = [name for name in OUTPUTS if os.path.lexists(folder / name)]
        if foreign := [name for name in present if name not in known]:
            raise UserError(f"--weights_path {folder}: {' and '.join(foreign)} there may be yours: {RUN_FILE} does not "
                            "say that a run wrote it. Name another folder, or move it away (a run that you moved here "
                            "without that file: --resume_from)")  # fmt: skip
        _write_run_file(folder, [name for name in OUTPUTS if name in known])
        for name in present:  # known now, not at the first save
            if (folder / name).is_dir():
                with temporary_dir(folder / name, "write-test"):
                    pass
    except OSError as error:
        raise _cannot_write(folder, error) from error


def _cannot_write(folder: Path, error: OSError) -> UserError:
    reason = error.strerror or error
    where = f" ({error.filename})" if error.filename and Path(error.filename).parent != folder else ""
    return UserError(f"--weights_path {folder}: cannot be written: {reason}{where}")


def _read_run_file(folder: Path) -> dict:
    """Read `run.json`: {} if there is none that makes sense."""
    try:
        with open_regular(folder / RUN_FILE) as file:
            content = json.load(file)
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_run_file(folder: Path, outputs: list[str]) -> None:
    """Sign the folder as this process's. outputs: the names in it that belong to runs."""
    content = {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "started": datetime.now().isoformat(timespec="seconds"),
        "command": sys.argv,
        "outputs": outputs,
    }
    atomic_write_text(folder / RUN_FILE, json.dumps(content, indent=1) + "\n")


def _holder(folder: Path) -> str:
    """Say who holds the folder."""
    try:
        run = _read_run_file(folder)
        process, host, started = int(run["process"]), str(run["host"]), str(run["started"])
        if host != socket.gethostname() or psutil.pid_exists(process):
            return f"process {process} on {host:.100}, since {started:.30}"
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        pass
    return "it has just started"  # what the file says is of an earlier run


def archive_previous_run(folder: Path) -> None:
    """Move what an earlier run left into `earlier-1`, `earlier-2`, …: nothing is lost, nothing of two runs is mixed."""
    left = [folder / name for name in OUTPUTS if os.path.lexists(folder / name)]
    if left:
        archive = next(p for n in itertools.count(1) if not os.path.lexists(p := folder / f"earlier-{n}"))
        archive.mkdir()
        for item in left:
            item.rename(archive / item.name)
        print(f"the outputs of an earlier run in {printable(folder)} are now in {printable(archive)}")


def prepare_output_dir(config: TrainingConfig, folder: Path, checkpoint_dir: Path | None) -> None:
    """Make the output folder ready for a run; process 0 does it.

    Without --resume, what an earlier run left is archived. A checkpoint from another folder is copied, so that --resume
    finds it from the first moment on. The history goes back to the checkpoint.

    Args:
        config: the flags.
        folder: the output folder, which this process holds.
        checkpoint_dir: the checkpoint that the run resumes from; None at a start.

    Raises:
        UserError: if the checkpoint cannot be copied.
    """
    if not collectives.is_rank0():
        return
    if checkpoint_dir is None:
        if not (config.run.resume and _nothing_saved(folder)):  # else --resume makes the same steps again
            archive_previous_run(folder)
        _write_run_file(folder, list(OUTPUTS))
        (folder / CHECKPOINTS).mkdir(exist_ok=True)  # now, not at the first save: it might not be possible
        return
    history = (checkpoint_dir / HISTORY_FILE).read_text(encoding="utf-8")
    if config.run.resume_from is not None:
        name = checkpoint_name(read_manifest(checkpoint_dir).step)
        atomic_write_dir(
            folder / CHECKPOINTS,
            lambda new: shutil.copytree(checkpoint_dir, new / name),
            set_aside=lambda: archive_previous_run(folder),
        )
    _write_run_file(folder, list(OUTPUTS))
    atomic_write_text(folder / HISTORY_FILE, history)


def _nothing_saved(folder: Path) -> bool:
    """Whether the run that was here ended before its first checkpoint: it left the history of unsaved steps at most."""
    saved = [name for name in RESULTS if os.path.lexists(folder / name)]
    return not saved and not any((folder / CHECKPOINTS).glob("*"))
