"""The one exception that stands for a user's mistake."""


class UserError(Exception):
    """A mistake of the user's: one line saying what came, what was expected and the cure.

    The command line prints the message without a traceback and exits with status 2.
    """
