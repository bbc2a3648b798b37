"""Run Python code in forks of a server process that has imported torch and the package.

A new process imports torch for a second, and torch._dynamo, which every optimizer needs, for
another. A fork of the server has both in milliseconds. The server has no hooks that check types.
Use a clean interpreter instead (the fixture `run_python`) to test what an import brings.

`torch.multiprocessing.start_processes` with the start method "forkserver" uses the same server.
"""

import functools
import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
LIBRARIES = ("torch", "torch._dynamo", "sklearn.datasets", "sklearn.mixture", "rich.progress")
DRAWING = ("matplotlib.figure", "matplotlib.backends.backend_agg", "PIL.Image")
PACKAGE = ("poise.cli", "poise.runs.pipeline", "poise.studies.comparison")
CONTEXT.set_forkserver_preload([*LIBRARIES, *DRAWING, *PACKAGE, "pytest"])
SCRIPT = "import forking; forking.run_script()"


@dataclass(frozen=True)
class Forked:
    """A process that runs code, and the files with what it has printed."""

    process: multiprocessing.Process
    out: Path
    err: Path

    def end(self, seconds: float = 120) -> int | None:
        """Wait for the end of the process, at most some seconds, and return its exit code."""
        self.process.join(seconds)
        self.process.kill()
        self.process.join()
        return self.process.exitcode


def start(code: str, arguments: Sequence[str], folder: Path) -> Forked:
    """Run code in a fork, with `sys.argv` = arguments and the environment of this process."""
    out, err = folder / "stdout.txt", folder / "stderr.txt"
    process = CONTEXT.Process(target=_run, args=(code, [*arguments], dict(os.environ), out, err))
    process.start()
    return Forked(process, out, err)


def run(code: str, arguments: Sequence[str], folder: Path) -> str:
    """Run code in a fork, assert that it succeeds, and return what it printed."""
    forked = start(code, arguments, folder)
    assert forked.end() == 0, forked.err.read_text()
    return forked.out.read_text()


def _run(
    code: str, arguments: list[str], environment: dict[str, str], out: Path, err: Path
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.argv = arguments
    exec(compile(code, "<code of a test>", "exec"), {"__name__": "__main__"})


def run_script() -> None:
    """Run the script `sys.argv[0]`. The Python processes that it starts are forks of this one."""
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    fork = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda method=None: fork
    subprocess.Popen = ForkedPython
    runpy.run_path(sys.argv[0], run_name="__main__")


class ForkedPython(subprocess.Popen):
    """A process that runs a Python script or module without starting a new interpreter."""

    def __init__(self, args: Sequence[str], *, env: dict[str, str] | None = None, **how: Any):
        path = (env or os.environ).get("PYTHONPATH")
        python, *arguments = args
        if (
            python == sys.executable
            and (arguments[0] == "-m" or arguments[0].endswith(".py"))
            and path == os.environ.get("PYTHONPATH")
        ):
            sys.stdout.flush()
            sys.stderr.flush()
            # It is called when the pipes are in place, and never returns.
            how["preexec_fn"] = functools.partial(_interpret, arguments, env)
        super().__init__(args, env=env, **how)


def _interpret(arguments: list[str], environment: dict[str, str] | None) -> None:
    os.closerange(3, 1000)  # so `subprocess` takes the program as started
    gc.enable()
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    os.environ.update(environment or {})
    sys.stdin, sys.argv = open(0, closefd=False), arguments
    code = 1
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(arguments[0], run_name="__main__")
        code = 0
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        if isinstance(exit.code, str):
            print(exit.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
