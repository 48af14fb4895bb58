"""How long large bodies hold a gateway's event loop: six of 31 MB at once, of several kinds, on several paths.

Run: python tests/bench/loop_stall.py [--tree FOLDER ...] [--mb 31] [--count 6] [--body NAME ...] [--path NAME ...]

Each tree is a checkout whose gateway is measured (by default this one), each in processes of its own. While the bodies
are sent, read, passed on and answered, a timer looks at the loop every millisecond. Printed for each body and path:

- cpu ms: the most processor time that the loop's thread took between two looks. It does not depend on what else the
  machine does, so it is the figure to compare;
- wall ms: the longest time between two looks;
- health ms: the slowest `GET /health` of a client that asks every 20 ms;
- total ms: processor time of the gateway's own process and of its children, and what was answered.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import platform
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MODEL = "bench/model"
ANSWER = {
    "id": "c",
    "object": "chat.completion",
    "created": 1,
    "model": MODEL,
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "42"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 20, "completion_tokens": 1, "total_tokens": 21},
}
PATHS = {
    "neuron": "/v1/chat/completions",
    "replicas and budgets": "/v1/chat/completions",
    "openai, alias": "/v1/chat/completions",
    "openai, translated": "/v1/messages",
    "captured": "/v1/chat/completions",
}


def bodies(size: int) -> dict[str, bytes]:
    def body(messages: bytes, model: bytes = MODEL.encode()) -> bytes:
        return b'{"messages":' + messages + b',"max_tokens":5,"model":"' + model + b'"}'

    small = b'{"role":"user","content":"a"},'
    image = b'{"type":"image","source":{"type":"base64","media_type":"image/png","data":"'
    data = base64.b64encode(os.urandom(size * 3 // 4))
    return {
        "one long text": body(b'[{"role":"user","content":"' + b"lorem ipsum " * (size // 12) + b'"}]'),
        "text beyond ASCII": body(b'[{"role":"user","content":"' + "æøå ".encode() * (size // 7) + b'"}]'),
        "small messages": body(b"[" + (small * (size // len(small)))[:-1] + b"]"),
        "nested": body(b"[" + (b"[" * 100 + b"]" * 100 + b",") * (size // 201) + b"0]"),
        "image in base64": body(b'[{"role":"user","content":[' + image + data + b'"}}]}]'),
        "many fields": b"{" + b"".join(b'"k%d":0,' % i for i in range(size // 12)) + b'"model":"bench/model"}',
    }


# ---------------------------------------------------------------------------------------------- the processes


async def run_backend() -> None:
    """Takes what it is sent and answers at once: a neuron, and a server of kind openai."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                left = 0
                for line in head.split(b"\r\n"):
                    if line.startswith(b"content-length:"):
                        left = int(line.partition(b":")[2])
                while left:
                    left -= len(await reader.read(min(left, 2**20)))
                document: Any = ANSWER
                if head.startswith(b"get /models "):
                    document = [{"id": MODEL, "harness": "candle", "status": "loaded", "devices": []}]
                elif head.startswith(b"get /v1/models "):
                    document = {"object": "list", "data": [{"id": MODEL, "object": "model"}]}
                elif head.startswith(b"get"):
                    document = {}
                data = json.dumps(document).encode()
                writer.write(
                    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
                    % (len(data), data)
                )
                await writer.drain()
        except (EOFError, OSError):
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=2**20)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


async def run_gateway(backend: str, path: str, scratch: str, http1: Any) -> None:
    """Answers `look` on its standard input with what the looks at the loop have found since the last one."""
    from cortex_core.catalogue import Catalogue
    from cortex_core.entitlements import Budget, EntitlementsSection, KeyEntry
    from cortex_core.gateway_config import CaptureSection, GatewayConfig, GatewaySection, NeuronEntry
    from cortex_gateway.server import running

    kind: Any = "openai" if path.startswith("openai") else "neuron"
    names = ("one", "two") if path.startswith("replicas") else ("one",)
    entry = KeyEntry(key_id="bench", key="none", tokens_per_minute=10**12, budgets=(Budget(tokens=10**15),))
    section = EntitlementsSection()
    if path.startswith("replicas"):
        section = EntitlementsSection(require_auth=True, store=f"sqlite:{scratch}/{os.getpid()}.db", keys=(entry,))
    config = GatewayConfig(
        gateway=GatewaySection(listen="127.0.0.1:0", metrics_listen="127.0.0.1:0", http1_parser=http1),
        neurons=tuple(NeuronEntry(name=name, endpoint=backend, kind=kind) for name in names),
        entitlements=section,
        capture=CaptureSection(exchanges=20 if path == "captured" else 0),
    )
    catalogue = Catalogue(aliases={"bench/alias": MODEL})
    loop = asyncio.get_running_loop()
    longest_cpu = longest_wall = 0.0
    cpu, wall = time.thread_time(), loop.time()

    def look() -> None:
        nonlocal longest_cpu, longest_wall, cpu, wall
        now_cpu, now_wall = time.thread_time(), loop.time()
        longest_cpu, longest_wall = max(longest_cpu, now_cpu - cpu), max(longest_wall, now_wall - wall)
        cpu, wall = now_cpu, now_wall
        loop.call_later(0.001, look)

    asked: asyncio.Queue[str] = asyncio.Queue()

    def listen() -> None:
        for line in sys.stdin:
            loop.call_soon_threadsafe(asked.put_nowait, line.strip())

    async with running(config, catalogue, grace_s=0) as started:
        fleet = started.gateway.fleet
        while any(node.health != "healthy" for node in fleet.snapshot.nodes.values()):
            await fleet.changed()
        threading.Thread(target=listen, daemon=True).start()
        print(started.url, flush=True)
        look()
        while await asked.get() == "look":
            times = os.times()
            total = times.user + times.system + times.children_user + times.children_system + children_s(os.getpid())
            print(json.dumps([longest_cpu, longest_wall, total]), flush=True)
            longest_cpu = longest_wall = 0.0


