"""Errors: the input is wrong (exit code 2), or the work failed (exit code 1).

Every message is one line that says what was given, what is allowed and what to do. The command
prints this line and nothing else.
"""


class InputError(ValueError):
    """Raised for invalid input: a wrong option, a bad file, values out of range."""


class MissingInputError(InputError, FileNotFoundError):
    """Raised if a file or folder is missing that the user named or that a data set needs."""


class MissingExtraError(InputError, ImportError):
    """Raised if an optional dependency is not installed.

    Args:
        what: what needs it, the subject of the message.
        extra: name of the extra of the package `poise` that installs it.
    """

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f'{what} needs an optional dependency: pip install "poise[{extra}]"')


class RunError(RuntimeError):
    """Raised if the work fails on valid input: non-finite loss, full disk, no intact checkpoint."""


class Interrupted(RunError):
    """Raised after Ctrl-C or SIGTERM, when training has saved its state and stopped."""
