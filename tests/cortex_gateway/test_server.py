"""The process: ports, signals, drain."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from cortex_core.gateway_config import GatewayConfig, GatewaySection
from cortex_gateway.server import EXIT_CONFIG, bind, running, serve, url_of

from tests.cortex_gateway.harness import STREAM

from .fake_neuron import OPENAI_END, OPENAI_EVENTS, FakeNeuron
from .gateway_client import MODEL, Client, Start


async def test_leaving_the_context_frees_the_ports() -> None:
    config = GatewayConfig(gateway=GatewaySection(listen="127.0.0.1:0", metrics_listen="127.0.0.1:0"))
    async with running(config) as started:
        port = int(started.url.rpartition(":")[2])
        assert started.url != started.metrics_url
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", port))


async def test_a_client_that_keeps_its_connection_does_not_keep_the_gateway(start: Start) -> None:
    config = GatewayConfig(gateway=GatewaySection(listen="127.0.0.1:0", metrics_listen="127.0.0.1:0"))
    async with asyncio.timeout(20):
        async with running(config) as started:
            host, port = started.url.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        await reader.read()
        writer.close()


@pytest.mark.parametrize(
    ("address", "url"), [("127.0.0.1:0", "http://127.0.0.1:"), ("[::1]:0", "http://[::1]:")], ids=["v4", "v6"]
)
def test_addresses_of_both_families_are_bound(address: str, url: str) -> None:
    if "::" in address and not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    try:
        listener = bind(address)
    except OSError as error:
        if "::" in address:
            pytest.skip(f"no IPv6 here: {error}")
        raise
    with listener:
        assert url_of(listener).startswith(url)


def test_a_socket_handed_down_is_taken() -> None:
    with bind("127.0.0.1:0") as first, bind(f"fd://{os.dup(first.fileno())}") as second:
        assert url_of(first) == url_of(second)


@pytest.fixture
def own_logging() -> Iterator[None]:
    """`serve` sets logging up for a process of its own: the tests' process gets its handlers back."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    root.handlers.clear()  # or they would be closed
    yield
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.usefixtures("own_logging")
def test_a_catalogue_that_cannot_be_used_is_named_and_nothing_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = tmp_path / "models.toml"
    models.write_text("[[models]]\nid = 5\n")
    assert serve(GatewayConfig(models_config=str(models))) == EXIT_CONFIG
    assert "models.toml:2" in capsys.readouterr().out


@pytest.mark.usefixtures("own_logging")
def test_a_port_in_use_is_an_error_and_not_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with bind("127.0.0.1:0") as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        config = GatewayConfig(gateway=GatewaySection(listen=address, metrics_listen="127.0.0.1:0"), models_config="")
        from cortex_core.catalogue import Catalogue

        assert serve(config, Catalogue()) == 1
    assert "cannot listen" in capsys.readouterr().out


PROGRAM = """
import sys
from cortex_core.catalogue import Catalogue
from cortex_core.gateway_config import GatewayConfig, GatewaySection, NeuronEntry
from cortex_gateway.server import serve
section = GatewaySection(listen="127.0.0.1:0", metrics_listen="127.0.0.1:0", drain_grace_s=float(sys.argv[2]))
config = GatewayConfig(gateway=section, neurons=(NeuronEntry(name="alpha", endpoint=sys.argv[1]),))
raise SystemExit(serve(config, Catalogue(), config_path="cortex.toml"))
"""


class Process:
    """The gateway as a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.url = ""
        self.ready = ""

    @classmethod
    async def start(cls, neuron_url: str, grace_s: float) -> Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", PROGRAM, neuron_url, str(grace_s), stdout=subprocess.PIPE
        )
        started = cls(process)
        assert process.stdout is not None
        async with asyncio.timeout(60):
            while "listening on" not in started.ready:
                line = await process.stdout.readline()
                assert line, "the gateway ended while starting"
                started.ready = line.decode()
        started.url = started.ready.split("listening on ")[1].split(" ")[0]
        return started


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_with_streams_in_flight_drains_and_exits_0(
    neuron: FakeNeuron, start: Start, name: signal.Signals
) -> None:
    neuron.have(MODEL)
    neuron.answer_gate.clear()
    client = await start()
    started = await Process.start(neuron.url, grace_s=30)
    assert "cortex.toml" in started.ready and "1 neuron," in started.ready
    client.url = started.url
    async with client.post("/v1/chat/completions", STREAM) as response:
        early = b"".join(OPENAI_EVENTS)
        assert await response.content.readexactly(len(early)) == early
        started.process.send_signal(name)
        async with asyncio.timeout(20):
            while (await health(client))[0] == 200:
                await asyncio.sleep(0.01)
        neuron.answer_gate.set()
        assert await response.read() == OPENAI_END
    async with asyncio.timeout(20):
        assert await started.process.wait() == 0


async def test_the_grace_over_streams_end_with_an_error_and_the_process_with_0(
    neuron: FakeNeuron, start: Start
) -> None:
    neuron.have(MODEL)
    neuron.answer_gate.clear()
    client = await start()
    started = await Process.start(neuron.url, grace_s=0.1)
    client.url = started.url
    async with client.post("/v1/chat/completions", STREAM) as response:
        await response.content.readuntil(b"\n\n")
        started.process.send_signal(signal.SIGTERM)
        assert b"shutting down" in await response.read()
    async with asyncio.timeout(20):
        assert await started.process.wait() == 0


async def health(client: Client) -> tuple[int, Any]:
    async with client.get("/health") as response:
        return response.status, json.loads(await response.read())


async def test_a_connection_that_its_client_closed_is_given_up_at_once(neuron: FakeNeuron, start: Start) -> None:
    client = await start(neuron)
    fds = Path("/proc/self/fd")
    before = len(list(fds.iterdir()))
    address = urlsplit(client.url)
    for _ in range(20):
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.close()
        await writer.wait_closed()
    async with asyncio.timeout(20):
        while len(list(fds.iterdir())) > before + 2:
            await asyncio.sleep(0.05)  # the kernel tells nobody when another socket is closed
