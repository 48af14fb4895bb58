"""More connections than a server has descriptors for: real processes, as a shell with few of them starts them."""

from __future__ import annotations

import os
import re
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.e2e.fleet_process import call, eventually

FEW = 256
HARD = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
SLOW_HEAD = b"GET /health HTTP/1.1\r\nhost: localhost\r\nx-slow: "
SLOW_BODY = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n{"


class Server:
    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self.log = log
        self.url = ""
        self.metrics_url = ""

    @property
    def lines(self) -> list[str]:
        return self.log.read_text().splitlines()

    def is_listening(self) -> bool:
        assert self.process.poll() is None, self.lines
        for line in self.lines:
            if match := re.search(r"(metrics exporter on|listening on) (http://[\d.:]+)", line):
                if match[1] == "listening on":
                    self.url = match[2]
                else:
                    self.metrics_url = match[2]
        self.metrics_url = self.metrics_url or self.url
        return bool(self.url)

    def metric(self, sample: str) -> float:
        _, _, body = call(self.metrics_url, "GET", "/metrics")
        found = re.search(rf"^{re.escape(sample)} (\S+)$", body.decode(), re.M)
        assert found, sample
        return float(found[1])


@contextmanager
def serving(kind: str, folder: Path, *, soft: int, hard: int, loop: str = "uvloop") -> Iterator[Server]:
    config, log = folder / f"{kind}.toml", folder / f"{kind}.log"
    if kind == "gateway":
        config.write_text('[gateway]\nlisten = "127.0.0.1:0"\nmetrics_listen = "127.0.0.1:0"\n')
        module = "cortex_cli"
    else:
        config.write_text('host = "127.0.0.1"\nport = 0\nstate_dir = ""\n')
        module = "neuron"
    arguments = ["-m", module, "serve", "--config", str(config)]
    if loop == "asyncio":
        hide = f"import runpy, sys; sys.modules['uvloop'] = None; sys.argv = ['{module}', *sys.argv[1:]]; "
        run = f"runpy.run_module('{module}', run_name='__main__')"
        arguments = ["-c", hide + run, *arguments[2:]]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "CORTEX_GATEWAY__WATCHDOG_S": "0", "NEURON_SERVER__WATCHDOG_S": "0"},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard)),
        )
    server = Server(process, log)
    try:
        eventually(server.is_listening, within_s=120, what=f"the {kind} listens")
        yield server
    finally:
        process.terminate()
        process.wait(60)


FLOOD = 2000
FORGED = "/nowhere/%1b%5b2J%0a2026-01-01%2000:00:00,000%20INFO%20cortex:%20forged%c2%9b31m"


