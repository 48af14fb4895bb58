"""Does the gateway keep what it should let go? A long mixed load on a real gateway, its memory watched.

    python tests/bench/soak.py [--requests 50000] [--events 200000] [--clients 32] [--http1 auto|h11|httptools]

One process is the gateway, with a neuron and a server that speaks only OpenAI chat behind it, both canned and in this
process, and keys with limits. Of 50 requests two are streams of 100 events; the rest is answers, translated answers,
refusals by the gateway and by the neuron, keys that are unknown or over their limit, clients that hang up while they
wait or in the middle of a stream, and neurons that break off. How memory is judged: `soak_load.py`; the bar is 4 MiB.

`tests/cortex_gateway/test_soak.py` runs the same load for some seconds in every CI run and counts objects instead.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # for a run as a script

from cortex_core.catalogue import Catalogue
from cortex_core.entitlements import Budget, EntitlementsSection, KeyEntry
from cortex_core.gateway_config import BreakerSection, GatewayConfig, GatewaySection, Http1Parser, NeuronEntry
from cortex_core.hop import ChoiceTokens, StreamHead, stream_comment, tokens_comment

from tests.bench.canned_server import CannedServer
from tests.bench.soak_load import KEY, Ask, Load, gauges_of, soak

NATIVE, FOREIGN = "soak/native", "soak/foreign"
EVENTS_OF_A_STREAM = 100
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
            key=KEY,
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


CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
STREAMS = (
    Ask(CHAT, {"model": NATIVE, "stream": True}),
    Ask(MESSAGES, {"model": FOREIGN, "stream": True}),
    Ask(CHAT, {"model": FOREIGN, "stream": True}),
    Ask(RESPONSES, {"model": FOREIGN, "stream": True}),
    Ask(MESSAGES, {"model": NATIVE, "stream": True}),
    Ask(CHAT, {"model": NATIVE, "stream": True, "user": "break"}),
    Ask(CHAT, {"model": NATIVE, "stream": True}, hangs_up=True),
    Ask(MESSAGES, {"model": FOREIGN, "stream": True}, hangs_up=True),
)
OTHERS = (
    *(Ask(CHAT, {"model": NATIVE}),) * 12,
    *(Ask(MESSAGES, {"model": FOREIGN}),) * 3,
    Ask(RESPONSES, {"model": FOREIGN}),
    Ask(CHAT, {"model": "soak/unknown"}, frozenset((404,))),
    Ask(CHAT, {}, frozenset((400,))),
    Ask(CHAT, {"model": NATIVE, "user": "refuse"}, frozenset((422,))),
    Ask(MESSAGES, {"model": NATIVE}, frozenset((401,)), key="sk-soak-stranger"),
    Ask(CHAT, {"model": NATIVE}, frozenset((200, 429)), key="sk-soak-small"),
    Ask(CHAT, {"model": NATIVE, "user": "hold"}, frozenset(), hangs_up=True),
    Ask("/v1/models", {}),
)


def ask_of(number: int) -> Ask:
    """What the request of that number asks."""
    is_stream = number % 25 == 0
    ask = STREAMS[number // 25 % len(STREAMS)] if is_stream else OTHERS[number % len(OTHERS)]
    if ask.path == "/v1/models":
        return ask
    turn = [{"role": "user", "content": "What is 12+30?"}]
    prompt = {"input": turn} if ask.path == RESPONSES else {"messages": turn, "max_tokens": 500}
    return ask._replace(body={**prompt, **ask.body})


def gauges(url: str) -> dict[str, float]:
    """What is at work according to the metrics; each is 0 when nothing is."""
    return gauges_of(url, ("cortex_in_flight{", "cortex_waiting_requests{", "cortex_leaving_requests{"))


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


async def run(options: argparse.Namespace) -> int:
    async with backends() as neurons, gateway_process(config(neurons, options.http1)) as (pid, url, metrics):
        return await soak(
            {"gateway": pid},
            Load(url, ask_of),
            requests=options.requests,
            events=options.events,
            clients=options.clients,
            at_work=lambda: gauges(metrics),
        )


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
    return asyncio.run(run(options))


if __name__ == "__main__":
    raise SystemExit(main())
