"""What the commands share: an error becomes one line on stderr and an exit code."""

import errno
import re
import signal
import sys
from collections.abc import Callable

from reweighting.errors import UserError
from reweighting.terminal import printable
from reweighting.training.signals import STDERR, Stopped

# Kinds of OSError that say something about the disk, not about this program.
DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def run_command(main: Callable[[list[str]], None], after_interrupt: str) -> None:
    """Run a command's `main` on the command line's flags. Exits, without a traceback, with 2 on UserError and on what
    the system says of a file or disk, with 128 + its number on a signal; `after_interrupt` says what to do then."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as the commands set it while their packages load
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.stdout is not None:  # closed by whoever started this
        sys.stdout.reconfigure(errors="replace")  # a console that knows no block characters still gets its table
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {printable(error)}", file=STDERR)
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
