"""What connections that nobody uses cost a server: lines of log, and the longest `/health` beside them.

    uv run python tests/bench/connections.py [--seconds 8] [--idle 400,5000] [--server gateway|neuron]
        [--loop uvloop|asyncio] [--source CHECKOUT]

A real gateway and a real neuron, each started with a soft limit of 256 descriptors, as a login shell or a unit without
`LimitNOFILE` gives it. Connections are opened and left alone (`idle`), or send a head or a body that never ends, a byte
now and then (`heads`, `bodies`), or each asks once and keeps its connection (`kept`). Meanwhile a fresh connection asks
for `/health` ten times a second, with five seconds of patience. `--source` measures another checkout with this one's
environment.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import resource
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

SOFT_LIMIT = 256
PATIENCE_S = 5.0
CHECKOUT = Path(__file__).parents[2]
SENT = {
    "idle": b"",
    "heads": b"GET /health HTTP/1.1\r\nhost: localhost\r\nx-slow: ",
    "bodies": b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n{",
    "kept": b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n",
}


class Server:
    """One daemon in a process of its own, with few descriptors allowed at first."""

    def __init__(self, kind: str, folder: Path, source: Path, loop: str) -> None:
        self.log = folder / f"{kind}.log"
        config = folder / f"{kind}.toml"
        if kind == "gateway":
            config.write_text('[gateway]\nlisten = "127.0.0.1:0"\nmetrics_listen = "127.0.0.1:0"\n')
            arguments = ["cortex_cli", "serve"]
        else:
            config.write_text('host = "127.0.0.1"\nport = 0\nstate_dir = ""\n')
            arguments = ["neuron", "serve"]
        packages = ("cortex-core", "cortex-gateway", "cortex-cli", "neuron")
        paths = os.pathsep.join(str(source / "packages" / package / "src") for package in packages)
        # Without a keeper: the daemon's memory is looked at.
        off = {"CORTEX_GATEWAY__WATCHDOG_S": "0", "NEURON_SERVER__WATCHDOG_S": "0"} if source == CHECKOUT else {}
        if loop == "asyncio":
            (folder / "uvloop.py").write_text("raise ImportError\n")
            paths = f"{folder}{os.pathsep}{paths}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", *arguments, "--config", str(config)],
            stdin=subprocess.DEVNULL,
            stdout=self.log.open("wb"),
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": paths, **off},
            preexec_fn=_few_descriptors,
        )
        self.address = self._wait_until_it_listens()

    def _wait_until_it_listens(self) -> tuple[str, int]:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            for line in self.log.read_text().splitlines():
                match = re.search(r"listening on (http://\S+)", line)
                if match and "metrics" not in line:
                    parts = urlsplit(match[1])
                    return parts.hostname or "", parts.port or 0
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        raise AssertionError(self.log.read_text())

    @property
    def resident_mb(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        return int(found[1]) / 1024 if found else 0.0

    def log_size(self) -> tuple[int, int]:
        content = self.log.read_bytes()
        return content.count(b"\n"), len(content)

    def stop(self) -> None:
        for _ in range(2):
            if self.process.poll() is None:
                self.process.terminate()
                time.sleep(0.1)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _few_descriptors() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (SOFT_LIMIT, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


@dataclass
class Health:
    """answers: seconds of each that came. unanswered: refused, reset, or not within the patience."""

    answers: list[float]
    unanswered: int

    @classmethod
    def watched(cls, address: tuple[str, int], seconds: float) -> Health:
        """In a process of its own: this one's thousands of sockets are not to be in its way."""
        stop_at = time.monotonic() + seconds
        health = cls([], 0)
        while time.monotonic() < stop_at:
            began = time.monotonic()
            try:
                with socket.create_connection(address, timeout=PATIENCE_S) as connection:
                    connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
                    is_answered = connection.recv(64).startswith(b"HTTP/1.1 200")
            except OSError:
                is_answered = False
            if is_answered:
                health.answers.append(time.monotonic() - began)
            else:
                health.unanswered += 1
            time.sleep(0.1)
        return health


def measure(server: Server, *, sent: bytes, num_idle: int, seconds: float) -> str:
    """One row: what was seen while `num_idle` connections were opened and kept."""
    lines, size = server.log_size()
    before_mb = server.resident_mb
    with ExitStack() as opened:
        pool = opened.enter_context(ProcessPoolExecutor(1))
        watching = pool.submit(Health.watched, server.address, seconds)
        began = time.monotonic()
        connections: list[socket.socket] = []
        for _ in range(num_idle):
            with suppress(OSError):
                connection = opened.enter_context(socket.create_connection(server.address, timeout=PATIENCE_S))
                connection.sendall(sent)
                connections.append(connection)
        opening_s = time.monotonic() - began
        while not watching.done():
            if sent in (SENT["heads"], SENT["bodies"]):
                for connection in connections:
                    with suppress(OSError):
                        connection.send(b"x")
            time.sleep(0.5)
        health = watching.result()
        elapsed = time.monotonic() - began
        grown_mb = server.resident_mb - before_mb
    more_lines, more_bytes = (now - then for now, then in zip(server.log_size(), (lines, size), strict=True))
    longest = f"{max(health.answers) * 1000:.0f} ms" if health.answers else "none"
    return (
        f"{opening_s:.1f} s | {len(health.answers)} | {health.unanswered} | {longest} | {more_lines / elapsed:,.1f} | "
        f"{more_bytes / 1e6:.2f} MB | {grown_mb:.0f} MB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--idle", default="400,5000", help="how many connections")
    parser.add_argument("--kinds", default=",".join(SENT))
    parser.add_argument("--server", choices=("gateway", "neuron"), action="append")
    parser.add_argument("--loop", choices=("uvloop", "asyncio"), default="uvloop")
    parser.add_argument("--source", type=Path, default=CHECKOUT)
    options = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    print(f"{platform.platform()}, Python {platform.python_version()}, {os.cpu_count()} cores, {options.loop}")
    print(f"soft limit {SOFT_LIMIT}, hard limit {hard}\n")
    print("| server | connections | opened in | /health 200 | without answer | longest | log lines/s | log | memory |")
    print("|---|---|---|---|---|---|---|---|---|")
    for kind in options.server or ("gateway", "neuron"):
        for sent in options.kinds.split(","):
            for num_idle in map(int, options.idle.split(",")):
                with tempfile.TemporaryDirectory() as folder:
                    server = Server(kind, Path(folder), options.source.resolve(), options.loop)
                    try:
                        row = measure(server, sent=SENT[sent], num_idle=num_idle, seconds=options.seconds)
                    finally:
                        server.stop()
                print(f"| {kind} | {num_idle} {sent} | {row} |", flush=True)


if __name__ == "__main__":
    main()
