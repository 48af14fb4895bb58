"""Requests as bytes on a socket: the headers are exactly those that a test names."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from typing import Any, NamedTuple
from urllib.parse import urlsplit

TIMEOUT_S = 30

Headers = tuple[tuple[str, str], ...]

WEBSOCKET: Headers = (
    ("connection", "upgrade"),
    ("upgrade", "websocket"),
    ("sec-websocket-version", "13"),
    ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
)


class Answer(NamedTuple):
    """body: all that came until the server closed, in chunks or not. code: of an error, in either dialect."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def code(self) -> str | None:
        try:
            error = json.loads(self.body)["error"]
        except (ValueError, KeyError, TypeError):
            return None
        return error.get("code") or error.get("details", {}).get("error_code")


async def ask(
    url: str,
    method: str,
    path: str,
    body: Any = None,
    *,
    host: str | None = "",
    headers: Iterable[tuple[str, str]] = (),
    version: str = "1.1",
) -> Answer:
    """host: empty takes that of the URL, None sends none."""
    parts = urlsplit(url)
    payload = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/{version}"]
    lines += [] if host is None else [f"host: {host or parts.netloc}"]
    lines += [f"{name}: {value}" for name, value in headers]
    if not any(name == "connection" for name, _ in headers):
        lines.append("connection: close")
    if payload:
        lines += ["content-type: application/json", f"content-length: {len(payload)}"]
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        writer.write("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + payload)
        async with asyncio.timeout(TIMEOUT_S):
            head = await reader.readuntil(b"\r\n\r\n")
            # A handshake that was taken up would not end by itself.
            rest = b"" if head.startswith(b"HTTP/1.1 101") else await reader.read()
    finally:
        writer.close()
    status_line, *fields = head.decode("latin-1").rstrip("\r\n").split("\r\n")
    found = {name.lower(): value.strip() for name, _, value in (field.partition(":") for field in fields)}
    return Answer(int(status_line.split()[1]), found, rest)
