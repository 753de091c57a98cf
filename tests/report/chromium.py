"""Drives a page in headless Chromium, over its debugging pipe."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = "chromium"
_PATIENCE_SECONDS = 60
_MIDDLE = """
globalThis.middleOf = element => {
  element.scrollIntoView({block: "center", behavior: "instant"});
  const box = element.getClientRects()[0];
  return [box.x + box.width / 2, box.y + box.height / 2];
}; 0
"""


class Page:
    """One open page; `problems` collects what its console and its scripts complained of."""

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read, self._left, self._last = write, read, b"", 0
        self.problems: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session: str | None = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Runtime", "Log", "Page", "Network"):
            self.call(f"{domain}.enable")

    _session = None

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._last:
                assert "error" not in answer, (method, answer)
                return answer["result"]
            self._note(answer)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._left:
            received = os.read(self._read, 2**20)
            assert received, "chromium ended"
            self._left += received
        message, _, self._left = self._left.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        method, parameters = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            details = parameters["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.problems.append(parameters["entry"]["text"])
        elif method == "Runtime.consoleAPICalled":
            self.problems.append(str(parameters["args"]))
        elif method == "Network.requestWillBeSent" and not parameters["request"]["url"].startswith(("file:", "data:")):
            self.problems.append(f"asks for {parameters['request']['url']}")

    def open(self, path: Path, *, width: int = 1280, height: int = 900) -> None:
        """Returns when the page shows its first response."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Page.navigate", url=path.as_uri())
        self.wait("document.documentElement && document.documentElement.dataset.ready")
        self.run(_MIDDLE)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression, JSON-like."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, script: str) -> None:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not self.run(script):
            assert time.monotonic() < deadline, f"waited too long for {script}"
            time.sleep(0.02)

    def press(self, key: str) -> None:
        text = {"text": key} if len(key) == 1 else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def hover(self, selector: str) -> None:
        box = self.run(f"middleOf(document.querySelector({json.dumps(selector)}))")
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])


@contextmanager
def chromium_page(profile: Path) -> Iterator[Page]:
    """A fresh browser with one page; it ends with the block."""
    to_browser, from_browser = os.pipe(), os.pipe()
    command = (
        f"exec {CHROMIUM} --headless=new --no-sandbox --disable-gpu --remote-debugging-pipe "
        f"--user-data-dir={profile} 3<&{to_browser[0]} 4>&{from_browser[1]}"
    )
    process = subprocess.Popen(
        ["bash", "-c", command], pass_fds=(to_browser[0], from_browser[1]), stderr=subprocess.DEVNULL
    )
    os.close(to_browser[0])
    os.close(from_browser[1])
    try:
        yield Page(to_browser[1], from_browser[0])
    finally:
        process.terminate()
        process.wait(20)
        os.close(to_browser[1])
        os.close(from_browser[0])
