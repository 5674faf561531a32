"""What the commands share: an error becomes one line on stderr and an exit code."""

import errno
import importlib
import os
import re
import signal
import sys

from reweighting.distributed.rank0_output import rank0_output
from reweighting.errors import UserError
from reweighting.terminal import printable
from reweighting.training.signals import STDERR, Stopped

# Kinds of OSError that say something about the disk, not about this program.
DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)

# Betty's metadata names no Python newer than 3.10, so it cannot be a dependency, and a plain `pip install` refuses it.
INSTALL_BETTY = "pip install --no-deps --ignore-requires-python betty-ml==0.2.1"


def run_command(module: str) -> None:
    """Run a command and end this process with its exit code; of several processes, only rank 0 prints.

    The module is imported here, so that errors and Ctrl-C while packages load end without a traceback too.

    Args:
        module: name of the command's module. It has `main(argv)`, and `AFTER_INTERRUPT`: what to do after Ctrl-C or a
            full disk, in words that follow a semicolon.

    Raises:
        SystemExit: with 2 for a UserError and for what the system reports of a file or disk, with 128 + its number for
            a signal.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if sys.stdout is not None:  # closed by whoever started this
        sys.stdout.reconfigure(errors="replace")  # a console without block characters still gets its table
    with rank0_output():
        _run(module)


def _run(module: str) -> None:
    quits = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    after_interrupt = ""
    try:
        if quits:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C inside an import would end in a traceback
        command = importlib.import_module(module)
        after_interrupt = command.AFTER_INTERRUPT
        if quits:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        command.main(sys.argv[1:])
    except UserError as error:
        print(f"error: {printable(error)}", file=STDERR)
        sys.exit(2)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "betty":
            raise
        print(f"error: training needs Betty, which is installed by itself: {INSTALL_BETTY}", file=STDERR)
        sys.exit(2)
    except OSError as error:
        if error.errno is None:  # not from the system
            raise
        place = f"{str(error.filename)[:200]}: " if error.filename else ""
        trouble = f"cannot be written: {error.strerror}; {after_interrupt}"
        print(f"error: {printable(place)}{trouble if error.errno in DISK_TROUBLE else error.strerror}", file=STDERR)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search("out of memory|not enough memory", str(error), re.I):
            raise
        print(f"error: out of memory; make --batch_size, --max_image_side or --max_length smaller. {after_interrupt}",
              file=STDERR)  # fmt: skip
        sys.exit(2)
    except Stopped as stopped:
        print(f"{stopped}; {after_interrupt}", file=STDERR)
        sys.exit(128 + stopped.signum)
    except KeyboardInterrupt:
        print(f"interrupted; {after_interrupt}", file=STDERR)
        sys.exit(130)
