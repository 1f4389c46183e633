"""The two ways a command ends badly: the input is wrong, or the training is."""


class UserError(ValueError):
    """Input that cannot work; the command line prints the message and exits with code 2."""


class Diverged(RuntimeError):
    """A loss or a weight stopped being finite; the command line prints the message and exits with code 1."""


def first_line(error: Exception) -> str:
    """What an error of another library says first, or its name where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
