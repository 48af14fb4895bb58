"""The end of a gateway as its supervisor, its balancer and its clients see it: real processes, several of them."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from .fake_neuron import OPENAI_END, OPENAI_EVENTS, FakeNeuron
from .gateway_client import MODEL

CHAT = "/v1/chat/completions"
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
STREAM = {**BODY, "stream": True}
EARLY = b"".join(OPENAI_EVENTS)


class Gateway:
    """`cortex serve` as a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process, url: str, session: aiohttp.ClientSession) -> None:
        self.process = process
        self.url = url
        self._session = session

    def post(self, body: dict[str, Any], path: str = CHAT) -> aiohttp.client._RequestContextManager:
        return self._session.post(self.url + path, json=body)

    async def ask(self, body: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        async with self.post(body) as response:
            return (
                response.status,
                {name.lower(): value for name, value in response.headers.items()},
                await response.read(),
            )

    async def health(self) -> int:
        async with self._session.get(self.url + "/health") as response:
            return response.status

    async def in_flight(self) -> int:
        async with self._session.get(self.url + "/admin/fleet") as response:
            fleet = json.loads(await response.read())
        return int(fleet["in_flight"]) + sum(queue["requests"] for queue in fleet["waiting"])

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    async def drains(self) -> None:
        """A balancer sees it: from now on it sends nothing more."""
        async with asyncio.timeout(20):
            while await self.health() != 503:
                await asyncio.sleep(0.01)

    async def ended(self) -> int:
        async with asyncio.timeout(30):
            return await self.process.wait()


Serve = Callable[..., Awaitable[Gateway]]


@pytest.fixture
async def serve(tmp_path: Path) -> AsyncIterator[Serve]:
    """`await serve(neuron, grace_s=…)` -> a gateway that has asked the neuron, with MODEL in its catalogue."""
    running: list[Gateway] = []
    (tmp_path / "models.toml").write_text(f'[[models]]\nid = "{MODEL}"\nvram_mb = 1000\n')
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:

        async def start(neuron: FakeNeuron, *, grace_s: float, hold_s: float = 60) -> Gateway:
            config = tmp_path / "cortex.toml"
            config.write_text(
                f'models_config = "models.toml"\n[gateway]\nlisten = "127.0.0.1:0"\nmetrics_listen = "127.0.0.1:0"\n'
                f"drain_grace_s = {grace_s}\nstream_hold_s = {hold_s}\nping_interval_s = 0.05\n"
                f'[poll]\ninterval_s = 0.2\n[[neurons]]\nname = "alpha"\nendpoint = "{neuron.url}"\n'
            )
            arguments = ["-m", "cortex_cli", "serve", "--config", str(config)]
            process = await asyncio.create_subprocess_exec(sys.executable, *arguments, stdout=subprocess.PIPE)
            assert process.stdout is not None
            async with asyncio.timeout(60):
                while b"listening on" not in (line := await process.stdout.readline()):
                    assert line, "the gateway ended while starting"
            gateway = Gateway(process, line.decode().split("listening on ")[1].split(" ")[0], session)
            running.append(gateway)
            async with asyncio.timeout(20):
                while True:
                    async with session.get(gateway.url + "/admin/fleet?refresh=1") as response:
                        if json.loads(await response.read())["nodes"][0]["health"] == "healthy":
                            return gateway

        try:
            yield start
        finally:
            for gateway in running:
                if gateway.process.returncode is None:
                    gateway.process.kill()
                await gateway.process.wait()


async def test_a_second_SIGTERM_ends_at_once_what_the_first_one_let_go_on(neuron: FakeNeuron, serve: Serve) -> None:
    neuron.have(MODEL)
    neuron.answer_gate.clear()
    gateway = await serve(neuron, grace_s=600)
    async with gateway.post(STREAM) as stream, gateway.post(STREAM, "/v1/messages") as other:
        for response in (stream, other):
            await response.content.readuntil(b"\n\n")
        whole = asyncio.ensure_future(gateway.ask(BODY))
        while neuron.num_running < 3:
            await asyncio.sleep(0.005)
        gateway.stop()
        await gateway.drains()
        assert not stream.content.at_eof() and not whole.done()
        gateway.stop()
        assert b"shutting down" in (await stream.read()).split(b"\n\n")[-2]
        assert b"event: error" in (await other.read()).split(b"\n\n")[-2]
        status, headers, body = await whole
    assert (status, json.loads(body)["error"]["code"]) == (503, "shutting_down") and int(headers["retry-after"]) > 0
    assert await gateway.ended() == 0
    async with asyncio.timeout(10):
        while neuron.num_running:
            await asyncio.sleep(0.005)


async def test_who_waits_for_a_cold_load_is_served_within_the_grace_and_nobody_new_is(
    neuron: FakeNeuron, serve: Serve
) -> None:
    neuron.load_gate.clear()
    gateway = await serve(neuron, grace_s=600, hold_s=0.05)
    async with gateway.post(STREAM) as stream:
        assert await stream.content.readuntil(b"\n\n") == b": ping\n\n"
        whole = asyncio.ensure_future(gateway.ask(BODY))
        while await gateway.in_flight() < 2:
            await asyncio.sleep(0.01)
        gateway.stop()
        await gateway.drains()
        status, headers, body = await gateway.ask(BODY)
        assert (status, json.loads(body)["error"]["code"]) == (503, "shutting_down") and int(headers["retry-after"]) > 0
        neuron.load_gate.set()
        assert (await stream.read()).endswith(OPENAI_END)
        assert (await whole)[0] == 200
    assert await gateway.ended() == 0
    assert neuron.num_loads == 1


async def test_who_waits_for_a_cold_load_beyond_the_grace_is_told_and_the_load_goes_on(
    neuron: FakeNeuron, serve: Serve
) -> None:
    neuron.load_gate.clear()
    gateway = await serve(neuron, grace_s=0.2, hold_s=0.05)
    async with gateway.post(STREAM) as stream:
        assert await stream.content.readuntil(b"\n\n") == b": ping\n\n"
        whole = asyncio.ensure_future(gateway.ask(BODY))
        while await gateway.in_flight() < 2:
            await asyncio.sleep(0.01)
        gateway.stop()
        assert b"shutting down" in (await stream.read()).split(b"\n\n")[-2]
        status, headers, _ = await whole
        assert status == 503 and int(headers["retry-after"]) > 0
    assert await gateway.ended() == 0
    # The neuron loads on, and whoever comes next joins it.
    following = await serve(neuron, grace_s=0)
    asking = asyncio.ensure_future(following.ask(BODY))
    while await following.in_flight() < 1:
        await asyncio.sleep(0.01)
    neuron.load_gate.set()
    assert (await asking)[0] == 200 and neuron.num_loads == 1


async def test_gateways_over_one_fleet_are_replaced_one_by_one_and_no_stream_ends(
    neuron: FakeNeuron, serve: Serve
) -> None:
    neuron.have(MODEL)
    neuron.answer_gate.clear()
    first, second = await serve(neuron, grace_s=600), await serve(neuron, grace_s=600)
    async with first.post(STREAM) as on_first, second.post(STREAM) as on_second:
        for response in (on_first, on_second):
            assert await response.content.readexactly(len(EARLY)) == EARLY
        first.stop()
        await first.drains()
        assert await second.health() == 200
        third = await serve(neuron, grace_s=600)
        async with third.post(STREAM) as on_third:
            assert await on_third.content.readexactly(len(EARLY)) == EARLY
            neuron.answer_gate.set()
            assert [await each.read() for each in (on_first, on_second, on_third)] == [OPENAI_END] * 3
    assert await first.ended() == 0
    assert [(await gateway.ask(BODY))[0] for gateway in (second, third)] == [200, 200]
    assert neuron.num_loads == 0
