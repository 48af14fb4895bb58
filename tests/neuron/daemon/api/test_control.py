"""The fleet's routes, over a real socket and scripted engines."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
import pytest
from cortex_core.fleet import LOAD_FEATURES, BuildInfo, DiscoveryResponse, HealthResponse, ModelInfo, ModelSpec
from neuron.daemon.common.config import (
    AdmissionConfig,
    EngineSection,
    EngineTables,
    HarnessConfig,
    HarnessEntry,
    NeuronConfig,
)
from neuron.daemon.supervisor import engine_group

from tests.neuron.daemon.api.harness import RunningNeuron, run_neuron
from tests.neuron.scripted_engine import eventually, scripted_with
from tests.neuron.scripted_worker import HOLD, STUCK

pytestmark = pytest.mark.asyncio(loop_scope="module")


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


async def models_of(neuron: RunningNeuron) -> list[ModelInfo]:
    return msgspec.convert(await neuron.get("/models"), list[ModelInfo])


async def test_G20_what_the_host_is_and_what_runs_there(neuron: RunningNeuron) -> None:
    found = msgspec.convert(await neuron.get("/discovery"), DiscoveryResponse)
    assert found.harnesses == ("candle",) and found.cpu_count >= 1 and found.memory_total_mb > 0
    build = msgspec.convert(await neuron.get("/version"), BuildInfo)
    assert build.package_version == "0.1.0" and build.torch_version
    assert set(build.features) >= LOAD_FEATURES


async def test_how_the_host_is(neuron: RunningNeuron) -> None:
    health = msgspec.convert(await neuron.get("/health"), HealthResponse)
    assert health.activation.state == "ready" and not health.draining
    (load,) = health.models
    assert load.id == neuron.model and load.in_flight == 0 and load.max_in_flight == 128
    assert load.kv_available_mb == load.kv_budget_mb > 0


async def test_a_loaded_model_says_what_it_can(neuron: RunningNeuron) -> None:
    (entry,) = await neuron.get("/models")
    assert (entry["id"], entry["status"], entry["harness"]) == (neuron.model, "loaded", "candle")
    assert entry["devices"] == [] and entry["capabilities"] == ["text"]
    assert entry["limit"]["context"] == 4096 and entry["tool_call"] and entry["reasoning"]
    assert entry["servable"] == {"ok": True}
    path = quote(neuron.model, safe="")
    port = neuron.daemon.services.port
    assert await neuron.get(f"/models/{path}/endpoint") == {"url": f"http://localhost:{port}"}
    assert await neuron.get(f"/models/{path}/capabilities") == {"capabilities": ["text"]}


async def test_both_dialects_list_it(neuron: RunningNeuron) -> None:
    listed = await neuron.get("/v1/models?limit=1000")
    (entry,) = listed["data"]
    assert entry["id"] == neuron.model == listed["first_id"] and entry["type"] == entry["object"] == "model"
    assert entry["max_model_len"] == 4096 and entry["loaded"]
    for path in (f"/v1/models/{quote(neuron.model, safe='')}", f"/v1/models/{neuron.model}"):
        assert (await neuron.get(path))["id"] == neuron.model


async def test_every_metric_family_is_emitted(neuron: RunningNeuron) -> None:
    await neuron.post("/v1/chat/completions", neuron.chat(max_tokens=5))
    async with neuron.client.get(neuron.url + "/metrics") as response:
        assert response.headers["content-type"].startswith("text/plain")
        text = await response.text()
    described = set(re.findall(r"^# TYPE (\S+) (?:counter|gauge|histogram)", text, re.MULTILINE))
    described = {name for name in described if not name.endswith("_created")}
    sampled = set(re.findall(r"^(\w+?)(?:_bucket|_count|_sum)?[{ ]", text, re.MULTILINE))
    no_device_here = {name for name in described if name.startswith("neuron_device_")}
    assert described - no_device_here <= sampled
    assert f'neuron_requests_total{{model="{neuron.model}",outcome="ok",route="chat_completion"}}' in text
    assert "neuron_time_to_first_token_seconds_bucket" in text and "neuron_model_load_seconds_bucket" in text
    assert f'neuron_weights_read_bytes_per_second{{model="{neuron.model}"}} 2000.0' in text
    assert 'model=""' not in text


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


async def test_F11_a_killed_engine_is_visible_while_it_recovers(checkpoint: Path, gate: Path) -> None:
    async with run_neuron(checkpoint, load=False, command=scripted_with("--gate", str(gate))) as neuron:
        loading = asyncio.create_task(neuron.post("/models/load", {"model_id": neuron.model}))
        await asyncio.to_thread(gate.write_text, "go")
        assert (await loading)[0] == 200
        os.kill(neuron.served.group.pids[0], signal.SIGKILL)
        await eventually(lambda: neuron.served.state.phase == "recovering")
        (model,) = await models_of(neuron)
        assert model.status == "recovering" and model.error
        asking = asyncio.create_task(neuron.post("/v1/chat/completions", neuron.chat()))
        await eventually(lambda: neuron.served.group.num_live == 1)
        status, _, body = await neuron.post("/v1/messages/count_tokens", neuron.chat())
        assert status == 200, body  # counting needs no engine
        await asyncio.to_thread(gate.write_text, "go")
        assert (await asking)[0] == 200, "a request waits for the engine"
        await eventually(lambda: neuron.served.state.phase == "loaded")
        (model,) = await models_of(neuron)
        assert model.status == "loaded" and model.error is None


async def test_an_engine_that_seems_stuck_is_not_called_healthy(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_group, "_STACKS_S", 3600.0)  # it stays under suspicion for as long as we look
    config = NeuronConfig(debug_levers=True, engine=EngineSection(stop_grace_s=0.1))
    async with run_neuron(checkpoint, config=config, load=False) as neuron:
        load = {"model_id": neuron.model, "debug": {"step_deadline_s": 0.2}}
        assert (await neuron.post("/models/load", load))[0] == 200
        (load,) = (await neuron.get("/health"))["models"]
        assert (load["status"], load["error"]) == ("loaded", None)
        asking = asyncio.create_task(neuron.post("/v1/chat/completions", neuron.chat(top_k=STUCK)))
        await eventually(lambda: neuron.served.group.stalled is not None)
        (load,) = (await neuron.get("/health"))["models"]
        assert load["status"] == "stalled" and "no step was completed" in load["error"]
        (model,) = await models_of(neuron)
        assert model.servable is not None and not model.servable.ok and model.servable.reason == "engine_stalled"
        asking.cancel()


async def test_levers_are_refused_unless_the_neuron_was_started_for_them(neuron: RunningNeuron) -> None:
    before = await neuron.get("/models")
    body = {"model_id": "cortex/demo", "debug": {"levers": [{"lever": "kill", "step": 1}]}}
    status, _, answer = await neuron.post("/models/load", body)
    assert status == 403 and json.loads(answer)["error"]["code"] == "debug_levers_off"
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


async def test_without_a_harness_nothing_is_served(checkpoint: Path) -> None:
    config = NeuronConfig(harnesses=(HarnessEntry("other"),), engine=EngineSection())
    async with run_neuron(checkpoint, config=config, load=False) as neuron:
        assert (await neuron.get("/discovery"))["harnesses"] == []
        for path, body in (("/v1/chat/completions", neuron.chat()), ("/models/load", {"model_id": neuron.model})):
            status, _, answer = await neuron.post(path, body)
            assert status == 503 and json.loads(answer)["error"]["code"] == "no_engine"


async def test_limits_come_from_the_configuration(checkpoint: Path) -> None:
    limits = AdmissionConfig(max_in_flight=3, max_queue_depth=5)
    config = NeuronConfig(harness=HarnessConfig(candle=EngineTables(admission=limits)))
    async with run_neuron(checkpoint, config=config) as neuron:
        (load,) = (await neuron.get("/health"))["models"]
        assert (load["max_in_flight"], load["max_queue_depth"]) == (3, 5)
