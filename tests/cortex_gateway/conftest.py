"""A gateway on a real socket in front of fake neurons, and a client for it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import msgspec
import pytest
from cortex_core.catalogue import Catalogue
from cortex_core.entitlements import EntitlementsSection
from cortex_core.gateway_config import (
    BreakerSection,
    CaptureSection,
    EvictionSection,
    GatewayConfig,
    GatewaySection,
    NeuronEntry,
    PollSection,
    PromptFiltersSection,
    RoutingSection,
)
from cortex_core.telemetry import TelemetrySection
from cortex_gateway.server import running
from hypothesis import HealthCheck, settings

from . import fake_openai
from .fake_neuron import FakeNeuron, listening
from .fake_openai import FakeOpenAI
from .gateway_client import Client, Start

# Tests share their machine with whatever else runs on it: how long an example takes says nothing.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


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
async def openai_server(stack: AsyncExitStack) -> FakeOpenAI:
    return await stack.enter_async_context(fake_openai.listening(FakeOpenAI()))


@pytest.fixture
def start(stack: AsyncExitStack) -> Start:
    """`await start(neuron, …, catalogue=…, gateway={…}, poll={…})` -> a client of a gateway that has polled them."""

    async def start_gateway(
        *neurons: FakeNeuron | FakeOpenAI,
        catalogue: Catalogue | None = None,
        gateway: dict[str, Any] | None = None,
        poll: dict[str, Any] | None = None,
        eviction: dict[str, Any] | None = None,
        entitlements: dict[str, Any] | None = None,
        routing: dict[str, Any] | None = None,
        breaker: dict[str, Any] | None = None,
        prompt_filters: dict[str, Any] | None = None,
        telemetry: dict[str, Any] | None = None,
        capture: dict[str, Any] | None = None,
        grace_s: float = 0.0,
        wait_polled: bool = True,
    ) -> Client:
        listeners = {"listen": "127.0.0.1:0", "metrics_listen": "127.0.0.1:0", "stream_hold_s": 30.0}
        config = GatewayConfig(
            gateway=msgspec.convert({**listeners, **(gateway or {})}, GatewaySection),
            poll=msgspec.convert({"interval_s": 60.0, **(poll or {})}, PollSection),
            eviction=msgspec.convert(eviction or {}, EvictionSection),
            entitlements=msgspec.convert(entitlements or {}, EntitlementsSection),
            routing=msgspec.convert(routing or {}, RoutingSection),
            breaker=msgspec.convert(breaker or {}, BreakerSection),
            prompt_filters=msgspec.convert(prompt_filters or {}, PromptFiltersSection),
            capture=msgspec.convert(capture or {}, CaptureSection),
            # Off unless a test asks for them, whatever the environment of the tests says.
            telemetry=msgspec.convert({"traces": False, **(telemetry or {})}, TelemetrySection),
            neurons=tuple(
                each.entry if isinstance(each, FakeOpenAI) else NeuronEntry(name=each.name, endpoint=each.url)
                for each in neurons
            ),
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
