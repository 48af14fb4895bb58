"""The fleet's routes, over a real socket and scripted engines."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from pathlib import Path
from urllib.parse import quote

import msgspec
import pytest
from cortex_core.fleet import LOAD_FEATURES, BuildInfo, DiscoveryResponse, HealthResponse
from neuron.daemon.common.config import (
    AdmissionConfig,
    EngineSection,
    EngineTables,
    HarnessConfig,
    HarnessEntry,
    NeuronConfig,
)
from neuron.daemon.supervisor import engine_group

from tests.neuron.daemon.api.harness import RunningNeuron, models_of, run_neuron
from tests.neuron.scripted_engine import eventually, scripted_with
from tests.neuron.scripted_worker import STUCK

pytestmark = pytest.mark.asyncio(loop_scope="module")


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
