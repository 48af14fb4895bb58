"""What the gateway costs: CPU per request, per streamed chunk and per large prompt, beside a bare pass-through.

    python tests/bench/gateway.py [--rounds 4] [--router PROGRAM] [--auth off|key|limits|budget] [--observed]
        [--json]

Each round starts fresh processes in alternating order: a canned backend, the subject, a load generator
(`gateway_processes.py`). The subjects:

`floor`     a Starlette + aiohttp pass-through of some 40 lines, on the same server as the gateway, its HTTP/1 included
`floor-h11` the same on hypercorn as it comes
`cortex`    the gateway with routing, metrics, access log, usage metering
`openai`    the gateway in front of a server that speaks only OpenAI chat: chat passes, messages and responses are
            translated
`traced`    with `--observed`: the gateway with OpenTelemetry's traces, each request sampled
`captured`  with `--observed`: the gateway that keeps its last 50 exchanges
`router`    with `--router`: vLLM production-stack's router, its program `vllm-router`. It is no part of this project:
            clone github.com/vllm-project/production-stack, make an environment of its own with Python 3.12 (`python
            -m venv E`, `E/bin/pip install CLONE`) and give `--router E/bin/vllm-router`

CPU is utime + stime of the subject's process. Absolute times drift with the machine; the ratio within a round does
not, so the ratio is what is judged, at its median. With `--auth` the clients' key is known, has limits per minute, or a
budget in SQLite as well; then the ratios are printed and not judged.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import gateway_processes

Figures = dict[str, float]
"""Microseconds of CPU by measure: request, chunk, prompt; chunks of a surface by its name."""


class Ratio(NamedTuple):
    """Of the bars for one thing, one has to be met."""

    what: str
    of: tuple[str, str]  # subject, measure
    to: tuple[str, str]
    bar: float | None


OBSERVED = ("traced", "captured")

RATIOS = (
    Ratio("request", ("cortex", "request"), ("floor", "request"), 1.4),
    Ratio("request", ("cortex", "request"), ("floor-h11", "request"), None),
    Ratio("request", ("cortex", "request"), ("router", "request"), 0.75),
    Ratio("chunk", ("cortex", "chunk"), ("floor", "chunk"), 1.2),
    Ratio("chunk", ("cortex", "chunk"), ("floor-h11", "chunk"), None),
    Ratio("chunk", ("cortex", "chunk"), ("router", "chunk"), None),
    Ratio("200 kB prompt", ("cortex", "prompt"), ("floor", "prompt"), 1.5),
    Ratio("200 kB prompt", ("cortex", "prompt"), ("router", "prompt"), None),
    Ratio("request", ("traced", "request"), ("cortex", "request"), None),
    Ratio("chunk", ("traced", "chunk"), ("cortex", "chunk"), None),
    Ratio("200 kB prompt", ("traced", "prompt"), ("cortex", "prompt"), None),
    Ratio("request", ("captured", "request"), ("cortex", "request"), None),
    Ratio("chunk", ("captured", "chunk"), ("cortex", "chunk"), None),
    Ratio("200 kB prompt", ("captured", "prompt"), ("cortex", "prompt"), None),
    Ratio("chunk of messages", ("openai", "messages"), ("openai", "chat"), 2.0),
    Ratio("chunk of responses", ("openai", "responses"), ("openai", "chat"), 2.0),
)


# ---------------------------------------------------------------------------------------------- processes


def command(*arguments: object) -> list[str]:
    return [sys.executable, gateway_processes.__file__, *map(str, arguments)]


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


def port_in(text: str) -> int | None:
    """What a subject of ours says once it listens."""
    for line in text.splitlines():
        if line.isdigit():
            return int(line)
        if "cortex listening on " in line:
            return int(line.split("cortex listening on http://127.0.0.1:")[1].split(" ")[0])
    return None


def answering(port: int) -> int | None:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
            return port
    except OSError:
        return None


@contextmanager
def subject(name: str, backend: str, log_path: Path, options: argparse.Namespace) -> Iterator[tuple[int, int]]:
    """(pid, port). The log goes to a file: a pipe that nobody reads would block, one that is read costs CPU here."""
    look: Callable[[str], int | None] = port_in
    if name == "router":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        arguments = [options.router, "--host", "127.0.0.1", "--port", str(port), "--service-discovery", "static"]
        arguments += ["--static-backends", backend, "--static-models", gateway_processes.MODEL]
        arguments += ["--routing-logic", "roundrobin"]

        def look(text: str) -> int | None:
            return answering(port)
    else:
        arguments = command(f"_{name}", "--backend", backend, "--auth", options.auth, "--scratch", log_path.parent)
        arguments += ["--http1", "h11" if name == "floor-h11" else options.http1]
    with log_path.open("w") as log, log_path.open() as lines:
        process = subprocess.Popen(arguments, stdout=log, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + 240  # the router imports for a minute where the machine is busy
            text = ""
            found = None
            while found is None:
                text += lines.read()
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"{name} did not start:\n{text}")
                found = look(text)
                time.sleep(0.05)
            yield process.pid, found
        finally:
            process.kill()
            process.wait()


# ---------------------------------------------------------------------------------------------- measures


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(pid: int, port: int, kind: str, *, clients: int, seconds: float, surface: str = "chat") -> float:
    """Microseconds of CPU for each request, chunk or prompt."""
    arguments = ("--port", port, "--clients", clients, "--seconds", seconds, "--surface", surface, "--kind", kind)
    with child("_load", *arguments) as load:
        assert first_line(load) == "warm"
        before = cpu_seconds(pid)
        requests, chunks = map(int, first_line(load).split())
        spent = cpu_seconds(pid) - before
    count = chunks if kind == "chunk" else requests
    if not count:
        raise SystemExit("nothing was answered")
    return 1e6 * spent / count


def one_round(name: str, options: argparse.Namespace, scratch: Path) -> Figures:
    with (
        child("_backend", "--events", options.events, "--interval", options.interval) as backend,
        subject(name, f"http://127.0.0.1:{first_line(backend)}", scratch / f"{name}.log", options) as (pid, port),
    ):
        streams = {"clients": options.clients, "seconds": options.stream_seconds}
        if name == "openai":
            surfaces = gateway_processes.SURFACES
            return {surface: measure(pid, port, "chunk", surface=surface, **streams) for surface in surfaces}
        return {
            "request": measure(pid, port, "request", clients=options.connections, seconds=options.seconds),
            "chunk": measure(pid, port, "chunk", **streams),
            "prompt": measure(pid, port, "prompt", clients=8, seconds=options.seconds),
        }


def compare(subjects: list[str], options: argparse.Namespace) -> list[dict[str, Figures]]:
    """All rounds, printed as they come."""
    rounds: list[dict[str, Figures]] = []
    with tempfile.TemporaryDirectory(prefix="cortex-bench-") as scratch:
        for number in range(1, options.rounds + 1):
            results = {}
            for name in subjects if number % 2 else reversed(subjects):
                results[name] = one_round(name, options, Path(scratch))
                figures = ", ".join(f"{measure} {value:.1f}" for measure, value in results[name].items())
                print(f"round {number}, {name:>10}, us of CPU: {figures}", flush=True)
            rounds.append(results)
    return rounds


def judge(rounds: list[dict[str, Figures]], *, is_judged: bool) -> bool:
    met: dict[str, bool] = {}
    for ratio in RATIOS:
        (subject_name, measure_name), (other, other_measure) = ratio.of, ratio.to
        if subject_name not in rounds[0] or other not in rounds[0]:
            continue
        each = [one[subject_name][measure_name] / one[other][other_measure] for one in rounds]
        median = statistics.median(each)
        verdict = ""
        if ratio.bar is not None and is_judged:
            is_met = median <= ratio.bar
            met[ratio.what] = met.get(ratio.what, False) or is_met
            verdict = f"; bar {ratio.bar}x: {'met' if is_met else 'missed'}"
        against = other if other_measure == measure_name else f"{other_measure} passed through"
        listed = " ".join(f"{value:.2f}" for value in each)
        of = f" ({subject_name})" if subject_name in OBSERVED else ""
        print(f"CPU per {ratio.what}{of}: {median:.2f}x {against} (rounds: {listed}{verdict})")
    for what, is_met in met.items():
        print(f"{what}: {'pass' if is_met else 'FAIL'}")
    return all(met.values())


def preamble(script: str) -> None:
    names = ("hypercorn", "httptools", "aiohttp", "starlette", "msgspec", "uvloop")
    print("command:", " ".join(["python", f"tests/bench/{script}", *sys.argv[1:]]))
    print(f"machine: {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print("versions:", ", ".join(f"{name} {version(name)}" for name in names))


def parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=3.0, help="of JSON requests, per subject and round")
    parser.add_argument("--stream-seconds", type=float, default=4.0, help="of paced streams, per subject and round")
    parser.add_argument("--connections", type=int, default=32, help="for JSON requests")
    parser.add_argument("--clients", type=int, default=64, help="streams at once")
    parser.add_argument("--events", type=int, default=100, help="per stream")
    parser.add_argument("--interval", type=float, default=0.02, help="seconds between two events of a stream")
    parser.add_argument("--http1", choices=["auto", "h11", "httptools"], default="auto", help="as gateway.http1_parser")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON as well")
    parser.set_defaults(auth="off", router=None)
    return parser


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--auth", choices=["off", "key", "limits", "budget"], default="off", help="of clients' key")
    arguments.add_argument("--router", metavar="PROGRAM", help="vllm-router, compared as well")
    arguments.add_argument("--observed", action="store_true", help="also with traces, and with captures")
    options = arguments.parse_args()
    preamble("gateway.py")
    subjects = ["floor", "floor-h11", "cortex"]
    if options.router:
        subjects.append("router")
    if options.observed:
        subjects += OBSERVED
    if options.auth == "off":
        subjects.append("openai")
    rounds = compare(subjects, options)
    is_good = judge(rounds, is_judged=options.auth == "off")
    if options.json:
        print(json.dumps({"rounds": rounds}))
    return 0 if is_good else 1


if __name__ == "__main__":
    raise SystemExit(main())
