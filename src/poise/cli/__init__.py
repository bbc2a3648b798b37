"""The command `poise` and its subcommands, from `poise train` to `poise export`.

Results go to stdout, progress and errors to stderr. Exit code 0: success. 2: wrong input. 1: the
work failed. If the reader of either stream ends, as `head` does, the command finishes its work
without printing. torch is imported after the arguments are parsed, so that help is fast.

In reading order: `options` (options of several commands), `showing` (tables and warnings), then the
commands: `train`, `images`, `score`, `measure`, `study`, `share`, `doctor`.
"""

import atexit
import contextlib
import difflib
import io
import os
import re
import signal
import sys
from collections.abc import Iterator
from dataclasses import fields
from itertools import dropwhile, takewhile
from typing import Any, NoReturn

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from poise.cli.doctor import Doctor
from poise.cli.images import Encode, Interpolate, Reconstruct, Sample
from poise.cli.measure import Diagnose, Evaluate
from poise.cli.options import TrainingCommand
from poise.cli.score import Score
from poise.cli.share import Explore, Export
from poise.cli.study import Compare, Report, Reproduce
from poise.cli.train import Train
from poise.errors import InputError, Interrupted, RunError
from poise.recipes import Recipe, find_recipe
from poise.support.guards import any_asked
from poise.support.progress import SafeStream
from poise.support.version import __version__

DESCRIPTION = "Variational autoencoders whose balance of reconstruction and KL is computed."
SPIN_COUNT = ("GOMP_SPINCOUNT", "1000")  # spins of an idle OpenMP thread before it sleeps
COMMANDS = {
    "train": Train,
    "sample": Sample,
    "encode": Encode,
    "reconstruct": Reconstruct,
    "interpolate": Interpolate,
    "score": Score,
    "evaluate": Evaluate,
    "diagnose": Diagnose,
    "compare": Compare,
    "reproduce": Reproduce,
    "report": Report,
    "explore": Explore,
    "export": Export,
    "doctor": Doctor,
}
TYPES = ConstructorRegistry()


@TYPES.primitive_rule
def name_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[str] | None:
    """Show string options as NAME in the help, instead of tyro's STR."""
    if info.type is not str:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="NAME",
        instance_from_str=lambda words: words[0],
        is_instance=lambda value: isinstance(value, str),
        str_from_instance=lambda value: [value],
    )


