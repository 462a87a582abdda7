"""Drives a headless Chromium over its debugging pipe: no driver, no port, no network."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["Browser", "browser_path", "open_browser"]

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_SWITCHES = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
    "--force-prefers-reduced-motion",
    "--remote-debugging-pipe",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)
# The browser reads commands from descriptor 3 and writes to 4; nothing but exec runs between.
_START = (
    "import os, sys; commands, answers = map(int, sys.argv[1:3]); "
    "os.dup2(commands, 3); os.dup2(answers, 4); os.execvp(sys.argv[3], sys.argv[3:])"
)
_FIRST_FREE_DESCRIPTOR = 10


def browser_path() -> str | None:
    """The first Chromium or Chrome on the path."""
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


@contextmanager
def open_browser(profile: Path) -> Iterator[Browser]:
    """Start a browser with an empty profile; it is stopped however the block ends."""
    program = browser_path()
    assert program is not None
    commands, write = os.pipe()
    read, answers = os.pipe()
    high = [
        fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, _FIRST_FREE_DESCRIPTOR)
        for end in (commands, answers)
    ]
    process = subprocess.Popen(
        [
            *(sys.executable, "-I", "-c", _START, str(high[0]), str(high[1]), program),
            *(*_SWITCHES, f"--user-data-dir={profile}"),
        ],
        pass_fds=high,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for end in (commands, answers, *high):
        os.close(end)
    browser = Browser(write, read)
    try:
        browser.attach()
        yield browser
    finally:
        os.close(write)
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(read)


class Browser:
    """One page of a running browser.

    Attributes:
        complaints: Console errors and warnings, uncaught exceptions and violations of the page's
            security policy, as text.
        requests: Addresses of everything that was asked for.
    """

    def __init__(self, write: int, read: int) -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self._write, self._read = write, read
        self._buffer = b""
        self._number = 0
        self._session = ""

    def attach(self) -> None:
        """Open an empty page and listen to what it reports."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def show(
        self, address: str, *, width: int = 1280, height: int = 900, dark: bool = False
    ) -> None:
        """Open a page at a size and wait until it says that it is ready."""
        self.resize(width, height, dark=dark)
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=address)
        self.wait_for("document.documentElement?.dataset.ready === 'yes'")

    def resize(self, width: int, height: int, *, dark: bool = False) -> None:
        """Set size and colour scheme."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            **{"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def value(self, expression: str) -> Any:
        """What an expression of the page's language gives there, as plain data."""
        done = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def wait_for(self, condition: str, seconds: float = 20.0) -> None:
        """Wait until a condition holds on the page."""
        deadline = time.monotonic() + seconds
        while not self.value(condition):
            assert time.monotonic() < deadline, f"{condition}; {self.complaints}"
            time.sleep(0.02)

    def settle(self) -> None:
        """Wait until what was asked for is painted."""
        frame = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
        self.value(f"{frame}.then(() => true)")

    def press(self, key: str) -> None:
        """Press and release a key where the focus is."""
        codes = {"Enter": 13, "Tab": 9, "ArrowRight": 39, "ArrowLeft": 37, " ": 32}
        text = {"Enter": "\r", " ": " "}.get(key, "")
        event = {"key": key, "windowsVirtualKeyCode": codes[key], "text": text}
        self.call("Input.dispatchKeyEvent", type="keyDown", **event)
        self.call("Input.dispatchKeyEvent", type="keyUp", **{**event, "text": ""})

    def point_at(self, selector: str) -> None:
        """Move the pointer over the middle of an element."""
        node = f"document.querySelector({json.dumps(selector)})"
        self.value(f"{node}.scrollIntoView({{block: 'center'}})")
        self.settle()
        x, y = self.value(
            f"(() => {{ const b = {node}.getBoundingClientRect();"
            "return [b.left + b.width / 2, b.top + b.height / 2]; })()"
        )
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def picture(self, selector: str | None = None, *, small: bool = False) -> bytes:
        """A PNG of what is in sight, or of one element; quickly made, or a small file."""
        clip: dict[str, Any] = {}
        if selector is not None:
            node = f"document.querySelector({json.dumps(selector)})"
            # What is out of sight may not be laid out, and would be missing in the picture.
            self.value(f"{node}.scrollIntoView({{block: 'center'}})")
            self.settle()
            box = self.value(
                f"(() => {{ const b = {node}.getBoundingClientRect();"
                "return {x: b.x + scrollX, y: b.y + scrollY, width: b.width, height: b.height};"
                "})()"
            )
            clip = {"clip": {**box, "scale": 1}, "captureBeyondViewport": True}
        self.settle()
        done = self.call("Page.captureScreenshot", optimizeForSpeed=not small, **clip)
        return base64.b64decode(done["data"])

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the debugging protocol; its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._send(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                result: dict[str, Any] = answer["result"]
                return result
            self._note(answer)

    def _note(self, event: dict[str, Any]) -> None:
        method, said = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(said["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(said["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and said["type"] in (
            "error",
            "warning",
            "assert",
        ):
            self.complaints.append(json.dumps(said["args"]))
        elif method == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
            self.complaints.append(said["entry"]["text"])

    def _send(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._write, data) :]

    def _receive(self, seconds: float = 60.0) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], deadline - time.monotonic())
            assert ready, "the browser does not answer"
            data = os.read(self._read, 1 << 20)
            assert data, "the browser has gone"
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\0", 1)
        message: dict[str, Any] = json.loads(line)
        return message