def children_s(pid: int) -> float:
    """Processor seconds of the children that still run."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


# ---------------------------------------------------------------------------------------------- the client


def post(url: str, body: bytes, statuses: Counter[int]) -> None:
    headers = {"content-type": "application/json", "x-api-key": "none"}
    request = urllib.request.Request(url, body, headers)
    try:
        with urllib.request.urlopen(request, timeout=600) as response:
            response.read()
            statuses[response.status] += 1
    except urllib.error.HTTPError as error:
        error.read()
        statuses[error.code] += 1
    except OSError:
        statuses[0] += 1


def slowest_health(url: str, ended: threading.Event) -> list[float]:
    slowest = [0.0]

    def ask() -> None:
        while not ended.wait(0.02):
            start = time.monotonic()
            try:
                with urllib.request.urlopen(url + "/health", timeout=600) as response:
                    response.read()
            except OSError:
                return  # it is ending
            slowest[0] = max(slowest[0], time.monotonic() - start)

    threading.Thread(target=ask, daemon=True).start()
    return slowest


class Gateway:
    def __init__(self, tree: Path, backend: str, path: str, scratch: str, http1: str) -> None:
        sources = os.pathsep.join(str(tree / "packages" / name / "src") for name in ("cortex-core", "cortex-gateway"))
        self.process = subprocess.Popen(
            [sys.executable, __file__, "_gateway", backend, path, scratch, http1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": sources},
        )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()

    def look(self) -> list[float]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("look\n")
        self.process.stdin.flush()
        found: list[float] = json.loads(self.process.stdout.readline())
        return found

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("stop\n")
        self.process.stdin.close()
        self.process.wait(60)


def measure(tree: Path, backend: str, path: str, name: str, body: bytes, count: int, scratch: str, http1: str) -> None:
    gateway = Gateway(tree, backend, path, scratch, http1)
    try:
        statuses: Counter[int] = Counter()
        target = gateway.url + PATHS[path]
        if path == "openai, alias":
            body = body.replace(b'"model":"bench/model"', b'"model":"bench/alias"')
        post(target, json.dumps({"model": MODEL, "messages": [], "max_tokens": 5}).encode(), Counter())
        before = gateway.look()[2]
        ended = threading.Event()
        slowest = slowest_health(gateway.url, ended)
        threads = [threading.Thread(target=post, args=(target, body, statuses)) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        ended.set()
        cpu, wall, total = gateway.look()
    finally:
        gateway.stop()
    answered = " ".join(f"{number}×{status}" for status, number in sorted(statuses.items()))
    print(
        f"{tree.name:<12}{path:<22}{name:<20}{cpu * 1e3:>8.0f}{wall * 1e3:>9.0f}{slowest[0] * 1e3:>11.0f}"
        f"{(total - before) * 1e3:>10.0f}   {answered}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, action="append")
    parser.add_argument("--mb", type=float, default=31)
    parser.add_argument("--count", type=int, default=6)
    parser.add_argument("--body", action="append")
    parser.add_argument("--path", action="append", choices=PATHS)
    parser.add_argument("--http1", choices=("auto", "h11"), default="auto", help="who reads the clients' HTTP/1")
    arguments = parser.parse_args()
    backend = subprocess.Popen([sys.executable, __file__, "_backend"], stdout=subprocess.PIPE, text=True)
    assert backend.stdout is not None
    url = f"http://127.0.0.1:{backend.stdout.readline().strip()}"
    print(
        f"python {platform.python_version()}, {os.cpu_count()} cores, {arguments.count} bodies of {arguments.mb:g} MB"
    )
    print(
        f"{'tree':<12}{'path':<22}{'body':<20}{'cpu ms':>8}{'wall ms':>9}{'health ms':>11}{'total ms':>10}   answered"
    )
    import tempfile

    try:
        with tempfile.TemporaryDirectory() as scratch:
            for path in arguments.path or PATHS:
                for name, body in bodies(int(arguments.mb * 1e6)).items():
                    if arguments.body and name not in arguments.body:
                        continue
                    for tree in arguments.tree or [ROOT]:
                        measure(tree.resolve(), url, path, name, body, arguments.count, scratch, arguments.http1)
    finally:
        backend.kill()


if __name__ == "__main__":
    if sys.argv[1:2] == ["_backend"]:
        asyncio.run(run_backend())
    elif sys.argv[1:2] == ["_gateway"]:
        asyncio.run(run_gateway(*sys.argv[2:]))
    else:
        main()
