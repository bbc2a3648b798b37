"""Test locks of folders and progress displays."""

import errno
import io
import signal
import subprocess
import sys
import threading

import pytest

from poise.errors import InputError
from poise.support import progress as progress_module
from poise.support.guards import locked
from poise.support.progress import progress

HOLD = """
import sys
from pathlib import Path
from poise.support.guards import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Start another process, which locks the folder "run"."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_folder_that_another_process_holds_is_refused_until_it_is_killed(holder, tmp_path):
    with (
        pytest.raises(InputError, match="another process is training there"),
        locked(tmp_path / "run"),
    ):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with locked(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()


def test_two_blocks_of_one_process_refuse_each_other(tmp_path):
    refused: list[str] = []

    def attempt() -> None:
        try:
            with locked(tmp_path / "run"):
                pass
        except InputError as error:
            refused.append(str(error))

    with locked(tmp_path / "run"):
        attempt()
        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()
        assert (tmp_path / "run").is_dir()
    assert refused == [f"{tmp_path / 'run'}: another process is training there"] * 2
    attempt()
    assert len(refused) == 2


def test_a_lock_ends_with_its_block_and_an_empty_folder_goes_with_it(tmp_path):
    folder = tmp_path / "new" / "run"
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), locked(folder):
            raise ZeroDivisionError
        assert not folder.exists()
    with locked(folder):
        (folder / "config.json").write_text("{}")
    assert (folder / "config.json").exists()
    with locked(folder):
        pass


def test_a_place_that_cannot_be_used_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match=r"cannot use .*file for the run: it is a file; give --out"),
        locked(tmp_path / "file"),
    ):
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="flock is POSIX")
@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_refused_for_that_reason(code, tmp_path, monkeypatch):
    def flock(*arguments):
        raise OSError(code, "no")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(InputError, match="its file system has no file locks"), locked(tmp_path):
        pass


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("rich.console.monotonic", clock)
    monkeypatch.setattr(progress_module.time, "monotonic", clock)
    return clock


def test_a_log_gets_a_line_every_quarter_of_a_minute_with_the_hours_and_minutes_left(clock, capsys):
    """Progress of one unit a second from 1000 on reaches 7200 after 6200 s."""
    with progress("stage 1", 7200, 1000) as display:
        for done in range(1001, 1032):
            clock.now += 1.0
            display.update(done, {"loss": "3.5", "kl": "2"})
        clock.now += 6169.0
        display.update(7200, {})
    assert capsys.readouterr().err.splitlines() == [
        "stage 1 1015/7200, 1:44 h left  loss 3.5  kl 2",
        "stage 1 1030/7200, 1:43 h left  loss 3.5  kl 2",
        "stage 1 7200/7200, 0:00 h left  ",
    ]


def test_the_time_left_is_unknown_at_first_and_known_however_rare_updates_are(clock, capsys):
    with progress("slow", 100) as display:
        for done in (0, 10, 20):
            clock.now += 100.0
            display.update(done, {})
    assert capsys.readouterr().err.splitlines() == [
        "slow 0/100  ",
        "slow 10/100  ",
        "slow 20/100, 0:14 h left  ",
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_and_nobody_who_asks_for_quiet_gets_anything(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    for quiet in (False, True):
        monkeypatch.setattr(sys, "stderr", screen := Terminal())
        with progress("stage 1", 4, quiet=quiet) as display:
            display.update(4, {"loss": "3.5"})
        shown = screen.getvalue()
        assert (shown == "") if quiet else all(word in shown for word in ("stage 1", "100%", "3.5"))
