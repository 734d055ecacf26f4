"""Drives Chromium by its DevTools protocol over a pipe, without packages."""

import json
import os
import pathlib
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from typing import Any

_TIMEOUT = 60  # seconds
NAMES = ("chromium", "chromium-browser", "google-chrome")


def find_browser() -> str | None:
    """Returns the path of an installed browser."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """A headless browser with one page; what it logs is in ``errors`` and ``requests``."""

    def __init__(self, program: str, profile: pathlib.Path) -> None:
        command_in, self._to = os.pipe()
        self._from, events_out = os.pipe()

        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        # Chromium reads commands from descriptor 3 and writes answers to 4.
        connect = ["bash", "-c", f'exec "$@" 3<&{command_in} 4>&{events_out}', "bash"]
        self._process = subprocess.Popen(
            [*connect, program, *options, "--remote-debugging-pipe", f"--user-data-dir={profile}"],
            pass_fds=(command_in, events_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(command_in)
        os.close(events_out)
        self._messages, self._count = self._read(), 0
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def _read(self) -> Iterator[dict[str, Any]]:
        buffer = b""
        while select.select([self._from], [], [], _TIMEOUT)[0] and (chunk := os.read(self._from, 2**16)):
            *messages, buffer = (buffer + chunk).split(b"\0")
            yield from map(json.loads, messages)
        raise TimeoutError(f"the browser has ended, or said nothing for {_TIMEOUT} seconds")

    def _next(self) -> dict[str, Any]:
        message = next(self._messages)
        method, params = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(str(params["exceptionDetails"]))
        elif method in ("Runtime.consoleAPICalled", "Log.entryAdded"):
            self.errors.append(str(params))
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        return message

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Calls a method of the protocol and returns its result."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._count:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, page: pathlib.Path | str, width: int, dark: bool = False) -> None:
        """Opens a file or address on a screen of this width, and waits until it is loaded."""
        screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **screen)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=page if isinstance(page, str) else page.as_uri())
        while self._next().get("method") != "Page.loadEventFired":
            pass

    def evaluate(self, expression: str) -> Any:
        """Returns the value of a JavaScript expression."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait_for(self, expression: str) -> Any:
        """Waits until a JavaScript expression is true; returns its value."""
        end = time.monotonic() + _TIMEOUT
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < end, f"{expression} did not become true"
            time.sleep(0.02)
        return value

    def close(self) -> None:
        """Ends the browser."""
        self._process.terminate()
        self._process.wait(timeout=20)
        os.close(self._to)
        os.close(self._from)
