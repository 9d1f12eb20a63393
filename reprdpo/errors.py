"""The one exception that stands for a user's mistake, and the line that others give to it."""


class UserError(Exception):
    """A mistake of the user's: one line saying what came, what was expected and the cure.

    The command line prints the message without a traceback and exits with status 2.
    """


def first_line(error: BaseException) -> str:
    """The first line of what an error says, its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
