"""What can go wrong, in two kinds: the input is wrong (exit code 2), or the work failed (exit code 1).

Every message is one line that says what was given, what is allowed and what to do. The command prints it and nothing else.
"""


class InputError(ValueError):
    """What the user gave cannot be used: a wrong option, a bad file, values out of range."""


class MissingInputError(InputError, FileNotFoundError):
    """A file or folder that the user named, or that a data set needs, is not there."""


class MissingExtraError(InputError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f'{what} needs an optional dependency: pip install "poise[{extra}]"')


class RunError(RuntimeError):
    """The input was fine and the work failed: non-finite loss, full disk, no intact checkpoint."""


class Interrupted(RunError):
    """Training was asked to stop (Ctrl-C or SIGTERM), saved its state and stopped."""