@pytest.mark.parametrize("kind", ["gateway", "neuron"])
def test_O2_a_flood_of_refused_requests_is_counted_and_not_poured_into_the_log(tmp_path: Path, kind: str) -> None:
    """Each has a line or is counted in one; and no client's words begin a line."""
    with serving(kind, tmp_path, soft=FEW, hard=HARD) as server:
        before, parts = len(server.lines), urlsplit(server.url)
        request = f"GET {FORGED} HTTP/1.1\r\nhost: x\r\n\r\n".encode()
        with socket.create_connection((parts.hostname, parts.port), timeout=60) as connection:
            for _ in range(FLOOD // 20):
                connection.sendall(request * 20)
                num_answers, got = 0, b""
                while num_answers < 20:
                    got += connection.recv(65536)
                    num_answers = got.count(b"HTTP/1.1 404 ")
        prefix = "cortex" if kind == "gateway" else "neuron"
        left_out = server.metric(f'{prefix}_log_lines_left_out_total{{kind="requests"}}')
        eventually(lambda: "more requests that no model worked on" in server.log.read_text(), within_s=30, what="told")
        assert left_out > 0

        def has_all() -> bool:
            return sum("/nowhere" in line for line in server.lines[before:]) + left_out == FLOOD

        eventually(has_all, within_s=30, what="each request has its line or is counted")
        for line in server.lines[before:]:
            assert line.isprintable() and not line.startswith("2026-01-01")


@pytest.mark.parametrize("kind", ["gateway", "neuron"])
def test_O2_what_is_no_http_leaves_no_lines(tmp_path: Path, kind: str) -> None:
    noise = [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\nx y: z\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(64),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 64,
        b"\x00" * 100,
        b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    ]
    with serving(kind, tmp_path, soft=FEW, hard=HARD) as server:
        before, parts = len(server.lines), urlsplit(server.url)
        for number in range(140):
            with socket.create_connection((parts.hostname, parts.port), timeout=60) as connection:
                connection.sendall(noise[number % len(noise)])
        assert health(server.url) == 200
        news = [line for line in server.lines[before:] if "request rejected" not in line and "access" not in line]
        assert len(news) <= 5, news


def health(url: str) -> int:
    status, _, _ = call(url, "GET", "/health", timeout=30)
    return status


@pytest.mark.parametrize("kind", ["gateway", "neuron"])
@pytest.mark.parametrize(
    ("loop", "sent"),
    [
        pytest.param("uvloop", b"", id="uvloop-idle"),
        pytest.param("uvloop", SLOW_HEAD, id="uvloop-slow heads"),
        pytest.param("uvloop", SLOW_BODY, id="uvloop-slow bodies"),
        pytest.param("asyncio", b"", id="asyncio-idle"),
        pytest.param("asyncio", SLOW_HEAD, id="asyncio-slow heads", marks=pytest.mark.full),
        pytest.param("asyncio", SLOW_BODY, id="asyncio-slow bodies", marks=pytest.mark.full),
    ],
)
def test_O2_more_idle_connections_than_descriptors_keep_nobody_from_being_served(
    tmp_path: Path, kind: str, loop: str, sent: bytes
) -> None:
    with serving(kind, tmp_path, soft=FEW, hard=FEW, loop=loop) as server, ExitStack() as opened:
        parts = urlsplit(server.url)
        before = len(server.lines)
        for number in range(400):
            connection = opened.enter_context(socket.create_connection((parts.hostname, parts.port), timeout=30))
            connection.sendall(sent)
            if number % 100 == 99:
                assert health(server.url) == 200
        prefix = "cortex" if kind == "gateway" else "neuron"
        reason = "body" if sent == SLOW_BODY else "room"
        assert server.metric(f'{prefix}_connections_ended_total{{listener="api",reason="{reason}"}}') > 0
        limit = server.metric(f'{prefix}_connections_limit{{listener="api"}}')
        assert server.metric(f'{prefix}_connections{{listener="api",state="idle"}}') <= limit < FEW
        eventually(lambda: "to make room" in server.log.read_text(), within_s=30, what="it is told")
        requests = ("cortex_gateway.access", "outcome=client_gone")  # of those whose bodies were begun
        news = [line for line in server.lines[before:] if not any(word in line for word in requests)]
        assert len(news) <= 10, news
        assert not [line for line in news if "Traceback" in line]


@pytest.mark.parametrize("kind", ["gateway", "neuron"])
def test_O2_the_soft_limit_of_descriptors_is_raised_to_the_hard_one(tmp_path: Path, kind: str) -> None:
    assert HARD > 4 * FEW, "this host gives too few descriptors to tell"
    with serving(kind, tmp_path, soft=FEW, hard=HARD) as server, ExitStack() as opened:
        limits = Path(f"/proc/{server.process.pid}/limits").read_text()
        found = re.search(r"^Max open files +(\d+) +(\d+)", limits, re.M)
        assert found and int(found[1]) == int(found[2]) == HARD
        parts = urlsplit(server.url)
        for _ in range(2 * FEW):
            opened.enter_context(socket.create_connection((parts.hostname, parts.port), timeout=30))
        assert health(server.url) == 200
        prefix = "cortex" if kind == "gateway" else "neuron"
        assert server.metric(f'{prefix}_connections_ended_total{{listener="api",reason="room"}}') == 0
        assert server.metric(f'{prefix}_connections{{listener="api",state="idle"}}') >= 2 * FEW


def test_O2_the_metrics_listener_has_a_bound_of_its_own(tmp_path: Path) -> None:
    with serving("gateway", tmp_path, soft=FEW, hard=FEW) as server, ExitStack() as opened:
        parts = urlsplit(server.metrics_url)
        for _ in range(200):
            opened.enter_context(socket.create_connection((parts.hostname, parts.port), timeout=30))
        assert health(server.url) == 200
        assert server.metric('cortex_connections_ended_total{listener="metrics",reason="room"}') > 0
        assert server.metric('cortex_connections_ended_total{listener="api",reason="room"}') == 0
