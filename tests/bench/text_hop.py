"""What preparing requests in text workers costs, beside a build that did it in the daemon.

    python tests/bench/text_hop.py --base WORKTREE [--rounds 12] [--requests 100]

WORKTREE is a checkout of the build to compare with (`git worktree add WORKTREE 7d1037b`) that has an environment of its
own (`uv sync --locked` in it). Two neurons with the demo model, one of each build, answer the same requests in turn;
what each process spent on the processor is read before and after. The bar is met when the upper end of the 90 %
interval of the paired ratios is at most 1.1.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # for a run as a script

from tests.bench.paired import cpu_s, interval

HERE = Path(__file__).parents[2]
MODEL = "cortex/demo"
BAR = 1.1
CONFIG = 'host = "127.0.0.1"\nport = 0\n[engine]\nmax_model_len = 8192\nkv_cache_mb = 256\nnum_threads = 2\n'


class Neuron:
    """A neuron of one build, with the demo model loaded."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self.process = process
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)

    def ask(self, path: str, body: bytes) -> bytes:
        self._connection.request("POST", path, body, {"content-type": "application/json"})
        response = self._connection.getresponse()
        answer = response.read()
        assert response.status == 200, answer[:300]
        return answer

    def hang_up(self) -> None:
        """The other side's turn may take longer than a connection is kept alive."""
        self._connection.close()

    def cpu_s(self) -> dict[str, float]:
        return cpu_s(self.process.pid)


@contextmanager
def neuron(worktree: Path, folder: Path) -> Iterator[Neuron]:
    config = folder / "neuron.toml"
    config.write_text(
        'host = "127.0.0.1"\nport = 0\n[engine]\nmax_model_len = 8192\nkv_cache_mb = 256\nnum_threads = 2\n'
    )
    python = worktree / ".venv/bin/python"
    command = [str(python), "-m", "neuron", "serve", "--config", str(config)]
    environ = {**os.environ, "XDG_STATE_HOME": str(folder), "PYTHONUNBUFFERED": "1"}
    log = (folder / "log").open("wb")
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environ, cwd=worktree)
    try:
        port = _port(folder / "log", process)
        running = Neuron(process, port)
        running.ask("/models/load", json.dumps({"model_id": MODEL}).encode())
        yield running
    finally:
        process.terminate()
        process.wait(60)
        log.close()


def _port(log: Path, process: subprocess.Popen[bytes]) -> int:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        for word in log.read_text(errors="replace").split():
            if word.startswith("http://127.0.0.1:"):
                return int(word.removeprefix("http://127.0.0.1:").rstrip("/,.)"))
        time.sleep(0.1)  # another process's output has no event here
    raise SystemExit(f"the neuron did not start:\n{log.read_text(errors='replace')}")


def bodies(kind: str, number: int) -> bytes:
    if kind == "short":
        text = f"What is {number % 90 + 5}+{number % 70 + 20}?"
        return json.dumps(
            {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": 8, "temperature": 0}
        ).encode()
    words = " ".join(f"w{(number * 7919 + i * 31) % 9973} and so on" for i in range(1200))
    tool: dict[str, Any] = {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Current weather in a city. " * 8,
            "parameters": {
                "type": "object",
                "properties": {f"field_{i}": {"type": "string", "description": "A field. " * 6} for i in range(12)},
            },
        },
    }
    messages = [{"role": "user", "content": words[:9000]}]
    return json.dumps(
        {"model": MODEL, "messages": messages, "tools": [tool], "max_tokens": 8, "temperature": 0}
    ).encode()


def spent(side: Neuron, kind: str, first: int, count: int) -> dict[str, float]:
    before = side.cpu_s()
    for number in range(first, first + count):
        side.ask("/v1/chat/completions", bodies(kind, number))
    after = side.cpu_s()
    side.hang_up()
    return {name: (after[name] - before.get(name, 0.0)) / count * 1e3 for name in after}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--requests", type=int, default=100)
    options = parser.parse_args()
    print(f"$ python {' '.join(sys.argv)}")
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    missed = False
    with (
        tempfile.TemporaryDirectory() as one,
        tempfile.TemporaryDirectory() as two,
        neuron(options.base.resolve(), Path(one)) as base,
        neuron(HERE, Path(two)) as here,
    ):
        for kind, count in (("short", options.requests), ("long", max(4, options.requests // 10))):
            missed |= compare(kind, base, here, options.rounds, count)
    return int(missed)


def compare(kind: str, base: Neuron, here: Neuron, rounds: int, count: int) -> bool:
    size = len(bodies(kind, 0))
    print(f"\n{kind} request, {size} bytes, 8 tokens at most; ms of processor time each")
    for side in (base, here):
        spent(side, kind, 10_000, count)  # warm
    ratios: list[float] = []
    aside: list[float] = []
    for number in range(rounds):
        sides = [base, here] if number % 2 == 0 else [here, base]
        found = {id(side): spent(side, kind, number * count, count) for side in sides}
        old, new = found[id(base)], found[id(here)]
        ratios.append(sum(new.values()) / sum(old.values()))
        rest = [sum(value for name, value in side.items() if name != "engine") for side in (old, new)]
        aside.append(rest[1] / rest[0])
        shown = [" ".join(f"{name} {value:.2f}" for name, value in sorted(side.items())) for side in (old, new)]
        ratio = f"ratio {ratios[-1]:.3f}, without engine {aside[-1]:.3f}"
        print(f"  {number + 1:2}  base {shown[0]}   here {shown[1]}   {ratio}", flush=True)
    low, high = interval(ratios)
    print(f"  whole request: {low:.3f} to {high:.3f} of the base, bar {BAR}: {'met' if high <= BAR else 'MISSED'}")
    low, rest_high = interval(aside)
    print(f"  without the engine: {low:.3f} to {rest_high:.3f}")
    return high > BAR


if __name__ == "__main__":
    raise SystemExit(main())
