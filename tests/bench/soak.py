"""Does the gateway keep what it should let go? A long mixed load on a real gateway, its memory watched.

    python tests/bench/soak.py [--requests 50000] [--events 200000] [--clients 32] [--http1 auto|h11|httptools]

One process is the gateway, with a neuron and a server that speaks only OpenAI chat behind it, both canned and in this
process, and keys with limits. Of 50 requests two are streams of 100 events; the rest is answers, translated answers,
refusals by the gateway and by the neuron, keys that are unknown or over their limit, clients that hang up while they
wait or in the middle of a stream, and neurons that break off. The resident memory is sampled all along. The first
fifth is warm-up: pools fill, the log's ring of 1000 lines, caches. Growth is judged on the rest, both as the difference
of medians of its first and last tenth and as a fitted line; flat is below 4 MiB in both. At the end every gauge of
work is 0 again and no descriptor is left over.

`tests/cortex_gateway/test_soak.py` runs the same load for some seconds in every CI run and counts objects instead.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))  # for a run as a script

from cortex_core.catalogue import Catalogue
from cortex_core.entitlements import Budget, EntitlementsSection, KeyEntry
from cortex_core.gateway_config import BreakerSection, GatewayConfig, GatewaySection, Http1Parser, NeuronEntry
from cortex_core.hop import ChoiceTokens, StreamHead, stream_comment, tokens_comment

from tests.bench.canned_server import CannedServer

NATIVE, FOREIGN = "soak/native", "soak/foreign"
EVENTS_OF_A_STREAM = 100
WARM_UP = 0.2
MAX_GROWTH_MIB = 4.0
USAGE = {"prompt_tokens": 20, "completion_tokens": 100, "total_tokens": 120}


# ---------------------------------------------------------------------------------------------- behind the gateway


class Backend(CannedServer):
    """A canned neuron, or server: what it does stands in the request's `user`."""

    model, connections = NATIVE, 0

    def answer(self, head: bytes, content: bytes) -> None:
        body: dict[str, Any] = json.loads(content) if content else {}
        user = body.get("user") or (body.get("metadata") or {}).get("user_id")
        if head.startswith(b"get /v1/models "):
            self.json({"object": "list", "data": [{"id": self.model, "object": "model"}]})
        elif head.startswith(b"get /models "):
            self.json([{"id": self.model, "harness": "candle", "status": "loaded", "devices": []}])
        elif head.startswith(b"get"):
            self.json({})
        elif user == "hold":
            pass
        elif user == "refuse":
            self.json({"error": {"message": "no", "type": "invalid_request_error"}}, b"422 Unprocessable Content")
        elif body.get("stream"):
            self.start(self.stream(b"x-cortex-hop" in head, breaks=user == "break"))
        else:
            choice = {"index": 0, "message": {"role": "assistant", "content": "a" * 300}, "finish_reason": "stop"}
            self.json({"id": "chatcmpl-1", "object": "chat.completion", "choices": [choice], "usage": USAGE})

    def json(self, document: Any, status: bytes = b"200 OK") -> None:
        content = json.dumps(document).encode()
        head = b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        self.transport.write(head % (status, len(content)) + content)

    async def stream(self, is_hop: bool, *, breaks: bool) -> None:
        self.transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        is_marked = is_hop and not breaks  # one that breaks off could else be resumed, on this same neuron
        if is_marked:
            self.chunk(stream_comment(StreamHead("chatcmpl-1", 20, (7,))))
        for number in range(EVENTS_OF_A_STREAM):
            if breaks and number == EVENTS_OF_A_STREAM // 2:
                self.transport.abort()
                return
            mark = tokens_comment([ChoiceTokens(0, [number])]) if is_marked else b""
            self.chunk(self.event({"content": "token "}) + mark)
            await asyncio.sleep(0)
        usage = b': cortex-usage {"prompt_tokens":20,"completion_tokens":100,"cached_tokens":0}\n\n' if is_hop else b""
        self.chunk(self.event({}, "stop") + usage + b"data: [DONE]\n\n")
        self.transport.write(b"0\r\n\r\n")

    def event(self, delta: dict[str, str], finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return b"data: %b\n\n" % json.dumps({"id": "chatcmpl-1", "model": self.model, "choices": [choice]}).encode()

    def chunk(self, data: bytes) -> None:
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))


