"""What the commands share: how a process starts, and how an error becomes one line on stderr and an exit code."""

import errno
import importlib
import os
import shlex
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from types import ModuleType

import psutil

from reweighting.distributed.rank0_output import dist_env, end_process, rank0_output
from reweighting.errors import ProcessLost, UserError
from reweighting.out_of_memory import describe_out_of_memory, is_out_of_memory
from reweighting.terminal import DetachableStream, printable
from reweighting.training.signals import STDERR, Stopped

# Kinds of OSError that say something about the disk, not about this program.
DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)

# Betty's metadata names no Python newer than 3.10, so it cannot be a dependency, and a plain `pip install` refuses it.
INSTALL_BETTY = "pip install --no-deps --ignore-requires-python betty-ml==0.2.1"


class CommandError(Exception):
    """A command's foreseen end, in one line.

    Args:
        message: what is printed.
        code: the exit code; 2 is an error of the user's or the system's.
    """

    def __init__(self, message: str, code: int = 2):
        super().__init__(message)
        self.code = code


def run_command(module: str) -> None:
    """Run a command and end this process with its exit code; of several processes, only process 0 prints.

    The module is imported here, so that errors and Ctrl-C while packages load end without a traceback too; before it,
    its flags, which load in a fraction of the time.

    Args:
        module: name of the command's module; its flags are in `config/commands.py`. It has `main(argv)`;
            `AFTER_INTERRUPT`: what to do after Ctrl-C or a full disk, in words that follow a semicolon; and
            `LESS_MEMORY`: what to do where memory runs out.

    Raises:
        SystemExit: with 2 for a UserError, for what the system reports of a file or disk and where memory runs out;
            with 128 + its number for a signal.
    """
    several = dist_env().world_size > 1
    try:
        prepare_process()
        with rank0_output():
            lost = _recorded(_run)(module)
    except CommandError as end:
        if several:
            end_process(end.code, str(end))
        print(f"error: {end}" if end.code == 2 else end, file=STDERR)
        sys.exit(end.code)
    except KeyboardInterrupt:  # before the command's own code
        print("interrupted", file=STDERR)
        sys.exit(128 + signal.SIGINT)
    except SystemExit as error:  # argparse has printed
        if several and error.code:
            message = f"its flags cannot be parsed: {printable(shlex.join(sys.argv[1:])[:500], one_line=True)}"
            end_process(2, "" if dist_env().rank == 0 else message)
        raise
    except Exception:
        if several:
            end_process(1, traceback.format_exc())
        raise
    if lost is not None:
        end_process(2, printable(lost), lost=True)


def prepare_process() -> None:
    """Set what must be set before torch is loaded, and let output outlive its reader (`| head -1`)."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if os.environ.get("OMP_NUM_THREADS") != "1" and "OMP_WAIT_POLICY" not in os.environ and machine_is_busy():
        # Threads that spin while they wait keep a busy core from the one that they wait for; where all cores are free,
        # spinning is faster: benchmarks/openmp_wait.py.
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    if sys.warnoptions:  # `-W error` is meant for this package: other packages warn of their use of each other
        warnings.filterwarnings("default", module=r"(?!reweighting\b)")
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None:  # closed by whoever started this
            stream.reconfigure(errors="replace")  # a console without block characters still gets its table
            setattr(sys, name, DetachableStream(stream))


def machine_is_busy() -> bool:
    """Tell whether others take half a core or more, of those that this process may use, at this moment."""
    percent = psutil.cpu_percent(interval=0.2, percpu=True)
    own = psutil.Process().cpu_affinity() if hasattr(psutil.Process, "cpu_affinity") else range(len(percent))
    return sum(percent[core] for core in own if core < len(percent)) >= 50


def _recorded(run: Callable[[str], ProcessLost | None]) -> Callable[[str], ProcessLost | None]:
    """Leave errors where torchrun looks for them, if it has started this process; its report repeats them."""
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return run
    from torch.distributed.elastic.multiprocessing.errors import record

    return record(run)


def _run(module: str) -> ProcessLost | None:
    """Import a command and run it. Raises CommandError for every foreseen end.

    Returns:
        The loss of another process: no error of this one, which torchrun might take for the cause.
    """
    command = None
    quits = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    try:
        if quits:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C inside an import would end in a traceback
        from reweighting.config.commands import CONFIGS

        CONFIGS[module].parse(sys.argv[1:]).check_files()  # an error, or `--help`, need not wait for the next line
        command = importlib.import_module(module)
        if quits:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        command.main(sys.argv[1:])
    except ProcessLost as error:
        return error
    except (Exception, KeyboardInterrupt) as error:
        foreseen = _foreseen_end(error, command)
        if foreseen is None:
            raise
        raise foreseen from None
    return None


def _foreseen_end(error: BaseException, command: ModuleType | None) -> CommandError | None:
    """One line for the user and an exit code; None for an error that is a fault of this program.

    Args:
        error: what a command ended with.
        command: its module; None if that could not be imported.
    """
    after_interrupt = getattr(command, "AFTER_INTERRUPT", "")
    match error:
        case UserError():
            return CommandError(printable(error))
        case ModuleNotFoundError(name=str(name)) if name.partition(".")[0] == "betty":
            return CommandError(f"training needs Betty, which is installed by itself: {INSTALL_BETTY}")
        case KeyboardInterrupt():
            return CommandError(f"interrupted; {after_interrupt}", 128 + signal.SIGINT)
        case Stopped():
            return CommandError(f"{printable(error)}; {after_interrupt}", 128 + error.signum)
        case _ if is_out_of_memory(error):
            remedy = getattr(command, "LESS_MEMORY", "End other programs")
            return CommandError(f"{describe_out_of_memory(error)}. {remedy}. {after_interrupt}")
        case OSError(errno=int(number), strerror=reason):
            place = f"{printable(str(error.filename)[:200])}: " if error.filename else ""
            written = f"cannot be written: {reason}; {after_interrupt}"
            return CommandError(f"{place}{written if number in DISK_TROUBLE else reason}")
    return None
