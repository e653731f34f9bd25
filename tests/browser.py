"""Headless Chromium, driven by its DevTools protocol over a pipe, for tests of pages."""

from __future__ import annotations

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
WAITING = 60.0  # seconds


class Browser:
    """A page in a browser. asked: the URLs that it has requested; said: what went wrong, by its console."""

    def __init__(self, sends: int, hears: int) -> None:
        self._sends, self._hears, self._numbers, self._rest = sends, hears, itertools.count(1), b""
        self.asked, self.said = list[str](), list[str]()
        target = self._call("Target.createTarget", {"url": "about:blank"}, session=False)["targetId"]
        self._session = self._call("Target.attachToTarget", {"targetId": target, "flatten": True}, session=False)
        for domain in ("Page", "Network", "Runtime", "Log"):
            self._call(f"{domain}.enable")

    def _call(self, method: str, params: dict[str, Any] | None = None, *, session: bool = True) -> dict[str, Any]:
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": params or {}}
        if session:
            message["sessionId"] = self._session["sessionId"]
        os.write(self._sends, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + WAITING
        while (found := self._next(until)).get("id") != number:
            self._note(found)
        assert "error" not in found, found["error"]
        result: dict[str, Any] = found["result"]
        return result

    def _next(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._hears], [], [], max(0.0, until - time.monotonic()))
            assert ready, "the browser does not answer"
            part = os.read(self._hears, 1 << 20)
            assert part, "the browser has ended"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        if event["method"] == "Network.requestWillBeSent":
            self.asked.append(params["request"]["url"])
        elif event["method"] in ("Log.entryAdded", "Runtime.exceptionThrown"):
            self.said.append(json.dumps(params))

    def size(self, width: int, height: int, *, dark: bool = False) -> None:
        """Give the page a width and a height, and its reader's choice of colours."""
        phone = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._call("Emulation.setDeviceMetricsOverride", phone)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._call("Emulation.setEmulatedMedia", {"features": scheme})

    def open(self, url: str) -> None:
        self._call("Page.navigate", {"url": url})

    def run(self, script: str) -> Any:
        """Return the value of an expression in the page."""
        found = self._call("Runtime.evaluate", {"expression": script, "returnByValue": True, "awaitPromise": True})
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until an expression is true in the page."""
        end = time.monotonic() + WAITING
        while not self.run(f"Boolean({condition})"):
            assert time.monotonic() < end, f"{condition}: not within {WAITING:g} s"
            time.sleep(0.05)

    def type(self, field: str, text: str) -> None:
        """Write into the field of an id."""
        self.run(f"document.getElementById({json.dumps(field)}).focus()")
        self._call("Input.insertText", {"text": text})

    def press(self, key: str) -> None:
        """Press a key that writes nothing, such as Tab."""
        codes = {"Tab": 9, "Enter": 13}
        for kind in ("keyDown", "keyUp"):
            event = {"type": kind, "key": key, "code": key, "windowsVirtualKeyCode": codes[key]}
            self._call("Input.dispatchKeyEvent", {**event, **({"text": "\r"} if key == "Enter" else {})})

    def shot(self, file: Path) -> None:
        """Write a picture of the whole page."""
        whole = {"format": "png", "captureBeyondViewport": True}
        file.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", whole)["data"]))


@contextmanager
def opened(profile: Path) -> Iterator[Browser]:
    """A browser with a profile of its own; the test is skipped where there is none."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium here")
    to_browser, from_browser = os.pipe(), os.pipe()

    def pipes() -> None:
        reads, writes = os.dup(to_browser[0]), os.dup(from_browser[1])
        os.dup2(reads, 3)
        os.dup2(writes, 4)

    options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--hide-scrollbars"]
    options += ["--disable-background-networking", "--no-first-run", f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(
        [found, *options], close_fds=False, preexec_fn=pipes, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(to_browser[0])
    os.close(from_browser[1])
    try:
        yield Browser(to_browser[1], from_browser[0])
    finally:
        process.terminate()
        process.wait(20)
        os.close(to_browser[1])
        os.close(from_browser[0])
