"""The command `poise`: train, sample, encode, reconstruct, evaluate, diagnose, compare, reproduce, report.

Results go to stdout, progress and complaints to stderr. Exit code 0: done; 2: the input is wrong; 1: the work failed.
torch is imported after the arguments are read, so that help is instant.

In reading order: `options` (what commands have in common), `showing`, then the commands, `train`, `images`, `measure`, `study`.
"""

import contextlib
import io
import os
import re
import signal
import sys
from typing import Any, NoReturn

import tyro

from poise import __version__
from poise.cli.images import Encode, Reconstruct, Sample
from poise.cli.measure import Diagnose, Evaluate
from poise.cli.study import Compare, Report, Reproduce
from poise.cli.train import Train
from poise.errors import InputError, Interrupted, RunError

DESCRIPTION = "Variational autoencoders that balance themselves."
COMMANDS = {
    "train": Train,
    "sample": Sample,
    "encode": Encode,
    "reconstruct": Reconstruct,
    "evaluate": Evaluate,
    "diagnose": Diagnose,
    "compare": Compare,
    "reproduce": Reproduce,
    "report": Report,
}


def main() -> None:
    """Run the command that the arguments name, and exit."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exit like any other: half-written files go
    try:
        parse(sys.argv[1:]).run()
    except InputError as error:
        fail(str(error), 2)
    except Interrupted as error:
        fail(str(error), 130, prefix="poise: ")
    except RunError as error:
        fail(str(error), 1)
    except BrokenPipeError:
        os._exit(0)  # the reader of stdout has gone, as `head` does
    except OSError as error:
        fail(str(error), 1)
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error) and not isinstance(error, MemoryError):
            raise
        fail(f"not enough memory: {error}", 1)
    except KeyboardInterrupt:
        fail("interrupted", 130)


def parse(arguments: list[str]) -> Any:
    """The command with its options. A wrong option is one line on stderr and exit code 2."""
    if arguments == ["--version"]:
        print(f"poise {__version__}")
        sys.exit()
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.extras.subcommand_cli_from_dict(COMMANDS, args=arguments, prog="poise", description=DESCRIPTION)
    except SystemExit as exit:
        if exit.code:
            name = f"poise {arguments[0]}" if arguments and arguments[0] in COMMANDS else "poise"
            fail(f"{one_line(complaint.getvalue())} (see {name} --help)", 2)
        raise


def one_line(box: str) -> str:
    """The message inside the box that the parser draws, on one line, without the colours it has on a terminal."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [line.strip("│╭╰─╮╯ ") for line in plain.splitlines()[1:]]
    end = next((k for k, line in enumerate(lines) if not line), len(lines))
    return " ".join(lines[:end]) or plain.strip()


def fail(message: str, code: int, prefix: str = "poise: error: ") -> NoReturn:
    """One line on stderr, and exit. Of several processes, those after the first give their number."""
    number = os.environ.get("RANK", "0")
    prefix += f"process {number}: " if number != "0" else ""
    print(prefix + " ".join(message.split()), file=sys.stderr)
    sys.exit(code)
