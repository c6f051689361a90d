"""A headless Chromium, driven over a pair of pipes by its own protocol: no driver and no further package."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
    *("--remote-debugging-pipe", "--hide-scrollbars", "--force-color-profile=srgb"),
)


class Tab:
    """The one tab of a browser.

    Attributes:
        problems: what its console said of errors and warnings.
    """

    def __init__(self, incoming: FileIO, outgoing: FileIO) -> None:
        self._in, self._out = incoming, outgoing
        self._buffer, self._number = b"", 0
        self._session: str | None = None
        self.problems: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def open(self, url: str) -> None:
        """Open an address and wait until it is loaded."""
        self._call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, script: str) -> Any:
        """The value of an expression; a promise is awaited."""
        found = self._call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            raise AssertionError(found["exceptionDetails"])
        return found["result"].get("value")

    def wait(self, condition: str, seconds: float = 120) -> None:
        """Wait until an expression is true."""
        script = f"""new Promise((done, fail) => {{
          const end = Date.now() + {1000 * seconds};
          const look = () => ({condition}) ? done() : Date.now() > end ? fail("waited in vain") : setTimeout(look, 50);
          look();
        }})"""
        self.run(script)

    def show(self, width: int, height: int = 900, *, dark: bool = False) -> None:
        """Set the size of the window and the colours that the user prefers."""
        phone = width < 700
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone}
        self._call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])

    def key(self, key: str, code: int, text: str = "", modifiers: int = 0) -> None:
        """Press a key."""
        about = {"key": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        self._call("Input.dispatchKeyEvent", type="keyDown", **about, **({"text": text} if text else {}))
        self._call("Input.dispatchKeyEvent", type="keyUp", **about)

    def write(self, text: str) -> None:
        """Type a text where the cursor is."""
        self._call("Input.insertText", text=text)

    def picture(self, file: Path, height: int | None = None) -> None:
        """Save a picture of the page down to a height, by default all of it."""
        size = self.run("[document.documentElement.clientWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": size[0], "height": height or size[1], "scale": 1}
        found = self._call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(found["data"]))

    def _call(self, method: str, **values: Any) -> Any:
        self._number += 1
        message = {"id": self._number, "method": method, "params": values}
        if self._session:
            message["sessionId"] = self._session
        self._out.write(json.dumps(message).encode() + b"\0")
        while True:
            found = self._next()
            if found.get("id") == self._number:
                if "error" in found:
                    raise AssertionError(f"{method}: {found['error']}")
                return found["result"]
            self._note(found.get("method", ""), found.get("params", {}))

    def _next(self) -> Any:
        while b"\0" not in self._buffer:
            part = self._in.read(1 << 16)
            if not part:
                raise AssertionError("the browser has ended")
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(line)

    def _note(self, event: str, values: Any) -> None:
        if event == "Runtime.exceptionThrown":
            self.problems.append(str(values["exceptionDetails"]))
        elif event == "Runtime.consoleAPICalled" and values["type"] in {"error", "warning", "assert"}:
            self.problems.append(str(values["args"]))
        elif event == "Log.entryAdded" and values["entry"]["level"] in {"error", "warning"}:
            self.problems.append(f"{values['entry']['text']} {values['entry'].get('url', '')}")


@contextmanager
def browser() -> Iterator[Tab]:
    """A tab of a browser that lives for the length of the block."""
    with tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True) as profile:
        theirs, write = os.pipe()
        read, answers = os.pipe()
        # The browser looks for its pipes at 3 and 4.
        actions = [
            (os.POSIX_SPAWN_DUP2, theirs, 3),
            (os.POSIX_SPAWN_DUP2, answers, 4),
            (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
        ]
        command = [str(BROWSER), *FLAGS, f"--user-data-dir={profile}"]
        process = os.posix_spawn(command[0], command, os.environ, file_actions=actions)
        os.close(theirs)
        os.close(answers)
        with os.fdopen(read, "rb", 0) as incoming, os.fdopen(write, "wb", 0) as outgoing:
            try:
                yield Tab(incoming, outgoing)
            finally:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
