"""A small HTTP client for the command line, on the standard library: aiohttp's import alone costs 150 ms."""

from __future__ import annotations

import http.client
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from cortex_core.sse import SseDecoder, SseEvent

from cortex_cli.exits import EXIT_FAILED, EXIT_NOT_FOUND, EXIT_UNREACHABLE, CliError


class Gateway:
    """One gateway (or neuron) at `endpoint`. Raises `CliError` for whatever goes wrong.

    `CORTEX_API_KEY` is sent where it is set; there is no option for it, since command lines are seen by everyone.
    """

    def __init__(self, endpoint: str, *, timeout_s: float = 600.0) -> None:
        parts = urlsplit(endpoint if "//" in endpoint else f"http://{endpoint}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise CliError(f"`{endpoint}` is not an http(s) URL", 2)
        self.endpoint = f"{parts.scheme}://{parts.netloc}"
        self._connection_type = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._host, self._port, self._base = parts.hostname, parts.port, parts.path.rstrip("/")
        self._timeout_s = timeout_s

    def get(self, path: str) -> Any:
        return self._json("GET", path, None)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        return self._json("POST", path, body)

    def delete(self, path: str) -> Any:
        return self._json("DELETE", path, None)

    def _json(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        with self._exchange(method, path, body, accept="application/json") as response:
            text = response.read()
        try:
            return json.loads(text)
        except ValueError as exc:
            raise CliError(f"{self.endpoint}{path} answered something that is not JSON; is it a gateway?") from exc

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[tuple[str, str]]:
        """POST and yield (event name, data) of each server-sent event as it arrives."""
        with self._exchange("POST", path, body, accept="text/event-stream") as response:
            decoder = SseDecoder()
            try:
                while chunk := response.read1(65536):
                    for event in decoder.feed(chunk):
                        if isinstance(event, SseEvent):
                            yield event.event or "message", event.data
            except (OSError, http.client.HTTPException) as exc:
                raise CliError(f"the stream from {self.endpoint} broke off: {exc}") from exc

    def lines(self, path: str) -> Iterator[str]:
        """GET and yield each line as it arrives."""
        with self._exchange("GET", path, None, accept="application/x-ndjson") as response:
            try:
                while line := response.readline():
                    yield line.decode("utf-8", "replace").rstrip("\n")
            except (OSError, http.client.HTTPException) as exc:
                raise CliError(f"the lines from {self.endpoint} broke off: {exc}") from exc

    @contextmanager
    def _exchange(
        self, method: str, path: str, body: dict[str, Any] | None, *, accept: str
    ) -> Iterator[http.client.HTTPResponse]:
        connection = self._connection_type(self._host, self._port, timeout=self._timeout_s)
        headers = {"accept": accept}
        if key := os.environ.get("CORTEX_API_KEY"):
            headers["authorization"] = f"Bearer {key}"
        payload = None
        if body is not None:
            payload = json.dumps(body).encode()
            headers["content-type"] = "application/json"
        try:
            try:
                connection.request(method, self._base + path, body=payload, headers=headers)
                response = connection.getresponse()
            except (OSError, http.client.HTTPException) as exc:
                raise CliError(
                    f"no answer from {self.endpoint}: {exc}. Is it running? (--endpoint names another)",
                    EXIT_UNREACHABLE,
                ) from exc
            if response.status >= 400:
                raise _error_of(response.status, response.read(65536))
            yield response
        finally:
            connection.close()


def _error_of(status: int, body: bytes) -> CliError:
    message = body.decode("utf-8", "replace").strip() or f"HTTP {status}"
    try:
        error = json.loads(body)["error"]
        message = error["message"] if isinstance(error, dict) else str(error)
    except (ValueError, KeyError, TypeError):
        pass
    return CliError(message, EXIT_NOT_FOUND if status == 404 else EXIT_FAILED)
