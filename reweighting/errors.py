"""The one exception that means "the user can mend this", and how a command ends."""

LISTED_PROBLEMS = 20  # of one kind that a message names


class UserError(Exception):
    """Something in the user's files, flags or folders is wrong.

    The message names the place and the remedy. The commands print it to stderr and exit with code 2;
    library callers may catch it as any other exception.
    """


class UnreadableImage(UserError):
    """An image file cannot be read, now at least."""