class ForeignBackend(Backend):
    model = FOREIGN


@asynccontextmanager
async def backends() -> AsyncIterator[tuple[NeuronEntry, ...]]:
    loop = asyncio.get_running_loop()
    servers = [await loop.create_server(each, "127.0.0.1", 0, backlog=1024) for each in (Backend, ForeignBackend)]
    urls = [f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}" for server in servers]
    try:
        yield (
            NeuronEntry(name="native", endpoint=urls[0]),
            NeuronEntry(name="foreign", endpoint=urls[1], kind="openai"),
        )
    finally:
        for server in servers:
            server.close()


def config(neurons: tuple[NeuronEntry, ...], http1: Http1Parser = "auto") -> GatewayConfig:
    many = 10**9
    keys = (
        KeyEntry(
            key_id="soak",
            key="sk-soak-soak",
            requests_per_minute=many,
            tokens_per_minute=many,
            budgets=(Budget(tokens=10**15),),
        ),
        KeyEntry(key_id="small", key="sk-soak-small", requests_per_minute=1),
    )
    return GatewayConfig(
        gateway=GatewaySection(listen="127.0.0.1:0", metrics_listen="127.0.0.1:0", http1_parser=http1),
        breaker=BreakerSection(failures=0),
        entitlements=EntitlementsSection(require_auth=True, store="memory", keys=keys),
        neurons=neurons,
    )


# ---------------------------------------------------------------------------------------------- in front of it


class Ask(NamedTuple):
    """hangs_up: after the first bytes of the answer, or where there are none, after a moment."""

    path: str
    fields: dict[str, Any]
    status: frozenset[int]
    key: str = "sk-soak-soak"
    hangs_up: bool = False


OK = frozenset((200,))
CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
STREAMS = (
    Ask(CHAT, {"model": NATIVE, "stream": True}, OK),
    Ask(MESSAGES, {"model": FOREIGN, "stream": True}, OK),
    Ask(CHAT, {"model": FOREIGN, "stream": True}, OK),
    Ask(RESPONSES, {"model": FOREIGN, "stream": True}, OK),
    Ask(MESSAGES, {"model": NATIVE, "stream": True}, OK),
    Ask(CHAT, {"model": NATIVE, "stream": True, "user": "break"}, OK),
    Ask(CHAT, {"model": NATIVE, "stream": True}, OK, hangs_up=True),
    Ask(MESSAGES, {"model": FOREIGN, "stream": True}, OK, hangs_up=True),
)
OTHERS = (
    *(Ask(CHAT, {"model": NATIVE}, OK),) * 12,
    *(Ask(MESSAGES, {"model": FOREIGN}, OK),) * 3,
    Ask(RESPONSES, {"model": FOREIGN}, OK),
    Ask(CHAT, {"model": "soak/unknown"}, frozenset((404,))),
    Ask(CHAT, {}, frozenset((400,))),
    Ask(CHAT, {"model": NATIVE, "user": "refuse"}, frozenset((422,))),
    Ask(MESSAGES, {"model": NATIVE}, frozenset((401,)), "sk-soak-stranger"),
    Ask(CHAT, {"model": NATIVE}, frozenset((200, 429)), "sk-soak-small"),
    Ask(CHAT, {"model": NATIVE, "user": "hold"}, frozenset(), hangs_up=True),
    Ask("/v1/models", {}, OK),
)


