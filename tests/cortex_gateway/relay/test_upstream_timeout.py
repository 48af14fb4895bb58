"""How long a neuron may be silent, and who may be."""

from __future__ import annotations

import asyncio

from aiohttp import web

from tests.cortex_gateway.fake_neuron import OPENAI_END, OPENAI_EVENTS, FakeNeuron
from tests.cortex_gateway.gateway_client import MODEL, Start
from tests.cortex_gateway.relay.harness import CHAT, body


async def test_a_neuron_that_falls_silent_in_mid_stream_is_given_up(neuron: FakeNeuron, start: Start) -> None:
    neuron.have(MODEL)
    neuron.answer_gate.clear()
    client = await start(neuron, gateway={"upstream_idle_timeout_s": 0.5})
    async with client.post(CHAT, body(stream=True)) as response:
        text = await response.read()
    assert text.startswith(b"".join(OPENAI_EVENTS))
    assert b'"code":"upstream_timeout"' in text
    async with asyncio.timeout(10):
        await neuron.request_aborted.wait()


async def test_F29_a_stream_may_last_longer_than_the_idle_timeout(neuron: FakeNeuron, start: Start) -> None:
    neuron.have(MODEL)

    async def slowly(request: web.Request) -> web.StreamResponse:
        response = await neuron.begin_stream(request)
        for _ in range(10):
            await response.write(b": ping\n\n")
            await asyncio.sleep(0.05)  # together longer than the timeout, each shorter
        await response.write(OPENAI_END)
        return response

    neuron.answer = slowly
    client = await start(neuron, gateway={"upstream_idle_timeout_s": 0.3})
    async with client.post(CHAT, body(stream=True)) as response:
        assert (await response.read()).endswith(OPENAI_END)
