"""Loads and unloads of a whole daemon: each once, whoever asks, and visible whatever becomes of it."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from cortex_core.fleet import HealthResponse, ModelSpec
from neuron.daemon.common.config import NeuronConfig

from tests.neuron.daemon.api.harness import RunningNeuron, make_checkpoint, models_of, run_neuron
from tests.neuron.scripted_engine import eventually, scripted_with
from tests.neuron.scripted_worker import HOLD

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "checkpoint")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def neuron(checkpoint: Path) -> AsyncIterator[RunningNeuron]:
    async with run_neuron(checkpoint) as running:
        yield running


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    fifo = tmp_path / "gate"
    os.mkfifo(fifo)
    return fifo


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_F20_however_many_ask_one_engine_loads(checkpoint: Path, gate: Path) -> None:
    async with run_neuron(checkpoint, load=False, command=scripted_with("--gate", str(gate))) as neuron:
        loads = [asyncio.create_task(neuron.post("/models/load", {"model_id": neuron.model})) for _ in range(8)]
        await eventually(
            lambda: len(neuron.served.load_waiters) == 8 if neuron.daemon.services.manager.all() else False
        )
        await eventually(lambda: neuron.served.state.progress.phase == "weights")
        (loading,) = await models_of(neuron)
        assert loading.status == "loading" and loading.progress.bytes_done == 10
        await asyncio.to_thread(gate.write_text, "go")
        answers = await asyncio.gather(*loads)
        assert all((status, json.loads(body)) == (200, {"status": "loaded"}) for status, _, body in answers)
        assert neuron.served.group.num_restarts == 0 and len(neuron.served.group.pids) == 1
        status, _, body = await neuron.post("/models/load", {"model_id": neuron.model, "harness": "candle"})
        assert (status, json.loads(body)) == (200, {"status": "loaded"})


async def test_a_load_outlives_the_client_that_asked(checkpoint: Path, gate: Path) -> None:
    async with run_neuron(checkpoint, load=False, command=scripted_with("--gate", str(gate))) as neuron:
        asking = asyncio.create_task(neuron.post("/models/load", {"model_id": neuron.model}))
        await eventually(lambda: bool(neuron.daemon.services.manager.all()))
        await eventually(lambda: neuron.served.state.phase == "loading")
        asking.cancel()
        status, headers, body = await neuron.post("/v1/chat/completions", neuron.chat())
        assert status == 503 and json.loads(body)["error"]["code"] == "model_loading" and headers["retry-after"]
        await asyncio.to_thread(gate.write_text, "go")
        await eventually(lambda: neuron.served.state.phase == "loaded")


async def test_F14_unloading_leaves_nothing(checkpoint: Path) -> None:
    async with run_neuron(checkpoint) as neuron:
        (pid,) = neuron.served.group.pids
        status, _, body = await neuron.post("/models/unload", {"model_id": neuron.model})
        assert (status, json.loads(body)) == (200, {"status": "unloaded"})
        assert await neuron.get("/models") == [] and not is_alive(pid)
        assert (await neuron.post("/models/unload", {"model_id": neuron.model}))[0] == 404
        assert (await neuron.post("/v1/chat/completions", neuron.chat()))[0] == 404
        assert (await neuron.post("/models/load", {"model_id": neuron.model}))[0] == 200
        assert (await neuron.post("/v1/chat/completions", neuron.chat()))[0] == 200


async def test_an_unload_does_not_cut_requests(checkpoint: Path) -> None:
    async with run_neuron(checkpoint, unload_wait_s=0.1) as neuron:
        asking = asyncio.create_task(neuron.post("/v1/chat/completions", neuron.chat(top_k=HOLD, max_tokens=50)))
        await eventually(lambda: neuron.served.admission.in_flight == 1)
        status, headers, body = await neuron.post("/models/unload", {"model_id": neuron.model})
        assert status == 409 and "still in flight" in json.loads(body)["error"]["message"] and headers["retry-after"]
        assert (await neuron.post("/v1/chat/completions", neuron.chat()))[0] == 200
        asking.cancel()
        await eventually(lambda: neuron.served.admission.in_flight == 0)
        assert (await neuron.post("/models/unload", {"model_id": neuron.model}))[0] == 200


async def test_unloading_calls_a_load_off(checkpoint: Path, gate: Path) -> None:
    async with run_neuron(checkpoint, load=False, command=scripted_with("--gate", str(gate))) as neuron:
        loading = asyncio.create_task(neuron.post("/models/load", {"model_id": neuron.model}))
        await eventually(lambda: bool(neuron.daemon.services.manager.all()))
        await eventually(lambda: neuron.served.group is not None and bool(neuron.served.group.pids))
        (pid,) = neuron.served.group.pids
        assert (await neuron.post("/models/unload", {"model_id": neuron.model}))[0] == 200
        status, _, body = await loading
        assert status == 409 and json.loads(body)["error"]["code"] == "load_cancelled"
        assert not is_alive(pid) and await neuron.get("/models") == []


@pytest.mark.parametrize(("load", "status", "code"), [("fail", 422, "bad_checkpoint"), ("die", 500, "load_failed")])
async def test_a_load_that_fails_stays_visible_with_its_reason(
    checkpoint: Path, load: str, status: int, code: str
) -> None:
    async with run_neuron(checkpoint, load=False, command=scripted_with("--load", load)) as neuron:
        got, _, body = await neuron.post("/models/load", {"model_id": neuron.model})
        assert (got, json.loads(body)["error"]["code"]) == (status, code)
        (model,) = await models_of(neuron)
        assert model.status == "failed" and model.error and model.servable is None
        got, _, body = await neuron.post("/v1/chat/completions", neuron.chat())
        assert got == 503 and json.loads(body)["error"]["code"] == "model_failed"
        assert (await neuron.post("/models/unload", {"model_id": neuron.model}))[0] == 200
        assert await neuron.get("/models") == []


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"model_id": "file:/nowhere"}, 422, "repo_fetch_failed"),
        ({"model_id": "no-slash"}, 400, "invalid_value"),
        ({"model_id": "nowhere:a/b"}, 400, "invalid_value"),
        ({"model_id": "a/b", "harness": "other"}, 400, "invalid_value"),
        ({"model_id": "cortex/demo", "devices": [7]}, 422, "device_not_found"),
        ({"model_id": "cortex/demo", "quant": "q4"}, 422, "quant_unsupported"),
        ({"model_id": "cortex/demo", "tensor_parallel": 2, "tensor_split": [3]}, 422, "tensor_split_invalid"),
    ],
)
async def test_a_load_that_cannot_be_is_refused_and_leaves_no_trace(
    neuron: RunningNeuron, body: dict[str, Any], status: int, code: str
) -> None:
    before = await neuron.get("/models")
    got, _, answer = await neuron.post("/models/load", body)
    error = json.loads(answer)["error"]
    assert (got, error["code"]) == (status, code)
    assert status != 422 or error["kind"] == code
    assert await neuron.get("/models") == before


async def test_F34_default_models_are_loaded_once_the_daemon_listens(checkpoint: Path, gate: Path) -> None:
    broken = ModelSpec("file:/nowhere")
    config = NeuronConfig(default_models=(broken, ModelSpec(f"file:{checkpoint}")))
    command = scripted_with("--gate", str(gate))
    async with run_neuron(checkpoint, config=config, load=False, command=command) as neuron:
        await eventually(lambda: neuron.daemon.services.activator.status.in_progress == neuron.model)
        health = msgspec.convert(await neuron.get("/health"), HealthResponse)
        assert health.activation.state == "pre_warming"
        assert [failure.model_id for failure in health.activation.failed] == ["file:/nowhere"]
        await asyncio.to_thread(gate.write_text, "go")
        await eventually(lambda: neuron.daemon.services.activator.status.state == "ready")
        assert neuron.daemon.services.activator.status.completed == (neuron.model,)
