"""What the gateway costs: CPU per request and per streamed chunk, beside a bare pass-through on the same server.

    python tests/bench/gateway.py [--rounds 4] [--seconds 3] [--stream-seconds 4] [--clients 64]
                                  [--auth off|key|limits|budget] [--json]
    python tests/bench/gateway.py --translated

Each round starts fresh processes in alternating order: a canned backend, the subject, a load generator. The
subjects are `floor` (the Starlette + aiohttp pass-through below, some 40 lines) and `cortex` (the gateway with
routing, metrics, access log, usage metering). CPU is utime + stime of the subject's process. Absolute times drift
with the machine; the ratio within a round does not, so the ratio is what is judged: at most 2.0 per request and
1.3 per chunk. With `--auth` the clients' key is known, has limits per minute, or a budget in SQLite as well; these
ratios are printed and not judged.

With `--translated` the backend is a server that speaks only OpenAI chat, and the subjects are the gateway's own
surfaces: `chat`, which passes through, and `messages` and `responses`, which are translated; at most 2.0 per chunk.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

MODEL = "bench/model"
ANSWER = json.dumps(
    {
        "id": "chatcmpl-0123456789abcdef",
        "object": "chat.completion",
        "created": 1760000000,
        "model": MODEL,
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": "a" * 300}, "finish_reason": "stop"},
        ],
        "usage": {"prompt_tokens": 20, "completion_tokens": 100, "total_tokens": 120},
    }
).encode()
CHUNK = (
    b'data: {"id":"chatcmpl-0123456789abcdef","object":"chat.completion.chunk","created":1760000000,'
    b'"model":"bench/model","choices":[{"index":0,"delta":{"content":"token "},"finish_reason":null}]}\n\n'
)
USAGE_BLOCK = b': cortex-usage {"prompt_tokens":20,"completion_tokens":100,"cached_tokens":0}\n\n'
FINISH = CHUNK.replace(b'{"content":"token "},"finish_reason":null', b'{},"finish_reason":"stop"')
DONE = b"data: [DONE]\n\n"
CLIENT_HEADERS = (
    b"user-agent: OpenAI/Python 2.0.0\r\naccept: application/json\r\naccept-encoding: gzip, deflate\r\n"
    b"content-type: application/json\r\nauthorization: Bearer none\r\nx-stainless-lang: python\r\n"
    b"x-stainless-package-version: 2.0.0\r\nx-stainless-os: Linux\r\nx-stainless-arch: x64\r\n"
    b"x-stainless-runtime: CPython\r\nx-stainless-retry-count: 0\r\nx-stainless-read-timeout: 600\r\n"
)
MAX_PER_REQUEST, MAX_PER_CHUNK, MAX_PER_TRANSLATED_CHUNK = 2.0, 1.3, 2.0

SURFACES: dict[str, tuple[str, dict[str, Any], bytes, bytes]] = {
    "chat": ("/v1/chat/completions", {}, b"data: {", b"[DONE]"),
    "messages": ("/v1/messages", {"max_tokens": 500}, b"event: content_block_delta", b"message_stop"),
    "responses": ("/v1/responses", {"max_output_tokens": 500}, b"event: response.output_text.delta", b'"completed"'),
}
"""Path, fields beside the common ones, what a chunk looks like, and what the last event holds."""


def body(stream: bool, surface: str) -> bytes:
    messages = [{"role": "user", "content": "What is 12+30? Answer in one word, please."}]
    prompt = {"input" if surface == "responses" else "messages": messages}
    return json.dumps({"model": MODEL, **prompt, **SURFACES[surface][1], "stream": stream}).encode()


# ---------------------------------------------------------------------------------------------- backend


class Backend(asyncio.Protocol):
    """A canned neuron: as little Python per request as possible."""

    events, interval_s = 100, 0.01

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.buffer = b""
        self.tasks: set[asyncio.Task[None]] = set()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = self.buffer[:end].lower()
            position = head.find(b"content-length: ")
            length = int(head[position + 16 :].split(b"\r", 1)[0]) if position >= 0 else 0
            if len(self.buffer) < end + 4 + length:
                return
            content = self.buffer[end + 4 : end + 4 + length]
            self.buffer = self.buffer[end + 4 + length :]
            self.answer(head, content)

    def answer(self, head: bytes, content: bytes) -> None:
        if b'"stream": true' in content:
            task = asyncio.get_running_loop().create_task(self.stream(b"x-cortex-hop" in head))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
        elif head.startswith(b"post"):
            self.json(ANSWER)
        elif head.startswith(b"get /v1/models "):
            self.json(json.dumps({"object": "list", "data": [{"id": MODEL, "object": "model"}]}).encode())
        elif head.startswith(b"get /models "):
            self.json(json.dumps([{"id": MODEL, "harness": "candle", "status": "loaded", "devices": []}]).encode())
        else:
            self.json(b"{}")

    def json(self, document: bytes) -> None:
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(document)
        self.transport.write(head + document)

    async def stream(self, is_hop: bool) -> None:
        write = self.transport.write
        write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
            b"cache-control: no-cache\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        framed = b"%x\r\n%s\r\n" % (len(CHUNK), CHUNK)
        for _ in range(self.events):
            write(framed)
            await asyncio.sleep(self.interval_s)
        last = FINISH + (USAGE_BLOCK if is_hop else b"") + DONE
        write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(last), last))

    def connection_lost(self, exc: Exception | None) -> None:
        for task in self.tasks:
            task.cancel()


async def run_backend(events: int, interval_s: float) -> None:
    Backend.events, Backend.interval_s = events, interval_s
    server = await asyncio.get_running_loop().create_server(Backend, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


# ---------------------------------------------------------------------------------------------- the floor


async def run_floor(backend: str) -> None:
    import aiohttp
    from hypercorn.asyncio import serve
    from hypercorn.config import Config
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response, StreamingResponse
    from starlette.routing import Route

    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None, sock_read=300),
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
    )
    dropped = {"host", "content-length", "connection", "accept-encoding", "transfer-encoding"}

    async def events(upstream: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        try:
            async for chunk in upstream.content.iter_any():
                yield chunk
        finally:
            upstream.close()

    async def proxy(request: Request) -> Response:
        content = await request.body()
        headers = {name: value for name, value in request.headers.items() if name not in dropped}
        upstream = await session.post(backend + request.url.path, data=content, headers=headers)
        answered = {name: value for name, value in upstream.headers.items() if name.lower() not in dropped}
        if upstream.content_type == "text/event-stream":
            return StreamingResponse(events(upstream), upstream.status, answered)
        return Response(await upstream.read(), upstream.status, answered)

    app = Starlette(routes=[Route("/v1/chat/completions", proxy, methods=["POST"])])
    import socket

    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    config = Config()
    config.bind = [f"fd://{listener.fileno()}"]
    config.errorlog = None
    config.include_server_header = False
    config.keep_alive_max_requests = 10**9
    print(listener.getsockname()[1], flush=True)
    await serve(app, config)


# ---------------------------------------------------------------------------------------------- cortex


def entitlements(auth: str, scratch: str) -> Any:
    from cortex_core.entitlements import Budget, EntitlementsSection, KeyEntry

    if auth == "off":
        return EntitlementsSection()
    many = 10**12 if auth != "key" else None
    budgets = (Budget(tokens=10**15),) if auth == "budget" else ()
    entry = KeyEntry(key_id="bench", key="none", requests_per_minute=many, tokens_per_minute=many, budgets=budgets)
    store = "memory" if auth != "budget" else f"sqlite:{scratch}/bench-{os.getpid()}.db"
    return EntitlementsSection(require_auth=True, store=store, keys=(entry,))


def run_cortex(backend: str, auth: str, scratch: str, kind: Literal["neuron", "openai"]) -> None:
    """The real `serve`, with its logging and its signal handling; the port is found in its ready line."""
    from cortex_core.gateway_config import GatewayConfig, GatewaySection, NeuronEntry
    from cortex_gateway.server import serve

    config = GatewayConfig(
        gateway=GatewaySection(listen="127.0.0.1:0", metrics_listen="127.0.0.1:0"),
        neurons=(NeuronEntry(name="bench", endpoint=backend, kind=kind),),
        entitlements=entitlements(auth, scratch),
        models_config="/nonexistent/models.toml",
    )
    raise SystemExit(serve(config))


# ---------------------------------------------------------------------------------------------- load


class Client(asyncio.Protocol):
    """One keep-alive connection that asks again as soon as it has its answer."""

    def __init__(self, request: bytes, stream: bool, surface: str, totals: list[int]) -> None:
        self.request, self.stream, self.totals = request, stream, totals
        self.chunk, self.end = SURFACES[surface][2:]
        self.buffer = b""
        self.is_stopping = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        if self.stream:
            self.totals[1] += data.count(self.chunk)
            tail = self.buffer + data
            self.buffer = tail[-1024:]
            if not tail.endswith(b"0\r\n\r\n"):
                return
            if b"cortex-usage" in tail or self.end not in tail:
                raise AssertionError(f"not a complete stream: {tail[-200:]!r}")
        else:
            self.buffer += data
            end = self.buffer.find(b"\r\n\r\n")
            if end < 0 or len(self.buffer) < end + 4 + len(ANSWER):
                return
            if not self.buffer.startswith(b"HTTP/1.1 200") or not self.buffer.endswith(ANSWER):
                raise AssertionError(f"not the answer: {self.buffer[:300]!r}")
        self.buffer = b""
        self.totals[0] += 1
        if not self.is_stopping:
            self.transport.write(self.request)


async def run_load(port: int, stream: bool, clients: int, seconds: float, surface: str) -> None:
    """Prints requests and chunks completed; waits for a line on stdin before it starts and after it warmed up."""
    content = body(stream, surface)
    request = b"POST %s HTTP/1.1\r\nhost: 127.0.0.1:%d\r\n%scontent-length: %d\r\n\r\n%s" % (
        SURFACES[surface][0].encode(),
        port,
        CLIENT_HEADERS,
        len(content),
        content,
    )
    loop = asyncio.get_running_loop()
    failed: asyncio.Future[None] = loop.create_future()

    def fail(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if not failed.done():
            failed.set_exception(context.get("exception") or RuntimeError(context["message"]))

    loop.set_exception_handler(fail)
    totals = [0, 0]
    connections = [
        (await loop.create_connection(lambda: Client(request, stream, surface, totals), "127.0.0.1", port))[1]
        for _ in range(clients)
    ]
    with suppress(TimeoutError):
        await asyncio.wait_for(asyncio.shield(failed), seconds / 4)
    print("warm", flush=True)
    before = list(totals)
    with suppress(TimeoutError):
        await asyncio.wait_for(asyncio.shield(failed), seconds)
    print(totals[0] - before[0], totals[1] - before[1], flush=True)
    for connection in connections:
        connection.is_stopping = True
        connection.transport.abort()


# ---------------------------------------------------------------------------------------------- rounds


def command(*arguments: object) -> list[str]:
    return [sys.executable, __file__, *map(str, arguments)]


@contextmanager
def child(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    if not line:
        raise SystemExit(f"a child ended: {process.args}")
    return line


@contextmanager
def subject(name: str, backend: str, log_path: Path, auth: str) -> Iterator[tuple[int, int]]:
    """(pid, port). The log goes to a file: a pipe that nobody reads would block, one that is read costs CPU here."""
    with log_path.open("w") as log, log_path.open() as lines:
        arguments = (f"_{name}", "--backend", backend, "--auth", auth, "--scratch", log_path.parent)
        process = subprocess.Popen(command(*arguments), stdout=log, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + 30
            port = None
            text = ""
            while port is None:
                text += lines.read()
                for line in text.splitlines():
                    if line.isdigit():
                        port = int(line)
                    elif "cortex listening on " in line:
                        port = int(line.split("cortex listening on http://127.0.0.1:")[1].split(" ")[0])
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"{name} did not start:\n{text}")
                time.sleep(0.02)
            yield process.pid, port
        finally:
            process.kill()
            process.wait()


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(
    pid: int, port: int, *, stream: bool, clients: int, seconds: float, surface: str = "chat"
) -> tuple[float, int]:
    """(microseconds of CPU per request or per chunk, how many of them)."""
    arguments: list[object] = ["--port", port, "--clients", clients, "--seconds", seconds, "--surface", surface]
    if stream:
        arguments.append("--stream")
    with child("_load", *arguments) as load:
        assert first_line(load) == "warm"
        before = cpu_seconds(pid)
        requests, chunks = map(int, first_line(load).split())
        spent = cpu_seconds(pid) - before
    count = chunks if stream else requests
    if not count:
        raise SystemExit("nothing was answered")
    return 1e6 * spent / count, count


def one_round(name: str, options: argparse.Namespace, scratch: Path) -> dict[str, float]:
    with (
        child("_backend", "--events", options.events, "--interval", options.interval) as backend,
        subject(name, f"http://127.0.0.1:{first_line(backend)}", scratch / f"{name}.log", options.auth) as (pid, port),
    ):
        request, requests = measure(pid, port, stream=False, clients=options.connections, seconds=options.seconds)
        chunk, chunks = measure(pid, port, stream=True, clients=options.clients, seconds=options.stream_seconds)
    return {"request_us": request, "requests": requests, "chunk_us": chunk, "chunks": chunks}


def translated_round(surface: str, options: argparse.Namespace, scratch: Path) -> dict[str, float]:
    with (
        child("_backend", "--events", options.events, "--interval", options.interval) as backend,
        subject("openai", f"http://127.0.0.1:{first_line(backend)}", scratch / f"{surface}.log", "off") as (pid, port),
    ):
        chunk, chunks = measure(
            pid, port, stream=True, clients=options.clients, seconds=options.stream_seconds, surface=surface
        )
    return {"chunk_us": chunk, "chunks": chunks}


def compare_translated(options: argparse.Namespace) -> int:
    rounds: list[dict[str, dict[str, float]]] = []
    print(f"{'round':>5} {'surface':>10} {'us/chunk':>9} {'chunks':>8}")
    with tempfile.TemporaryDirectory(prefix="cortex-bench-") as scratch:
        for number in range(1, options.rounds + 1):
            order = list(SURFACES) if number % 2 else list(reversed(SURFACES))
            results = {surface: translated_round(surface, options, Path(scratch)) for surface in order}
            for surface, got in results.items():
                print(f"{number:>5} {surface:>10} {got['chunk_us']:>9.1f} {got['chunks']:>8.0f}", flush=True)
            rounds.append(results)
    bar = MAX_PER_TRANSLATED_CHUNK
    medians = []
    for surface in ("messages", "responses"):
        ratios = [each[surface]["chunk_us"] / each["chat"]["chunk_us"] for each in rounds]
        medians.append(statistics.median(ratios))
        listed = " ".join(f"{ratio:.2f}" for ratio in ratios)
        result = "ok" if medians[-1] <= bar else "MISSED"
        print(f"CPU per chunk, {surface}: {medians[-1]:.2f}x passing through (rounds: {listed}; bar {bar}x): {result}")
    if options.json:
        print(json.dumps({"rounds": rounds}))
    return 0 if max(medians) <= bar else 1


def main(options: argparse.Namespace) -> int:
    names = ("hypercorn", "aiohttp", "starlette", "msgspec", "uvloop")
    print("command:", " ".join(["python", "tests/bench/gateway.py", *sys.argv[1:]]))
    print(f"machine: {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print("versions:", ", ".join(f"{name} {version(name)}" for name in names))
    if options.translated:
        return compare_translated(options)
    rounds: list[dict[str, dict[str, float]]] = []
    print(f"{'round':>5} {'subject':>8} {'us/request':>11} {'requests':>9} {'us/chunk':>9} {'chunks':>8}")
    with tempfile.TemporaryDirectory(prefix="cortex-bench-") as scratch:
        for number in range(1, options.rounds + 1):
            order = ("floor", "cortex") if number % 2 else ("cortex", "floor")
            results = {}
            for name in order:
                got = results[name] = one_round(name, options, Path(scratch))
                print(
                    f"{number:>5} {name:>8} {got['request_us']:>11.0f} {got['requests']:>9.0f} "
                    f"{got['chunk_us']:>9.1f} {got['chunks']:>8.0f}",
                    flush=True,
                )
            rounds.append(results)
    ratios = {
        kind: [each["cortex"][f"{kind}_us"] / each["floor"][f"{kind}_us"] for each in rounds]
        for kind in ("request", "chunk")
    }
    verdict = {}
    for kind, bar in (("request", MAX_PER_REQUEST), ("chunk", MAX_PER_CHUNK)):
        median = statistics.median(ratios[kind])
        verdict[kind] = median <= bar
        listed = " ".join(f"{ratio:.2f}" for ratio in ratios[kind])
        result = "ok" if verdict[kind] else "MISSED"
        print(f"CPU per {kind}: {median:.2f}x the floor (rounds: {listed}; bar {bar}x): {result}")
    if options.json:
        print(json.dumps({"rounds": rounds, "ratios": ratios}))
    return 0 if options.auth != "off" or all(verdict.values()) else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("role", nargs="?", default="main", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=3.0, help="of small JSON requests, per subject and round")
    parser.add_argument("--stream-seconds", type=float, default=4.0, help="of paced streams, per subject and round")
    parser.add_argument("--connections", type=int, default=32, help="for JSON requests")
    parser.add_argument("--clients", type=int, default=64, help="streams at once")
    parser.add_argument("--events", type=int, default=100, help="per stream")
    parser.add_argument("--interval", type=float, default=0.02, help="seconds between two events of a stream")
    parser.add_argument(
        "--auth", choices=["off", "key", "limits", "budget"], default="off", help="what clients' key has"
    )
    parser.add_argument("--json", action="store_true", help="print all figures as JSON as well")
    parser.add_argument("--translated", action="store_true", help="translated streams against those passed through")
    parser.add_argument("--surface", default="chat", choices=SURFACES, help=argparse.SUPPRESS)
    parser.add_argument("--backend", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--stream", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def play(given: argparse.Namespace) -> None:
    """Be one of the processes of a round."""
    if given.role == "_cortex":
        run_cortex(given.backend, given.auth, given.scratch, "neuron")
    if given.role == "_openai":
        run_cortex(given.backend, given.auth, given.scratch, "openai")
    import uvloop

    if given.role == "_backend":
        uvloop.run(run_backend(given.events, given.interval))
    elif given.role == "_floor":
        uvloop.run(run_floor(given.backend))
    elif given.role == "_load":
        uvloop.run(run_load(given.port, given.stream, given.clients, given.seconds, given.surface))


if __name__ == "__main__":
    asked = parse()
    if asked.role == "main":
        raise SystemExit(main(asked))
    play(asked)
