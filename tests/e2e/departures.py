"""Clients that hang up in every phase of a request, through a gateway and a real neuron, and what is left of them."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Self

import aiohttp

from tests.e2e.fleet_of_neurons import Daemon, FleetOfNeurons
from tests.e2e.fleet_process import MODEL

NEURON = """
[harness.candle.admission]
max_in_flight = 1
"""
QUICK = "stream_hold_s = 0.05\nping_interval_s = 0.05"
TRANSLATING = f"""
[gateway]
listen = "127.0.0.1:0"
metrics_listen = "127.0.0.1:0"
{QUICK}
[[neurons]]
name = "n0"
endpoint = "{{url}}"
kind = "openai"
"""
LONG_PROMPT = "the quick brown fox jumps over the lazy dog " * 1_500
PHASES = ("queued", "prefill", "streaming", "whole")
WAYS = ("native", "translated")


class Departures:
    """One neuron with one seat behind two gateways: one knows it as a neuron, one as a server that speaks only chat."""

    def __init__(self, folder: Path) -> None:
        self.fleet = FleetOfNeurons(folder, num_neurons=1, neuron=NEURON, gateway=QUICK)
        self.neuron_url = self.fleet.neurons[0].url
        config = folder / "translating.toml"
        config.write_text(TRANSLATING.format(url=self.neuron_url))
        translating = Daemon("translated", ["cortex_cli", "serve", "--config", str(config)])
        self.gateways = {"native": self.fleet.gateway, "translated": translating}
        self._session: aiohttp.ClientSession

    def stop(self) -> None:
        self.gateways["translated"].stop()
        self.fleet.stop()

    async def __aenter__(self) -> Self:
        timeout = aiohttp.ClientTimeout(total=300)
        self._session = aiohttp.ClientSession(
            timeout=timeout, connector=aiohttp.TCPConnector(limit=0, force_close=True)
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    # ------------------------------------------------------------------------------------------ what is under way

    async def get(self, url: str) -> Any:
        async with self._session.get(url) as response:
            text = await response.text()
            assert response.status == 200, text
            return json.loads(text) if text.startswith(("{", "[")) else text

    async def load(self) -> dict[str, int]:
        """What the neuron has at work and in its queue."""
        loads = {load["id"]: load for load in (await self.get(self.neuron_url + "/health"))["models"]}
        return loads.get(MODEL, {"in_flight": 0, "queue_depth": 0})

    async def has(self, in_flight: int, queue_depth: int = 0) -> bool:
        load = await self.load()
        return (load["in_flight"], load["queue_depth"]) == (in_flight, queue_depth)

    async def held(self) -> dict[str, float]:
        """Whatever gateways and neuron count as taken by requests, by name; nothing but zeros where nobody asks."""
        found: dict[str, float] = {}
        load = await self.load()
        found |= {"neuron in flight": load["in_flight"], "neuron queue": load["queue_depth"]}
        samples = dict(
            re.findall(r"^(neuron_\w+){[^}]*} ([\d.e+]+)$", await self.get(self.neuron_url + "/metrics"), re.M)
        )
        for name in ("requests_in_flight", "queue_depth", "engine_running", "engine_waiting", "kv_reserved_pages"):
            found[name] = float(samples.get(f"neuron_{name}", 0))
        pages = [float(samples.get(f"neuron_kv_{kind}pages", 0)) for kind in ("", "free_")]
        found["pages in use"] = pages[0] - pages[1]
        for way, gateway in self.gateways.items():
            fleet = await self.get(gateway.url + "/admin/fleet")
            found[f"{way} in flight"] = fleet["in_flight"]
            found[f"{way} waiting"] = len(fleet["waiting"])
            found[f"{way} leaving"] = len(fleet["leaving"])
        return found

    async def until(self, condition: Callable[[], Awaitable[bool]]) -> None:
        """State of other processes has no event to wait on."""
        async with asyncio.timeout(120):
            while not await condition():
                await asyncio.sleep(0.005)

    async def is_idle(self) -> bool:
        return not any((await self.held()).values())

    # ------------------------------------------------------------------------------------------ who asks, and goes

    async def ask(
        self, way: str, *, stream: bool = True, text: str = "Count from 1 to 60.", begun: asyncio.Event | None = None
    ) -> bytes:
        """A very long answer through that gateway: chat, or a response, which is translated into chat. begun is set at
        its first text."""
        request: dict[str, Any] = {"model": MODEL, "stream": stream, "ignore_eos": True}
        if way == "native":
            path, mark = "/v1/chat/completions", rb'"content":"[^"]'
            request |= {"messages": [{"role": "user", "content": text}], "max_tokens": 20_000}
        else:
            path, mark = "/v1/responses", rb'"response.output_text.delta"'
            request |= {"input": text, "max_output_tokens": 20_000}
        data = b""
        async with self._session.post(self.gateways[way].url + path, json=request) as response:
            async for chunk in response.content.iter_any():
                data += chunk
                if begun is not None and re.search(mark, data):
                    begun.set()
        return data

    async def leave(self, way: str, phase: str) -> float:
        """Hang up in that phase. Seconds until the neuron has nothing more of the request."""
        begun, occupying = asyncio.Event(), None
        if phase == "queued":
            occupying = asyncio.create_task(self.ask("native"))
            await self.until(lambda: self.has(1))
        settings: dict[str, Any] = {"text": LONG_PROMPT} if phase == "prefill" else {}
        asking = asyncio.create_task(self.ask(way, stream=phase != "whole", begun=begun, **settings))
        if phase == "queued":
            await self.until(lambda: self.has(1, 1))
        elif phase == "streaming":
            await begun.wait()
        else:
            await self.until(lambda: self.has(1))
        assert (await self.held())[f"{way} in flight"], "what is looked at shows that somebody asks"
        assert not asking.done(), asking.result()
        assert begun.is_set() == (phase == "streaming")
        asking.cancel()
        left = time.perf_counter()
        await self.until(lambda: self.has(0 if occupying is None else 1))
        seconds = time.perf_counter() - left
        if occupying is not None:
            assert not occupying.done(), "who was served before goes on"
            occupying.cancel()
        return seconds