class Load:
    """Many clients at once, until so many requests and events are through. Raises where an answer is not right."""

    def __init__(self, url: str) -> None:
        self.host, _, port = url.removeprefix("http://").rpartition(":")
        self.port = int(port)
        self.num_requests = 0
        self.num_events = 0
        self.statuses: Counter[int] = Counter()
        self._numbers = itertools.count()

    async def run(self, *, requests: int, events: int, clients: int) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(self._client(lambda: self.num_requests < requests or self.num_events < events))

    async def _client(self, goes_on: Callable[[], bool]) -> None:
        connection = await asyncio.open_connection(self.host, self.port)
        while goes_on():
            number = next(self._numbers)
            is_stream = number % 25 == 0
            ask = STREAMS[number // 25 % len(STREAMS)] if is_stream else OTHERS[number % len(OTHERS)]
            try:
                keeps = await self._exchange(*connection, ask)
            except (OSError, EOFError) as exc:
                raise RuntimeError(f"{ask}: {exc!r}") from exc
            self.num_requests += 1
            if not keeps:
                connection[1].transport.abort()
                connection = await asyncio.open_connection(self.host, self.port)
        connection[1].close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, ask: Ask) -> bool:
        """Whether the connection can go on."""
        turn = [{"role": "user", "content": "What is 12+30?"}]
        prompt = {"input": turn} if ask.path == RESPONSES else {"messages": turn, "max_tokens": 500}
        body = json.dumps({**prompt, **ask.fields}).encode()
        line = b"GET /v1/models" if ask.path == "/v1/models" else b"POST " + ask.path.encode()
        writer.write(
            b"%b HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %b\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n%b" % (line, ask.key.encode(), len(body), body)
        )
        if ask.hangs_up and not ask.fields.get("stream"):
            await asyncio.sleep(0.01)
            return False
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        status = int(head[9:12])
        self.statuses[status] += 1
        if status not in ask.status:
            raise AssertionError(f"{ask}: {head!r} {await reader.read(600)!r}")
        position = head.find(b"content-length: ")
        if position >= 0:
            await reader.readexactly(int(head[position + 16 :].split(b"\r", 1)[0]))
        else:
            while size := int(await reader.readline(), 16):
                data = await reader.readexactly(size + 2)
                self.num_events += data.count(b"\n\n")
                if ask.hangs_up:
                    return False
            await reader.readline()
        return b"connection: close" not in head


# ---------------------------------------------------------------------------------------------- the watch


class Sample(NamedTuple):
    done: float  # share of the work
    rss_mib: float
    descriptors: int


def sample(pid: int, done: float) -> Sample:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return Sample(done, pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(list(Path(f"/proc/{pid}/fd").iterdir())))


def gauges(url: str) -> dict[str, float]:
    """What is at work according to the metrics; each is 0 when nothing is."""
    found = {}
    with urllib.request.urlopen(url, timeout=10) as answer:
        for line in answer.read().decode().splitlines():
            if line.startswith(("cortex_in_flight{", "cortex_waiting_requests{", "cortex_leaving_requests{")):
                name, _, value = line.rpartition(" ")
                found[name] = float(value)
    return found


class Verdict(NamedTuple):
    growth_mib: float
    fitted_mib: float
    is_flat: bool


