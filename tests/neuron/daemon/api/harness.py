"""A whole daemon on a real socket, in this process, with engines that are scripted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from cortex_core.fleet import ModelSpec
from neuron.daemon.common.config import EngineSection, NeuronConfig, ServerSection
from neuron.daemon.lifecycle.served_model import ServedModel
from neuron.daemon.server import Daemon
from neuron.daemon.supervisor.process_group import WorkerCommand

from tests.neuron.checkpoint_folders import write_checkpoint
from tests.neuron.scripted_engine import scripted_command


def make_checkpoint(folder: Path) -> Path:
    """A folder that passes every check; its weights are never read."""
    return write_checkpoint(folder)


class RunningNeuron:
    """A daemon that serves, and a client of it. `model` is loaded."""

    def __init__(self, daemon: Daemon, url: str, model: str, client: aiohttp.ClientSession) -> None:
        self.daemon = daemon
        self.url = url
        self.model = model
        self.client = client

    @property
    def served(self) -> ServedModel:
        model = self.daemon.services.manager.find(self.model)
        assert model is not None
        return model

    async def post(
        self, path: str, body: Any, headers: dict[str, str] | None = None
    ) -> tuple[int, aiohttp.typedefs.LooseHeaders, bytes]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self.client.post(self.url + path, data=data, headers=headers) as response:
            return response.status, response.headers, await response.read()

    async def get(self, path: str) -> Any:
        async with self.client.get(self.url + path) as response:
            assert response.status == 200, await response.text()
            return json.loads(await response.read())

    def chat(self, text: str = "hi", **settings: Any) -> dict[str, Any]:
        return {
            "model": self.model,
            "max_tokens": 3,
            "messages": [{"role": "user", "content": text}],
            **settings,
        }


@asynccontextmanager
async def run_neuron(
    folder: Path,
    *,
    config: NeuronConfig | None = None,
    load: bool = True,
    command: WorkerCommand = scripted_command,
    **server: Any,
) -> AsyncIterator[RunningNeuron]:
    # Tests kill engines at leisure: no death counts as one of a series.
    config = config or NeuronConfig(engine=EngineSection(stable_after_s=0, stop_grace_s=2.0))
    config = msgspec.structs.replace(config, host="127.0.0.1", port=0)
    if server:
        config = msgspec.structs.replace(config, server=ServerSection(**server))
    daemon = Daemon(config, command=command)
    url = daemon.bind()
    serving = asyncio.create_task(daemon.serve())
    model = f"file:{folder}"
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(60)) as client:
        try:
            if load:
                await daemon.services.manager.load(ModelSpec(model))
            yield RunningNeuron(daemon, url, model, client)
        finally:
            daemon.request_stop()
            daemon.request_stop()
            await serving
