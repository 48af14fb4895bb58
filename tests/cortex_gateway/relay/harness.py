"""Requests to a gateway, and what they leave."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest
from cortex_gateway.http.asgi import Message, RawHeaders
from cortex_gateway.http.body import RequestBody
from cortex_gateway.http.client_writer import ClientWriter
from cortex_gateway.relay.request_state import RequestState
from cortex_gateway.surfaces.openai import SURFACES as OPENAI_SURFACES
from cortex_gateway.surfaces.surface import Surface

from tests.cortex_gateway.fake_neuron import ANTHROPIC_END, ANTHROPIC_EVENTS, OPENAI_END, OPENAI_EVENTS
from tests.cortex_gateway.gateway_client import MODEL

CHAT = "/v1/chat/completions"
MESSAGES = "/v1/messages"
STREAMS = [(CHAT, OPENAI_EVENTS, OPENAI_END), (MESSAGES, ANTHROPIC_EVENTS, ANTHROPIC_END)]


def body(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, **fields}


def records(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == "cortex_gateway.access"]
    return [line for line in lines if line["method"] == "POST"]


async def read_events(response: aiohttp.ClientResponse, num_bytes: int) -> bytes:
    """Exactly what was written so far; hangs (and fails by timeout) if the gateway keeps some of it."""
    async with asyncio.timeout(10):
        return await response.content.readexactly(num_bytes)


def request_state(
    headers: RawHeaders | None = None,
    *,
    surface: Surface = OPENAI_SURFACES[0],
    client: str | None = None,
) -> RequestState:
    """A request of the task that asks for it, whose answer goes nowhere."""

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None: ...

    scope = {
        "path": surface.paths[0],
        "client": None if client is None else (client, 1),
        "headers": headers or [],
    }
    return RequestState(surface, scope, RequestBody(receive, max_bytes=10, timeout_s=1), ClientWriter(send), [])
