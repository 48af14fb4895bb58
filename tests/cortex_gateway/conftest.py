"""A gateway on a real socket in front of fake neurons, and a client for it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import msgspec
import pytest
from cortex_core.catalogue import Catalogue
from cortex_core.gateway_config import (
    EvictionSection,
    GatewayConfig,
    GatewaySection,
    NeuronEntry,
    PollSection,
)
from cortex_gateway.server import RunningGateway, running

from .fake_neuron import FakeNeuron, listening

MODEL = "org/model"


class Client:
    """What a test asks a running gateway."""

    def __init__(self, session: aiohttp.ClientSession, started: RunningGateway) -> None:
        self.session = session
        self.started = started
        self.url = started.url

    def post(self, path: str, body: Any, **kwargs: Any) -> aiohttp.client._RequestContextManager:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": "application/json", **kwargs.pop("headers", {})}
        return self.session.post(self.url + path, data=data, headers=headers, **kwargs)

    def get(self, path: str, **kwargs: Any) -> aiohttp.client._RequestContextManager:
        return self.session.get(self.url + path, **kwargs)

    async def chat(self, **fields: Any) -> tuple[int, dict[str, Any]]:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], **fields}
        async with self.post("/v1/chat/completions", body) as response:
            return response.status, json.loads(await response.read())

    async def metric(self, name: str, **labels: str) -> float | None:
        async with self.session.get(self.started.metrics_url + "/metrics") as response:
            assert response.status == 200
            text = await response.text()
        for line in text.splitlines():
            if line.startswith((name + "{", name + " ")) and all(f'{k}="{v}"' in line for k, v in labels.items()):
                return float(line.rpartition(" ")[2])
        return None


Start = Callable[..., Awaitable[Client]]


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as opened:
        yield opened


@pytest.fixture
async def neuron(stack: AsyncExitStack) -> FakeNeuron:
    return await stack.enter_async_context(listening(FakeNeuron("alpha")))


@pytest.fixture
async def second(stack: AsyncExitStack) -> FakeNeuron:
    return await stack.enter_async_context(listening(FakeNeuron("beta")))


@pytest.fixture
def start(stack: AsyncExitStack) -> Start:
    """`await start(neuron, …, catalogue=…, gateway={…}, poll={…})` -> a client of a gateway that has polled them."""

    async def start_gateway(
        *neurons: FakeNeuron,
        catalogue: Catalogue | None = None,
        gateway: dict[str, Any] | None = None,
        poll: dict[str, Any] | None = None,
        eviction: dict[str, Any] | None = None,
        grace_s: float = 0.0,
        wait_polled: bool = True,
    ) -> Client:
        listeners = {"listen": "127.0.0.1:0", "metrics_listen": "127.0.0.1:0", "stream_hold_s": 30.0}
        config = GatewayConfig(
            gateway=msgspec.convert({**listeners, **(gateway or {})}, GatewaySection),
            poll=msgspec.convert({"interval_s": 60.0, **(poll or {})}, PollSection),
            eviction=msgspec.convert(eviction or {}, EvictionSection),
            neurons=tuple(NeuronEntry(name=each.name, endpoint=each.url) for each in neurons),
        )
        started = await stack.enter_async_context(running(config, catalogue, grace_s=grace_s))
        session = await stack.enter_async_context(
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=60), auto_decompress=False
            )
        )
        if wait_polled:
            fleet = started.gateway.fleet
            while any(node.health == "unknown" for node in fleet.snapshot.nodes.values()):
                await fleet.changed()
        return Client(session, started)

    return start_gateway


async def until(condition: Callable[[], Any], client: Client) -> None:
    """Wait, change by change of the fleet, until `condition` holds."""
    async with asyncio.timeout(10):
        while not condition():
            await client.started.gateway.fleet.changed()
