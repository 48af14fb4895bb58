"""A cold model, two gateways and one neuron, all real processes: however many ask, it is loaded once."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

from tests.e2e.fleet_process import MODEL, call, eventually

NUM_REQUESTS = 200


class Daemon:
    """A daemon as a user starts it; `url` is where it says that it listens."""

    def __init__(self, log: Path, *arguments: str) -> None:
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *arguments], stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )

        def said(pattern: str) -> str:
            assert self.process.poll() is None, log.read_text()
            found = re.search(pattern, log.read_text())
            return found[1] if found else ""

        self.url: str = eventually(
            lambda: said(r" listening on (http://[\w.:]+)"), within_s=120, what=f"{log}: listens"
        )
        self.metrics_url = said(r"metrics exporter on (http://\S+)/metrics")

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


@pytest.fixture
def daemons(tmp_path: Path) -> Iterator[list[Daemon]]:
    """A neuron without models, and two gateways that may load the demo model on it."""
    started: list[Daemon] = []
    try:
        (tmp_path / "neuron.toml").write_text("")
        neuron = Daemon(
            tmp_path / "neuron.log",
            "neuron",
            "serve",
            "--config",
            str(tmp_path / "neuron.toml"),
            "--host",
            "127.0.0.1",
            "--port",
            "0",
        )
        started.append(neuron)
        (tmp_path / "models.toml").write_text(f'[[models]]\nid = "{MODEL}"\n')
        (tmp_path / "cortex.toml").write_text(
            'models_config = "models.toml"\n'
            '[gateway]\nlisten = "127.0.0.1:0"\nmetrics_listen = "127.0.0.1:0"\n'
            f'[[neurons]]\nname = "local"\nendpoint = "{neuron.url}"\n'
        )
        started += [
            Daemon(tmp_path / f"{name}.log", "cortex_cli", "serve", "--config", str(tmp_path / "cortex.toml"))
            for name in ("one", "other")
        ]
        yield started
    finally:
        for daemon in reversed(started):
            daemon.stop()


def sample(base: str, name: str, **labels: str) -> float:
    """The sum of all samples of a metric with these labels."""
    status, _, body = call(base, "GET", "/metrics")
    assert status == 200
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    return sum(
        float(line.rpartition(" ")[2])
        for line in body.decode().splitlines()
        if line.startswith(name + "{") and all(label in line for label in wanted)
    )


async def ask(session: aiohttp.ClientSession, base: str, *, stream: bool) -> tuple[int, str, bytes]:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1, "stream": stream}
    async with session.post(f"{base}/v1/chat/completions", json=body) as response:
        return response.status, response.headers.get("x-cortex-route", ""), await response.read()


async def ask_all(bases: list[str]) -> list[tuple[int, str, bytes]]:
    timeout = aiohttp.ClientTimeout(total=170)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        return await asyncio.gather(*(ask(session, bases[i % 2], stream=i % 3 == 0) for i in range(NUM_REQUESTS)))


@pytest.mark.slow
def test_200_first_requests_through_two_gateways_load_the_model_once(daemons: list[Daemon]) -> None:
    neuron, *gateways = daemons
    answers = asyncio.run(ask_all([gateway.url for gateway in gateways]))
    assert [status for status, _, _ in answers] == [200] * NUM_REQUESTS, {body for _, _, body in answers}
    assert {route for _, route, _ in answers} <= {"cold", "held", "loaded"}
    for number, (_, _, body) in enumerate(answers):
        if number % 3 == 0:
            assert body.rstrip().endswith(b"data: [DONE]")
        else:
            assert json.loads(body)["usage"]["completion_tokens"] == 1
    assert sample(neuron.url, "neuron_model_load_seconds_count", model=MODEL) == 1
    # Each gateway asks at most once; the neuron joins whoever asks while it loads.
    asked = [sample(gateway.metrics_url, "cortex_model_loads_total", model=MODEL) for gateway in gateways]
    assert 1 <= sum(asked) <= 2 and max(asked) == 1


@pytest.mark.slow
def test_a_pinned_model_is_pinned_for_every_gateway(daemons: list[Daemon]) -> None:
    neuron, one, other = daemons
    for verb in ("load", "pin"):
        status, _, body = call(one.url, "POST", f"/admin/models/{verb}", {"model": MODEL}, timeout=170)
        assert status == 200, body
    assert json.loads(body)["kept_by"] == {"local": "neuron"}
    fleet = json.loads(call(other.url, "GET", "/admin/fleet?refresh=1")[2])
    assert [model["pinned"] for model in fleet["nodes"][0]["models"]] == [True]
    unpin = [sys.executable, "-m", "cortex_cli", "unpin", MODEL, "--endpoint", other.url, "--json"]
    answer = json.loads(subprocess.run(unpin, check=True, capture_output=True, text=True).stdout)
    assert (answer["status"], answer["nodes"]) == ("unpinned", ["local"])
    (info,) = json.loads(call(neuron.url, "GET", "/models")[2])
    assert info["pinned"] is False and info["spec"]["model_id"] == MODEL
