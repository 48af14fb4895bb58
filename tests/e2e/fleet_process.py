"""`cortex demo --no-chat` as a real process, for the end-to-end tests."""

from __future__ import annotations

import contextlib
import http.client
import json
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

MODEL = "cortex/demo"
LISTENING = re.compile(r"cortex is listening on (http://\S+)")
METRICS = re.compile(r"^Metrics: (http://\S+)/metrics$")


class FleetProcess:
    """The demo fleet: gateway, neuron and engine, started and stopped as a user would."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cortex_cli", "demo", "--no-chat", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.output: list[str] = []
        self._is_terminated = False
        self._urls: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        url = self._urls.get(timeout=240)
        if url is None:
            raise AssertionError("the demo ended while starting:\n" + "".join(self.output))
        self.url = url
        metrics_url = self._urls.get(timeout=30)
        assert metrics_url is not None
        self.metrics_url = metrics_url
        self.neuron_url: str = self.get("/admin/fleet")["nodes"][0]["endpoint"]

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output.append(line)
            match = LISTENING.search(line) or METRICS.search(line)
            if match:
                self._urls.put(match[1])
        self._urls.put(None)

    def get(self, path: str, *, base: str | None = None) -> Any:
        status, _, body = call(base or self.url, "GET", path)
        assert status == 200, (path, status, body)
        return json.loads(body)

    def terminate(self) -> None:
        """SIGTERM, once: a second one means "do not wait for streams"."""
        if not self._is_terminated and self.process.poll() is None:
            self._is_terminated = True
            self.process.send_signal(signal.SIGTERM)

    def stop(self) -> int:
        self.terminate()
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


def call(
    base: str,
    method: str,
    path: str,
    body: bytes | dict[str, Any] | None = None,
    headers: dict[str, str] | None = None,
    timeout: float = 120,
) -> tuple[int, dict[str, str], bytes]:
    """One plain HTTP exchange: status, headers in lower case, body."""
    parts = urlsplit(base)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout)
    payload = json.dumps(body).encode() if isinstance(body, dict) else body
    try:
        connection.request(method, path, body=payload, headers={"content-type": "application/json", **(headers or {})})
        response = connection.getresponse()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
    finally:
        connection.close()


def eventually(condition: Callable[[], Any], *, within_s: float, what: str) -> Any:
    """Poll `condition` until it is truthy. For state of another process that has no event to wait on."""
    deadline = time.monotonic() + within_s
    while True:
        with contextlib.suppress(ConnectionError):
            value = condition()
            if value:
                return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within_s} s: {what}")
        time.sleep(0.02)
