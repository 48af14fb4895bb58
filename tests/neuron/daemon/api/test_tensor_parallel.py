"""The daemon with a model that two processes share: loaded, asked and unloaded over HTTP."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from neuron.daemon.common.config import EngineSection, NeuronConfig
from neuron.daemon.hub.sources import DEMO_MODEL, demo_model_path
from neuron.daemon.supervisor.process_group import worker_command

from tests.neuron.daemon.api.harness import RunningNeuron, run_neuron

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        not (demo_model_path() / "model.safetensors").exists(), reason="this checkout has no trained weights"
    ),
]

QUESTIONS = ("What is 12+30?", "Count from 1 to 12.")


async def post(neuron: RunningNeuron, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    async with neuron.client.post(neuron.url + path, json=body, timeout=aiohttp.ClientTimeout(300)) as response:
        return response.status, json.loads(await response.read())


async def answers(neuron: RunningNeuron) -> list[str]:
    texts = []
    for question in QUESTIONS:
        request = neuron.chat(question, temperature=0, max_tokens=60, model=DEMO_MODEL)
        status, body = await post(neuron, "/v1/chat/completions", request)
        assert status == 200, body
        texts.append(str(body["choices"][0]["message"]["content"]))
    return texts


async def load(neuron: RunningNeuron, **fields: Any) -> int:
    """Load the demo model; the number of its processes."""
    status, body = await post(neuron, "/models/load", {"model_id": DEMO_MODEL, **fields})
    assert status == 200, body
    model = neuron.daemon.services.manager.get(DEMO_MODEL)
    assert model.group is not None
    return len(model.group.pids)


async def unload(neuron: RunningNeuron) -> None:
    status, body = await post(neuron, "/models/unload", {"model_id": DEMO_MODEL})
    assert status == 200, body


@pytest.mark.full
async def test_two_processes_answer_as_one_does(tmp_path: Path) -> None:
    engine = EngineSection(num_threads=2, kv_cache_tokens=8192)
    config = NeuronConfig(engine=engine, state_dir="")
    async with run_neuron(tmp_path, config=config, load=False, command=worker_command) as neuron:
        assert await load(neuron) == 1
        expected = await answers(neuron)
        assert "42" in expected[0]
        await unload(neuron)
        assert await load(neuron, tensor_parallel=2) == 2
        assert await answers(neuron) == expected
        await unload(neuron)

        assert await load(neuron, tensor_parallel=2, tensor_split=[3, 2]) == 2
        assert await answers(neuron) == expected
        await unload(neuron)

        status, body = await post(neuron, "/models/load", {"model_id": DEMO_MODEL, "tensor_parallel": 3})
        assert status == 422 and body["error"]["code"] == "unsupported_parallelism", body


@pytest.mark.full
async def test_deterministic_answers_of_two_processes_do_not_depend_on_the_company(tmp_path: Path) -> None:
    """The same of one load; the other loads of this neuron go on as they were."""
    engine = EngineSection(num_threads=2, kv_cache_tokens=8192)
    config = NeuronConfig(engine=engine, state_dir="")
    async with run_neuron(tmp_path, config=config, load=False, command=worker_command) as neuron:
        assert await load(neuron, tensor_parallel=2, deterministic=True) == 2
        model = neuron.daemon.services.manager.get(DEMO_MODEL)
        assert model.group is not None
        assert model.group.config.deterministic
        alone = await answers(neuron)
        together = await asyncio.gather(*(answers(neuron) for _ in range(3)))
        assert together == [alone] * 3
