"""The one exception that stands for a user's mistake, and what its lines are made of."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake of the user's: one line saying what came, what was expected and the cure.

    The command line prints the message without a traceback and exits with status 2.
    """


def first_line(error: BaseException) -> str:
    """The first line of what an error says, its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a line about a ``name`` that does not exist: the nearest of those ``known``, if one is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
