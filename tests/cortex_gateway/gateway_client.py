"""A client of a running gateway, as the tests use it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
from cortex_gateway.server import RunningGateway

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


async def until(condition: Callable[[], Any], client: Client) -> None:
    """Wait, change by change of the fleet, until `condition` holds."""
    async with asyncio.timeout(10):
        while not condition():
            await client.started.gateway.fleet.changed()
