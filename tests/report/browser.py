"""Chromium without a window, driven by its DevTools protocol over a pipe."""

import json
import os
import select
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

SECONDS = 120
"""Time after which an answer is no longer waited for."""

SWITCHES = (
    "--headless",
    "--no-sandbox",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--hide-scrollbars",
    "--disable-gpu-watchdog",
    "--no-first-run",
    # No name is found: a request that left the machine would fail, and be seen.
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--remote-debugging-pipe",
)

PROBE = """
window.failures = [];
addEventListener("error", (event) => failures.push(String(event.message)));
addEventListener("unhandledrejection", (event) => failures.push(String(event.reason)));
document.addEventListener("securitypolicyviolation", (event) => failures.push(event.blockedURI));
"""


class Browser:
    """A browser, until the context ends.

    Parameters
    ----------
    program : str
        Chromium.
    profile : Path
        Empty folder for what it keeps.
    """

    def __init__(self, program: str, profile: Path) -> None:
        there, self._to = os.pipe()
        self._from, back = os.pipe()
        # It reads from file 3 and writes to file 4.
        command = f'exec "$0" "$@" 3<&{there} 4>&{back}'
        self._process = subprocess.Popen(
            ["bash", "-c", command, program, *SWITCHES, f"--user-data-dir={profile}"],
            pass_fds=(there, back),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(there)
        os.close(back)
        self._left = b""
        self._number = 0
        self._events: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._call("Browser.close")
            self._process.wait(SECONDS)
        finally:
            self._process.kill()
            self._process.wait()
            os.close(self._to)
            os.close(self._from)

    def run(self, page: Path, script: str, size: tuple[int, int]) -> tuple[Any, list[str]]:
        """Open a page, run a script in it, and give what that returns, and what was requested.

        Raises
        ------
        AssertionError
            If the page, or the script, raised an error.
        """
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._events.clear()
        for name in ("Page", "Runtime", "Network"):
            self._call(f"{name}.enable", session)
        width, height = size
        self._call(
            "Emulation.setDeviceMetricsOverride",
            session,
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        self._call("Page.addScriptToEvaluateOnNewDocument", session, source=PROBE)
        self._call("Page.navigate", session, url=page.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._events.append(self._receive())
        expression = f"(async () => {{ {script} }})()"
        done = self._evaluate(session, expression)
        assert self._evaluate(session, "failures") == []
        self._call("Target.closeTarget", targetId=target)
        requested = [
            event["params"]["request"]["url"]
            for event in self._events
            if event["method"] == "Network.requestWillBeSent"
        ]
        return done, requested

    def _evaluate(self, session: str, expression: str) -> Any:
        answer = self._call(
            "Runtime.evaluate",
            session,
            expression=expression,
            awaitPromise=True,
            returnByValue=True,
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def _call(self, method: str, session: str | None = None, **params: Any) -> Any:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            got = self._receive()
            if got.get("id") == self._number:
                assert "error" not in got, got
                return got["result"]
            if "method" in got:
                self._events.append(got)

    def _receive(self) -> dict[str, Any]:
        """Wait for a message."""
        until = time.monotonic() + SECONDS
        parts = [self._left]
        while b"\0" not in parts[-1]:
            ready, _, _ = select.select([self._from], [], [], max(until - time.monotonic(), 0))
            assert ready, "the browser does not answer"
            part = os.read(self._from, 1 << 20)
            assert part, "the browser has ended"
            parts.append(part)
        message, _, self._left = b"".join(parts).partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found
