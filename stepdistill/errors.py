"""The one exception that means: the input is wrong, here is what to do about it."""


class UserError(ValueError):
    """Input that cannot work; the command line prints the message and exits with code 2."""
