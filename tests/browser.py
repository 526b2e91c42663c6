"""A headless Chromium, driven by the DevTools protocol over pipes: no port, no driver, no package.

https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from typing import Any

DEADLINE_S = 60.0
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

# The protocol's pipes are descriptors 3 and 4 of the browser: it reads from one and writes to the
# other. A shell puts them there.
_REDIRECT = 'exec 3<&{0} 4>&{1} {0}<&- {1}>&-; exec "$@"'
_FLAGS = (
    "--headless",
    "--no-sandbox",  # tests may run as root, in containers
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--no-proxy-server",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)


class NavigatedError(Exception):
    """The tab went to another page while it was asked something."""


class Page:
    """A tab. Whatever it reports on its console is kept."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from = to_browser, from_browser
        self._rest = b""
        self._number = 0
        self._session: str | None = None
        self._events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Calls a method of the protocol.

        Raises:
            NavigatedError: another page was opened meanwhile.
        """
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                if "navigated" in answer.get("error", {}).get("message", ""):
                    raise NavigatedError
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
            self._events.append(answer)

    def open(self, url: str) -> None:
        """Opens a page and waits until its script has run."""
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def value(self, expression: str) -> Any:
        """The value of an expression of JavaScript, or what its promise becomes."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, expression: str) -> None:
        """Waits until an expression is true."""
        deadline = time.monotonic() + DEADLINE_S
        while not self._is_true(expression):
            assert time.monotonic() < deadline, f"{expression}: {self.text()}"
            time.sleep(0.02)

    def _is_true(self, expression: str) -> bool:
        """Whether it is, of the page that is shown at the end of the question."""
        try:
            return bool(self.value(f"Boolean({expression})"))
        except NavigatedError:
            return False

    def text(self) -> str:
        """What the page shows."""
        shown: str = self.value("document.body.innerText")
        return shown

    def type(self, text: str) -> None:
        """Types into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, code: int, text: str = "", modifiers: int = 0) -> None:
        """Presses a key; `code` is its Windows virtual key code, 8 in `modifiers` is Shift."""
        common = {"key": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        down = {"type": "keyDown", "text": text} if text else {"type": "rawKeyDown"}
        self.call("Input.dispatchKeyEvent", **common, **down)
        self.call("Input.dispatchKeyEvent", **common, type="keyUp")

    def media(self, **features: str) -> None:
        """Sets what the user prefers, e.g. `prefers_color_scheme="dark"`."""
        listed = [
            {"name": name.replace("_", "-"), "value": value} for name, value in features.items()
        ]
        self.call("Emulation.setEmulatedMedia", features=listed)

    def picture(self, width: int, height: int) -> bytes:
        """A PNG of the page."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def complaints(self) -> list[str]:
        """Exceptions, and errors and warnings on the console, so far."""
        self.value("0")  # whatever was reported before this has arrived
        found = []
        for event in self._events:
            what = event.get("params", {})
            match event.get("method"):
                case "Runtime.exceptionThrown":
                    found.append(str(what["exceptionDetails"]))
                case "Runtime.consoleAPICalled":
                    found.append(str(what["args"]))
                case "Log.entryAdded" if what["entry"]["level"] in ("error", "warning"):
                    found.append(f"{what['entry']['text']} {what['entry'].get('url', '')}")
        return found

    def forget(self) -> None:
        """Forgets what was reported so far."""
        self._events.clear()

    def requests(self) -> list[str]:
        """The URLs of everything that was asked for."""
        return [
            event["params"]["request"]["url"]
            for event in self._events
            if event.get("method") == "Network.requestWillBeSent"
        ]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._from], [], [], DEADLINE_S)
            part = os.read(self._from, 1 << 16) if ready else b""
            assert part, "the browser does not answer"
            self._rest += part
        raw, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(raw)
        return message


@contextlib.contextmanager
def browsing() -> Iterator[Page]:
    """A fresh browser with one tab."""
    assert CHROMIUM is not None
    read_by_browser, to_browser = os.pipe()
    from_browser, written_by_browser = os.pipe()
    script = _REDIRECT.format(read_by_browser, written_by_browser)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            ["bash", "-c", script, "bash", CHROMIUM, *_FLAGS, f"--user-data-dir={profile}"],
            pass_fds=(read_by_browser, written_by_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": profile},
        )
        os.close(read_by_browser)
        os.close(written_by_browser)
        try:
            yield Page(to_browser, from_browser)
        finally:
            os.close(to_browser)
            process.terminate()
            process.wait(DEADLINE_S)
            os.close(from_browser)
