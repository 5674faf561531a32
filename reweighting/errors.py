"""The one exception that means "the user can mend this", and how a command ends."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """Something in the user's files, flags or folders is wrong.

    The message names the place and the remedy. The commands print it to stderr and exit with code 2;
    library callers may catch it as any other exception.
    """


def run_command(main: Callable[[list[str]], None], after_interrupt: str) -> None:
    """Run a command's `main` on the command line's flags. Exits with 2 on UserError and 130 on Ctrl-C, without a
    traceback; `after_interrupt` says what to do then."""
    sys.stdout.reconfigure(errors="replace")  # a console that knows no block characters still gets its table
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"interrupted; {after_interrupt}", file=sys.stderr)
        sys.exit(130)
