"""A real headless Chromium, driven over a pipe in its own protocol (CDP): no driver, no server, no further package.

with open_page(path, folder) as page:
    page.errors, page.requests, page.evaluate("document.title"), page.screenshot(picture)
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--hide-scrollbars",
    "--no-first-run",
    "--remote-debugging-pipe",
]
WAIT_S = 120.0


def missing() -> str:
    """Return why there can be no browser, or nothing."""
    return "" if shutil.which("chromium") else "no chromium; tools/install_apt_packages.sh installs it"


class Page:
    """One open page: what it said, what it asked the network for, and questions to it."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self.read_fd, self.write_fd = read_fd, write_fd
        self.buffer, self.number, self.session = b"", 0, ""
        self.errors: list[str] = []
        """Errors and warnings of the console, exceptions, and what the browser complains about."""
        self.requests: list[str] = []
        """Every address that was asked for; data: addresses are not."""
        self.loaded = False

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.read_fd], [], [], left)[0]:
                raise TimeoutError("chromium does not answer")
            data = os.read(self.read_fd, 1 << 20)
            if not data:
                raise EOFError("chromium ended")
            self.buffer += data
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command; note every event until its answer comes."""
        self.number += 1
        request = {"id": self.number, "method": method, "params": params}
        if self.session:
            request["sessionId"] = self.session
        os.write(self.write_fd, json.dumps(request).encode() + b"\0")
        deadline = time.monotonic() + WAIT_S
        while True:
            message = self._receive(deadline)
            if message.get("id") == self.number:
                assert "error" not in message, (method, message["error"])
                return message["result"]
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        match message.get("method"):
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
                self.errors.append(str([argument.get("value") for argument in params["args"]]))
            case "Runtime.exceptionThrown":
                self.errors.append(params["exceptionDetails"]["text"])
            case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                self.errors.append(params["entry"]["text"])
            case "Network.requestWillBeSent" if not params["request"]["url"].startswith("data:"):
                self.requests.append(params["request"]["url"])
            case "Page.loadEventFired":
                self.loaded = True

    def open(self, address: str) -> None:
        """Open a page and wait until it is loaded."""
        self.call("Page.navigate", url=address)
        deadline = time.monotonic() + WAIT_S
        while not self.loaded:
            self._note(self._receive(deadline))

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def screenshot(self, picture: Path) -> None:
        """Write the whole page as a PNG."""
        answer = self.call("Page.captureScreenshot", captureBeyondViewport=True, format="png")
        picture.write_bytes(base64.b64decode(answer["data"]))


@contextlib.contextmanager
def open_page(path: Path, profile: Path, width: int = 1200, height: int = 900) -> Iterator[Page]:
    """Open a local HTML file; ``profile`` is a folder for the browser's own files."""
    to_browser, from_browser = os.pipe(), os.pipe()

    def hand_over() -> None:  # the protocol wants to be read on 3 and written on 4
        copies = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (to_browser[0], from_browser[1])]
        os.dup2(copies[0], 3)
        os.dup2(copies[1], 4)

    command = ["chromium", *FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}", "about:blank"]
    with (profile / "chromium.log").open("wb") as log:
        process = subprocess.Popen(
            command, preexec_fn=hand_over, close_fds=False, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    os.close(to_browser[0])
    os.close(from_browser[1])
    try:
        page = Page(from_browser[0], to_browser[1])
        tab = next(t for t in page.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        page.session = page.call("Target.attachToTarget", targetId=tab["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.open(path.resolve().as_uri())
        yield page
        page.session = ""
        page.call("Browser.close")
    finally:
        os.close(from_browser[0])
        os.close(to_browser[1])
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
