"""What gateways need to keep or displace a model: how it was loaded, how long it has been idle, who pinned it."""

from __future__ import annotations

import asyncio
import json

import msgspec
import pytest
from cortex_core.fleet import HealthResponse, ModelInfo

from tests.neuron.daemon.api.harness import RunningNeuron
from tests.neuron.scripted_engine import eventually
from tests.neuron.scripted_worker import HOLD

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def info_of(neuron: RunningNeuron) -> ModelInfo:
    (info,) = msgspec.convert(await neuron.get("/models"), list[ModelInfo])
    return info


async def idle_s(neuron: RunningNeuron) -> float | None:
    (load,) = msgspec.convert(await neuron.get("/health"), HealthResponse).models
    return load.idle_s


async def test_G4_a_model_says_how_it_was_loaded_and_loading_that_again_is_the_same_model(
    neuron: RunningNeuron,
) -> None:
    spec = (await info_of(neuron)).spec
    assert spec is not None
    status, _, body = await neuron.post("/models/load", msgspec.to_builtins(spec))
    assert (status, json.loads(body)) == (200, {"status": "loaded"})
    assert len(await neuron.get("/models")) == 1


async def test_a_model_is_not_idle_while_a_request_is_here_and_counts_anew_after_it(neuron: RunningNeuron) -> None:
    before = await idle_s(neuron)
    assert before is not None
    asking = asyncio.create_task(neuron.post("/v1/chat/completions", neuron.chat(top_k=HOLD, max_tokens=50)))
    await eventually(lambda: neuron.served.admission.in_flight == 1)
    assert await idle_s(neuron) is None
    asking.cancel()
    await eventually(lambda: neuron.served.admission.in_flight == 0)
    first = await idle_s(neuron)
    assert first is not None
    second = await idle_s(neuron)
    assert second is not None and second >= first


async def test_a_pin_is_kept_where_the_model_is(neuron: RunningNeuron) -> None:
    assert not (await info_of(neuron)).pinned
    for pinned in (True, False):
        status, _, body = await neuron.post("/models/pin", {"model_id": neuron.model, "pinned": pinned})
        assert (status, json.loads(body)) == (200, {"model_id": neuron.model, "pinned": pinned})
        assert (await info_of(neuron)).pinned is pinned
    status, _, body = await neuron.post("/models/pin", {"model_id": "org/absent"})
    assert (status, json.loads(body)["error"]["code"]) == (404, "model_not_found")