def verdict(samples: list[Sample]) -> Verdict:
    """Of the samples after the warm-up."""
    warm = [each for each in samples if each.done >= WARM_UP]
    tenth = max(1, len(warm) // 10)
    first = statistics.median(each.rss_mib for each in warm[:tenth])
    last = statistics.median(each.rss_mib for each in warm[-tenth:])
    slope = statistics.linear_regression([each.done for each in warm], [each.rss_mib for each in warm]).slope
    fitted = slope * (1 - WARM_UP)
    return Verdict(last - first, fitted, max(last - first, fitted) < MAX_GROWTH_MIB)


@asynccontextmanager
async def gateway_process(asked: GatewayConfig) -> AsyncIterator[tuple[int, str, str]]:
    """(pid, URL, URL of the metrics)"""
    import msgspec

    with tempfile.TemporaryDirectory(prefix="cortex-soak-") as scratch:
        log_path = Path(scratch) / "log"
        with log_path.open("w") as log:
            arguments = [sys.executable, __file__, "--serve", msgspec.json.encode(asked).decode()]
            process = subprocess.Popen(arguments, stdout=log, stderr=subprocess.STDOUT)
        try:
            async with asyncio.timeout(60):
                while "cortex listening on " not in (text := log_path.read_text()):
                    if process.poll() is not None:
                        raise SystemExit(f"the gateway did not start:\n{text}")
                    await asyncio.sleep(0.05)
            metrics = text.split("metrics exporter on ")[1].split()[0]
            yield process.pid, text.split("cortex listening on ")[1].split()[0], metrics
        finally:
            process.kill()
            process.wait()


async def soak(options: argparse.Namespace) -> int:
    samples: list[Sample] = []
    async with backends() as neurons, gateway_process(config(neurons, options.http1)) as (pid, url, metrics):
        idle = sample(pid, 0)
        load = Load(url)
        running = asyncio.ensure_future(
            load.run(requests=options.requests, events=options.events, clients=options.clients)
        )
        started = time.monotonic()
        said = 0.0
        while not running.done():
            await asyncio.wait({running}, timeout=0.5)
            done = min(load.num_requests / options.requests, load.num_events / options.events, 1.0)
            samples.append(sample(pid, done))
            if done >= said:
                print(
                    f"{100 * done:3.0f} %: {load.num_requests} requests, {load.num_events} events, "
                    f"{samples[-1].rss_mib:.1f} MiB, {samples[-1].descriptors} descriptors",
                    flush=True,
                )
                said += 0.1
        await running
        seconds = time.monotonic() - started
        at_work: dict[str, float] = {}
        with suppress(TimeoutError):
            async with asyncio.timeout(60):  # a connection to a neuron is kept for a while
                while True:
                    at_work = {k: v for k, v in (await asyncio.to_thread(gauges, metrics)).items() if v}
                    if not at_work and sample(pid, 1).descriptors <= idle.descriptors + 2:
                        break
                    await asyncio.sleep(0.5)
        end = sample(pid, 1)
    result = verdict(samples)
    spare = end.descriptors - idle.descriptors
    print(f"{load.num_requests} requests, {load.num_events} events in {seconds:.0f} s; {dict(load.statuses)}")
    print(f"memory: {idle.rss_mib:.1f} MiB idle, {end.rss_mib:.1f} MiB at the end")
    print(
        f"growth after the warm-up: {result.growth_mib:+.2f} MiB, fitted {result.fitted_mib:+.2f} MiB "
        f"(bar {MAX_GROWTH_MIB} MiB): {'flat' if result.is_flat else 'GROWS'}"
    )
    print(f"descriptors left over: {spare} (bar 2): {'pass' if spare <= 2 else 'FAIL'}")
    print(f"gauges not at 0: {at_work or 'none'}: {'FAIL' if at_work else 'pass'}")
    return 0 if result.is_flat and spare <= 2 and not at_work else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=50_000)
    parser.add_argument("--events", type=int, default=200_000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--http1", choices=["auto", "h11", "httptools"], default="auto", help="as gateway.http1_parser")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        import msgspec
        from cortex_gateway.server import serve

        return serve(msgspec.json.decode(options.serve, type=GatewayConfig), Catalogue())
    names = ("hypercorn", "httptools", "aiohttp", "uvloop")
    print("command:", " ".join(["python", "tests/bench/soak.py", *sys.argv[1:]]))
    print(f"machine: {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print("versions:", ", ".join(f"{name} {version(name)}" for name in names))
    return asyncio.run(soak(options))


if __name__ == "__main__":
    raise SystemExit(main())