def main() -> None:
    """Run the command that the arguments name, and exit."""
    occupy_standard_streams()
    handle_signals()
    let_threads_sleep()
    print_any_name(sys.stdout)
    out, err = SafeStream(sys.stdout, only_pipes=True), SafeStream(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            _run()
        finally:
            out.finish()
            err.finish()


def occupy_standard_streams() -> None:
    """Open the null device for each standard stream that is closed.

    Otherwise the next file that is opened takes its number, and libraries write messages into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def handle_signals() -> None:
    """Choose what the signals do outside the blocks of `stop_signals`.

    SIGTERM and SIGHUP exit normally, so that temporary files are deleted. SIGHUP stays ignored
    under nohup. The first Ctrl-C raises KeyboardInterrupt.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    hangup = getattr(signal, "SIGHUP", None)  # absent on Windows
    if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:
        signal.signal(hangup, lambda *_: sys.exit(129))
    signal.signal(signal.SIGINT, interrupt)
    if hasattr(signal, "pthread_sigmask"):  # absent on Windows
        # Python gives up its handlers before its last work; a Ctrl-C then would kill it.
        atexit.register(signal.pthread_sigmask, signal.SIG_BLOCK, {signal.SIGINT})


def interrupt(number: int, frame: Any) -> None:
    """Raise KeyboardInterrupt at the first Ctrl-C, and end the process at the second.

    An exception at the second Ctrl-C could surface anywhere, even while Python exits, as a
    traceback. Files are written atomically, so the last checkpoint is intact.
    """
    signal.signal(signal.SIGINT, end_at_once)
    if any_asked():
        end_at_once()
    raise KeyboardInterrupt


def end_at_once(*signalled: Any) -> NoReturn:
    """End the process with exit code 130, after one line on stderr."""
    with contextlib.suppress(OSError):
        os.write(2, b"poise: interrupted again: what is not saved is lost\n")
    os._exit(130)


def print_any_name(stream: Any) -> None:
    """Let a stream print names of files that its encoding lacks, with escapes, as stderr does."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")


def let_threads_sleep() -> None:
    """Let idle OpenMP threads sleep soon, unless the environment sets OMP_WAIT_POLICY.

    By default, idle threads of GNU OpenMP spin. On a busy machine they take a core from the thread
    they wait for. Images/s with two threads, and another process on one of two cores: ResNet at 64
    pixels 16.0 before and 24.6 now, infogan at 32 pixels 101 before and 350 now. On idle cores 47.0
    before and 47.1 now (AMD EPYC, 2026-11-26). torch reads the variable when it is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault(*SPIN_COUNT)


def _run() -> None:
    try:
        parse(sys.argv[1:]).run()
    except InputError as error:
        fail(str(error), 2)
    except Interrupted as error:
        fail(str(error), 130, prefix="poise: ")
    except RunError as error:
        fail(str(error), 1)
    except OSError as error:
        fail(str(error), 1)
    except (MemoryError, RuntimeError) as error:
        texts = ("out of memory", "not enough memory", "can't allocate memory")
        if not isinstance(error, MemoryError) and not any(t in str(error) for t in texts):
            raise
        fail(f"not enough memory: {error}", 1)
    except KeyboardInterrupt:
        fail("interrupted", 130)


def parse(arguments: list[str]) -> Any:
    """Return the command with its options.

    A wrong option prints one line on stderr and exits with code 2. Without arguments, the help is
    shown.
    """
    arguments = arguments or ["--help"]
    if arguments == ["--version"]:
        print(f"poise {__version__}")
        sys.exit()
    commands, complaint = with_options(None), io.StringIO()
    others = [word for word in arguments if word not in ("-h", "--help")]
    if len(others) < len(arguments):  # help: the other arguments name the recipe
        commands = with_options(recipe_of(others, commands))
        arguments = [*others[:1], "--help"]
    try:
        with contextlib.redirect_stderr(complaint):
            return read(arguments, commands)
    except SystemExit as exit:
        if exit.code:
            name = f"poise {arguments[0]}" if arguments[0] in COMMANDS else "poise"
            suggestion = _suggestion(arguments, commands)
            fail(f"{one_line(complaint.getvalue())}{suggestion} (see {name} --help)", 2)
        raise


def read(arguments: list[str], commands: dict[str, type]) -> Any:
    """Return the command with its options. tyro prints help and errors, and exits."""
    tyro._experimental_options["ansi_codes"] = not os.environ.get("NO_COLOR")
    return tyro.extras.subcommand_cli_from_dict(
        commands,
        args=arguments,
        prog="poise",
        description=DESCRIPTION,
        config=(tyro.conf.DisallowNone,),
        registry=TYPES,
    )


def with_options(recipe: Recipe | None) -> dict[str, type]:
    """Return the commands with all their options.

    Args:
        recipe: its values are the defaults in the help. None: see `TrainingCommand.with_options`.
    """
    return {
        name: command.with_options(recipe) if issubclass(command, TrainingCommand) else command
        for name, command in COMMANDS.items()
    }


def recipe_of(arguments: list[str], commands: dict[str, type]) -> Recipe | None:
    """Return the recipe that DATA or --recipe names.

    None: neither is given, or the arguments are wrong.
    """
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            command = read(arguments, commands)
        data, recipe = getattr(command, "data", None), getattr(command, "recipe", None)
        return find_recipe(recipe, data) if data or recipe else None
    except (SystemExit, InputError):
        return None


def _suggestion(arguments: list[str], commands: dict[str, type]) -> str:
    """Return "did you mean ...?" for a misspelt command or option, or an empty text."""
    name, *options = arguments
    if name not in commands:
        given, known = [name], list(commands)
    else:
        known = ["--" + option.replace("_", "-") for option in option_names(commands[name])]
        given = [text.partition("=")[0] for text in options if text.startswith("--")]
    for text in given:
        if text not in known and (like := difflib.get_close_matches(text, known, n=1, cutoff=0.75)):
            return f"; did you mean {like[0]}?"
    return ""


def option_names(command: type) -> Iterator[str]:
    """Yield the names of a command's options, including those in groups."""
    for option in fields(command):
        if isinstance(option.default_factory, type):  # a group of options
            yield from option_names(option.default_factory)
        else:
            yield option.name


def one_line(box: str) -> str:
    """Return the message inside the box that tyro draws, on one line and without colours."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [line.strip("│| ") for line in plain.splitlines()[1:]]  # the first is the title
    borders = "╭╰─╮╯+-"  # "+" and "-" if the locale has no box characters
    inside = dropwhile(lambda line: not line.strip(borders), lines)
    message = " ".join(takewhile(lambda line: line.strip(borders), inside))
    return _wrong_value(message) or plain.strip()


def _wrong_value(line: str) -> str:
    """Return tyro's message about a wrong value in plain words.

    Other messages are returned unchanged.
    """
    if found := re.match(
        r"invalid choice '(.*)' for argument '(.*)'\. Expected one of \((.*)\)\.$", line
    ):
        value, option, listed = found.groups()
        # tyro also lists None where it is the default.
        allowed = sorted(set(re.findall(r"'([^']*)'", listed)) - {"None"})
        return (
            f"{option} cannot be {value!r}; there are {', '.join(allowed)}, "
            f"as in {option} {allowed[0]}"
        )
    if found := re.match(r"Error parsing (\S+): no type matching (INT|FLOAT) .* \[(.*)\]\.", line):
        option, kind, value = found.groups()
        return f"{option} must be {'a whole number' if kind == 'INT' else 'a number'}, not {value}"
    return line


def fail(message: str, code: int, prefix: str = "poise: error: ") -> NoReturn:
    """Print one line on stderr and exit.

    If there are several processes, ranks above 0 add their number.
    """
    number = os.environ.get("RANK", "0")
    prefix += f"process {number}: " if number != "0" else ""
    print(prefix + " ".join(message.split()), file=sys.stderr)
    sys.exit(code)
