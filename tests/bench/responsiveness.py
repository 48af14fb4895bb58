"""How fast a neuron answers `/health` and `/models` while its engines are busy, loading, dying or hung.

    uv run python tests/bench/responsiveness.py [--seconds 8] [--rate 100] [--priority 10]

A real daemon with real engines: the demo model, and for the load a checkpoint whose tokenizer has 150,000 entries.
Beside it the same HTTP server answers a constant of the same size from a process of its own; both are asked in turns
from one thread, at a fixed rate over kept connections, so what the machine itself adds shows in the second column.
`--priority 10` raises the priority of daemon, control and this script (not of the engines), which on a machine that is
busy with other things stands in for an idle core; it needs the right to do so. The bar is a p99 below 20 ms.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).parents[2]))

MODEL = "cortex/demo"
VOCABULARY = 150_000
BAR_MS = 20.0
CONTROL = """
import asyncio, sys
from hypercorn.asyncio import serve
from hypercorn.config import Config
BODY = b"x" * 900
async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    await send({"type": "http.response.start", "status": 200,
                "headers": [(b"content-length", b"%d" % len(BODY)), (b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": BODY})
import socket
listener = socket.socket(); listener.bind(("127.0.0.1", 0)); listener.listen(64)
print(listener.getsockname()[1], flush=True)
config = Config(); config.bind = [f"fd://{listener.detach()}"]; config.accesslog = None
config.keep_alive_max_requests = sys.maxsize
import uvloop
with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
    runner.run(serve(app, config))
"""


# ---------------------------------------------------------------------------------------------------- processes


class Neuron:
    """The daemon as a user starts it."""

    def __init__(self, folder: Path) -> None:
        config = folder / "neuron.toml"
        config.write_text(
            "[engine]\nkv_cache_tokens = 66000\nmax_model_len = 65536\nstable_after_s = 0\n[server]\nwatchdog_s = 0\n"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-m", "neuron", "serve", "--config", str(config), "-p", "0", "--host", "127.0.0.1"],
            stdout=subprocess.PIPE,
            stderr=(folder / "neuron.log").open("w"),
            text=True,
        )
        assert self.process.stdout is not None
        match = re.search(r"http://\S+", self.process.stdout.readline())
        assert match, (folder / "neuron.log").read_text()
        self.url = match[0]

    def call(self, method: str, path: str, body: Any = None, timeout: float = 600) -> Any:
        parts = urlsplit(self.url)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout)
        try:
            connection.request(method, path, None if body is None else json.dumps(body))
            response = connection.getresponse()
            return json.loads(response.read())
        finally:
            connection.close()

    def status(self, model: str) -> str:
        return next((str(entry["status"]) for entry in self.call("GET", "/models") if entry["id"] == model), "absent")

    def until(self, model: str, status: str, within_s: float = 300) -> None:
        deadline = time.monotonic() + within_s
        while self.status(model) != status:
            assert time.monotonic() < deadline, f"{model} is {self.status(model)}, not {status}"
            time.sleep(0.02)

    def engine_pids(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in children if b"neuron.engine.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def large_tokenizer(folder: Path) -> None:
    """A byte-level BPE as large as those of current models: its merges are made up, its size is real."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    chance = random.Random(1)
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = []
    while len(vocabulary) < VOCABULARY:
        left, right = chance.choice(pieces[:5000]), chance.choice(pieces[:5000])
        if left + right not in vocabulary and len(left + right) <= 12:
            vocabulary[left + right] = len(vocabulary)
            pieces.append(left + right)
            merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.save(str(folder / "tokenizer.json"))


def large_vocabulary_model(folder: Path) -> str:
    """A checkpoint of two small layers with that tokenizer. Made in a process of its own: torch stays out of ours."""
    folder.mkdir()
    code = (
        "import sys; from pathlib import Path; import tests.neuron.engine.checkpoints as c; "
        f"c.SHAPE['vocab_size'] = {VOCABULARY}; c.write_qwen3(Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, cwd=Path(__file__).parents[2])
    large_tokenizer(folder)
    return f"file:{folder}"


# ---------------------------------------------------------------------------------------------------- measuring


class Target:
    """One kept connection, spoken to without a client library: little of what is measured is ours."""

    def __init__(self, port: int, paths: tuple[str, ...]) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.requests = [f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode() for path in paths]
        self.number = 0
        self.ms: list[float] = []

    def ask(self) -> None:
        request = self.requests[self.number % len(self.requests)]
        self.number += 1
        began = time.perf_counter()
        self.socket.sendall(request)
        data = self.socket.recv(65536)
        while b"\r\n\r\n" not in data:
            data += self.socket.recv(65536)
        head, _, body = data.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        match = re.search(rb"content-length: (\d+)", head)
        assert match
        left = int(match[1]) - len(body)
        while left > 0:
            left -= len(self.socket.recv(65536))
        self.ms.append((time.perf_counter() - began) * 1e3)


def measure(neuron: Target, control: Target, *, rate: float, until: Callable[[float], bool]) -> None:
    """Ask both in turns until `until(seconds)`; a late turn is not made up for."""
    neuron.ms, control.ms = [], []
    began = time.monotonic()
    while not until(time.monotonic() - began):
        turn = time.monotonic()
        neuron.ask()
        control.ask()
        time.sleep(max(0.0, 1 / rate - (time.monotonic() - turn)))


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def row(name: str, neuron: Target, control: Target) -> str:
    def figures(target: Target) -> str:
        return f"{percentile(target.ms, 0.5):8.2f}{percentile(target.ms, 0.99):9.2f}{max(target.ms):9.1f}"

    p99 = percentile(neuron.ms, 0.99)
    verdict = "ok" if p99 < BAR_MS else "OVER"
    return f"{name:<34}{len(neuron.ms):>6}{figures(neuron)}   {figures(control)}   {verdict}"


@contextlib.contextmanager
def in_background(work: Callable[[], object]) -> Iterator[threading.Thread]:
    thread = threading.Thread(target=lambda: contextlib.suppress(Exception).__enter__() or work(), daemon=True)
    thread.start()
    yield thread
    thread.join(600)


# ---------------------------------------------------------------------------------------------------- scenarios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seconds", type=float, default=8.0, help="of each scenario (a load lasts as long as it lasts)"
    )
    parser.add_argument("--rate", type=float, default=100.0, help="looks per second")
    parser.add_argument("--priority", type=int, default=0, help="raise the priority by so much")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        large = large_vocabulary_model(folder / "large")
        neuron = Neuron(folder)
        control = subprocess.Popen([sys.executable, "-c", CONTROL], stdout=subprocess.PIPE, text=True)
        assert control.stdout is not None
        control_port = int(control.stdout.readline())
        try:
            neuron.call("POST", "/models/load", {"model_id": MODEL})
            if options.priority:
                for pid in (os.getpid(), control.pid, neuron.process.pid):
                    for task in Path(f"/proc/{pid}/task").iterdir():
                        os.setpriority(os.PRIO_PROCESS, int(task.name), -options.priority)
            port = urlsplit(neuron.url).port
            assert port is not None
            run(neuron, Target(port, ("/health", "/models")), Target(control_port, ("/",)), large, options)
        finally:
            for process in (neuron.process, control):
                process.send_signal(signal.SIGTERM)
                process.wait(60)


def run(neuron: Neuron, target: Target, control: Target, large: str, options: argparse.Namespace) -> None:
    seconds, rate = options.seconds, options.rate

    def for_a_while(elapsed: float) -> bool:
        return elapsed >= seconds

    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python {sys.version.split()[0]}, ", end="")
    print(f"{rate:.0f} looks a second, priority +{options.priority}; milliseconds")
    print(f"{'':<34}{'looks':>6}{'p50':>8}{'p99':>9}{'max':>9}   {'p50':>8}{'p99':>9}{'max':>9}")
    print(f"{'':<40}{'neuron':>17}{'':>16}{'control':>13}")

    def show(name: str) -> None:
        print(row(name, target, control), flush=True)

    measure(target, control, rate=rate, until=for_a_while)
    show("idle")

    words = "the quick brown fox jumps over the lazy dog and counts "
    prompt = {"model": MODEL, "max_tokens": 1, "messages": [{"role": "user", "content": words * 3_000}]}
    with in_background(lambda: neuron.call("POST", "/v1/chat/completions", prompt)):
        measure(target, control, rate=rate, until=for_a_while)
        show("a long prefill")
        os.kill(neuron.engine_pids()[0], signal.SIGKILL)  # nobody waits for its end
        measure(target, control, rate=rate, until=lambda elapsed: elapsed > 1 and neuron.status(MODEL) == "loaded")
        show("a recovery")
        neuron.call("POST", "/models/unload", {"model_id": "none"})
        for pid in neuron.engine_pids():
            os.kill(pid, signal.SIGSTOP)
        try:
            measure(target, control, rate=rate, until=for_a_while)
            show("a hung rank")
        finally:
            for pid in neuron.engine_pids():
                os.kill(pid, signal.SIGCONT)
                os.kill(pid, signal.SIGKILL)
    neuron.until(MODEL, "loaded")

    huge = {"model": MODEL, "messages": [{"role": "user", "content": words * 50_000}]}  # 2.8 MB
    with in_background(lambda: [neuron.call("POST", "/v1/messages/count_tokens", huge) for _ in range(4)]) as work:
        measure(target, control, rate=rate, until=lambda elapsed: not work.is_alive())
        show("tokenising 2.8 MB, four times")

    with in_background(lambda: neuron.call("POST", "/models/load", {"model_id": large})) as work:
        measure(target, control, rate=rate, until=lambda elapsed: not work.is_alive())
        show("a load (150,000 token vocabulary)")
    with in_background(lambda: neuron.call("POST", "/models/unload", {"model_id": large})) as work:
        measure(target, control, rate=rate, until=lambda elapsed: elapsed > 1 and not work.is_alive())
        show("an unload")


if __name__ == "__main__":
    main()
