"""Drive headless Chromium by its DevTools protocol, through two pipes and without a library."""

import fcntl
import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --remote-debugging-pipe"
)


class Tab:
    """A page that is open in a browser.

    Attributes:
        requested: addresses of what the page has requested.
        complaints: uncaught exceptions and messages on the console.
    """

    def __init__(self, commands: Any, answers: Any) -> None:
        self.requested, self.complaints = list[str](), list[str]()
        self._commands, self._answers, self._number, self._session = commands, answers, 0, None
        self._loaded = False
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        self._commands.write(json.dumps(message).encode() + b"\0")
        self._commands.flush()
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _read(self) -> dict[str, Any]:
        content = bytearray()
        while (byte := self._answers.read(1)) != b"\0":
            assert byte, "the browser has ended"
            content += byte
        answer = json.loads(content)
        values = answer.get("params", {})
        match answer.get("method"):
            case "Network.requestWillBeSent":
                self.requested.append(values["request"]["url"])
            case "Page.loadEventFired":
                self._loaded = True
            case "Runtime.exceptionThrown" | "Runtime.consoleAPICalled" | "Log.entryAdded":
                self.complaints.append(json.dumps(values)[:500])
        return answer

    def open(self, path: Path, width: int, height: int) -> None:
        """Open a file in a window of this size, and wait until it is loaded."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        self._loaded = False
        self.call("Page.navigate", url=path.as_uri())
        while not self._loaded:
            self._read()

    def run(self, code: str) -> Any:
        """Return the value of an expression of JavaScript, awaited if it is a promise."""
        answer = self.call(
            "Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """Press and release a key, such as "ArrowRight"."""
        codes = {"ArrowRight": 39, "End": 35, "Enter": 13}
        for kind in ("rawKeyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key],
            )  # fmt: skip


@contextmanager
def browser(profile: Path) -> Iterator[Tab]:
    """Yield a page of a new browser, which ends with the block.

    Args:
        profile: a new folder for the browser's files.
    """
    from_us, to_us = os.pipe(), os.pipe()
    high = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (from_us[0], to_us[1])]
    process = os.posix_spawn(
        str(CHROMIUM),
        [str(CHROMIUM), *FLAGS.split(), f"--user-data-dir={profile}"],
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_DUP2, high[0], 3),  # the browser reads from 3 and writes to 4
            (os.POSIX_SPAWN_DUP2, high[1], 4),
            *((os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_WRONLY, 0) for number in (1, 2)),
        ],
    )
    for end in (from_us[0], to_us[1], *high):
        os.close(end)
    try:
        with open(from_us[1], "wb") as commands, open(to_us[0], "rb") as answers:
            yield Tab(commands, answers)
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
