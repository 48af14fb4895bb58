"""An experiment: what hypercorn's pure-Python HTTP/1 parser costs the gateway, and what a C parser would save.

    python tests/bench/http1.py [--rounds 4] [--seconds 3] [--stream-seconds 4]

`cortex` is the gateway as it is; `fast` is the same gateway with hypercorn's `H11Protocol` replaced: requests are
parsed by llhttp (the C parser behind httptools, here in the copy that aiohttp brings along), and the answer's head and
chunks are framed by hand. It is good for this benchmark and for nothing else: no pipelining, no 100-continue, no
limits, no upgrade, no error answers. Everything else is as in `gateway.py`.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
from collections import deque
from pathlib import Path
from typing import Any

import gateway
import h11


class _Reading:
    """What aiohttp's stream wants of a protocol."""

    transport = None
    _reading_paused = False

    def pause_reading(self, **_: Any) -> None: ...

    def resume_reading(self, **_: Any) -> None: ...


class FastConnection:
    """As much of `h11.Connection` as hypercorn asks for."""

    they_are_waiting_for_100_continue = False
    trailing_data = (b"", False)

    def __init__(self, role: Any, max_incomplete_event_size: int) -> None:
        from aiohttp._http_parser import HttpRequestParser

        self.our_state: Any = h11.IDLE
        self.their_state: Any = h11.IDLE
        self.events: deque[Any] = deque()
        self.parser = HttpRequestParser(_Reading(), asyncio.get_running_loop(), 2**20)
        self.payload: Any = None
        self.is_closed = False

    def receive_data(self, data: bytes) -> None:
        if not data:
            self.is_closed = True
            return
        for message, payload in self.parser.feed_data(data)[0]:
            request = object.__new__(h11.Request)  # its constructor checks what the parser has checked
            for name, value in (
                ("method", message.method.encode()),
                ("target", message.path.encode()),
                ("http_version", b"1.1"),
                ("headers", [(name.lower(), value) for name, value in message.raw_headers]),
            ):
                object.__setattr__(request, name, value)
            self.events.append(request)
            self.payload = payload
        if self.payload is None:
            return
        if self.payload._buffer:
            self.events.append(h11.Data(data=b"".join(self.payload._buffer)))
            self.payload._buffer.clear()
        if self.payload.is_eof():
            self.events.append(h11.EndOfMessage())
            self.payload = None
            self.their_state = h11.DONE

    def next_event(self) -> Any:
        if self.events:
            return self.events.popleft()
        return h11.ConnectionClosed() if self.is_closed else h11.NEED_DATA

    def start_next_cycle(self) -> None:
        self.our_state = self.their_state = h11.IDLE


def install() -> None:
    import hypercorn.protocol
    from hypercorn.events import RawData
    from hypercorn.protocol import events
    from hypercorn.protocol import h11 as module

    class FastProtocol(module.H11Protocol):
        async def stream_send(self, event: Any) -> None:
            kind = type(event)
            if kind is events.Body:
                data = event.data
                if data:
                    data = b"%x\r\n%b\r\n" % (len(data), data) if self.is_chunked else data
                    await self.send(RawData(data=data))
            elif kind is events.Response:
                self.is_chunked = all(name != b"content-length" for name, _ in event.headers)
                headers = [*event.headers, *self.config.response_headers("h11")]
                if self.is_chunked:
                    headers.append((b"transfer-encoding", b"chunked"))
                lines = b"".join(b"%b: %b\r\n" % header for header in headers)
                await self.send(RawData(data=b"HTTP/1.1 %d \r\n%b\r\n" % (event.status_code, lines)))
            elif kind is events.EndBody:
                self.connection.our_state = h11.DONE
                if self.is_chunked:
                    await self.send(RawData(data=b"0\r\n\r\n"))
            elif kind is events.StreamClosed:
                await self._maybe_recycle()

    class FastH11:
        Connection = FastConnection

        def __getattr__(self, name: str) -> Any:
            return getattr(h11, name)

    module.h11 = FastH11()
    hypercorn.protocol.H11Protocol = FastProtocol


def main(options: Any) -> int:
    rounds = []
    print(f"{'round':>5} {'subject':>8} {'us/request':>11} {'requests':>9} {'us/chunk':>9} {'chunks':>8}")
    with tempfile.TemporaryDirectory(prefix="cortex-bench-") as scratch:
        for number in range(1, options.rounds + 1):
            order = ("cortex", "fast") if number % 2 else ("fast", "cortex")
            results = {name: gateway.one_round(name, options, Path(scratch)) for name in order}
            for name, got in results.items():
                print(
                    f"{number:>5} {name:>8} {got['request_us']:>11.0f} {got['requests']:>9.0f} "
                    f"{got['chunk_us']:>9.1f} {got['chunks']:>8.0f}",
                    flush=True,
                )
            rounds.append(results)
    for kind in ("request", "chunk"):
        ratios = [each["fast"][f"{kind}_us"] / each["cortex"][f"{kind}_us"] for each in rounds]
        listed = " ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"CPU per {kind}: {statistics.median(ratios):.2f}x with the C parser (rounds: {listed})")
    return 0


if __name__ == "__main__":
    gateway.__file__ = __file__  # the processes of a round are this script, too
    asked = gateway.parse()
    if asked.role == "main":
        raise SystemExit(main(asked))
    if asked.role == "_fast":
        install()
        asked.role = "_cortex"
    gateway.play(asked)
