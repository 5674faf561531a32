"""The one exception that means "the user can mend this": shown without a traceback, exit code 2."""


class UserError(Exception):
    """Something in the user's files, flags or folders is wrong.

    The message names the place and the remedy. `main.py` prints it to stderr and exits with code 2;
    library callers may catch it as any other exception.
    """
