"""A few commands of the W3C WebDriver protocol: opens pages in headless Chromium and looks at them."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Self

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_SECONDS = 60.0
# A window that has a size but no screen, a browser that reports nothing home, and no sandbox, which needs rights that
# a container does not give.
_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-default-browser-check",
)  # fmt: skip


def find() -> tuple[str, str] | None:
    """(browser, driver) of this machine; None without them."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


class Browser:
    """A window. Use as a context manager.

    Keeps the browser's console and network log: `console()` and `requests()` give what came since the last call.
    """

    def __init__(self, browser: str, driver: str, *, log: Path) -> None:
        self._log = log.open("w+b")
        self._driver = subprocess.Popen([driver, "--port=0"], stdout=self._log, stderr=subprocess.STDOUT)
        try:
            self._root = f"http://127.0.0.1:{self._port(log)}"
            wanted = {
                "browserName": "chrome",
                "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
                "goog:chromeOptions": {"binary": browser, "args": list(_FLAGS)},
            }
            made = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
            self._root += f"/session/{made['sessionId']}"
        except BaseException:
            self._stop()
            raise

    def _port(self, log: Path) -> int:
        """The port the driver chose, which it prints."""
        end = time.monotonic() + _SECONDS
        while time.monotonic() < end and self._driver.poll() is None:
            for line in log.read_text(errors="replace").splitlines():
                if "started successfully on port" in line:
                    return int(line.rstrip(". ").rpartition(" ")[2])
            time.sleep(0.05)
        raise RuntimeError(f"chromedriver did not start: {log.read_text(errors='replace')}")

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._root + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=_SECONDS) as reply:
                return json.load(reply)["value"]
        except urllib.error.HTTPError as problem:
            raise RuntimeError(json.load(problem)["value"]["message"]) from None

    def open(self, path: Path) -> None:
        """Opens a file anew, whatever was open before, and waits until all of it is there."""
        self._ask("POST", "/url", {"url": "about:blank"})
        self._ask("POST", "/url", {"url": path.resolve().as_uri()})
        ready, deadline = (
            "return document.readyState === 'complete' && location.protocol === 'file:'",
            time.monotonic() + 30,
        )
        while not self.run(ready):
            assert time.monotonic() < deadline, f"{path} was not loaded in 30 s"
            time.sleep(0.05)

    def run(self, script: str, *arguments: Any) -> Any:
        """The value that the body of a JavaScript function returns."""
        return self._ask("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def press(self, keys: str) -> None:
        """Presses keys one after the other, as a person at the keyboard."""
        strokes = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._ask("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": strokes}]})

    def devtools(self, command: str, **parameters: Any) -> Any:
        """A command of Chromium's own protocol."""
        return self._ask("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def size(self, width: int, height: int) -> None:
        """Makes the page's window so large, in CSS pixels."""
        self.devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def theme(self, name: str) -> None:
        """What the user prefers: "light" or "dark"."""
        self.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def console(self) -> list[str]:
        """Warnings and errors that the page caused."""
        return [f"{line['level']}: {line['message']}" for line in self._ask("POST", "/se/log", {"type": "browser"})]

    def requests(self) -> list[str]:
        """Addresses that were asked for."""
        lines = self._ask("POST", "/se/log", {"type": "performance"})
        found = [json.loads(line["message"])["message"] for line in lines]
        return [m["params"]["request"]["url"] for m in found if m["method"] == "Network.requestWillBeSent"]

    def picture(self) -> bytes:
        """PNG file of what the window shows."""
        return base64.b64decode(self._ask("GET", "/screenshot"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._ask("DELETE", "")
        finally:
            self._stop()

    def _stop(self) -> None:
        self._driver.terminate()
        self._driver.wait(timeout=_SECONDS)
        self._log.close()
