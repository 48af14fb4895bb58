"""Loads and evictions through a real gateway: one call each, however many ask."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiohttp import web
from cortex_core.catalogue import Catalogue, ModelProfile

from tests.cortex_gateway.fake_neuron import FakeNeuron
from tests.cortex_gateway.gateway_client import MODEL, Client, Start, until


def catalogue(*profiles: ModelProfile, aliases: dict[str, str] | None = None) -> Catalogue:
    return Catalogue(models=profiles or (ModelProfile(id=MODEL),), aliases=aliases or {})


def status(client: Client, model: str, node: str = "alpha") -> str | None:
    return client.started.gateway.fleet.snapshot.nodes[node].status(model)


async def test_200_first_requests_for_a_cold_model_make_one_load_call(
    neuron: FakeNeuron, second: FakeNeuron, start: Start
) -> None:
    neuron.load_gate.clear()
    second.load_gate.clear()
    client = await start(neuron, second, catalogue=catalogue())
    asking = [asyncio.ensure_future(client.chat()) for _ in range(200)]
    async with asyncio.timeout(30):
        while client.started.gateway.relay.num_active < 200:
            await asyncio.sleep(0.01)
    neuron.load_gate.set()
    second.load_gate.set()
    answers = await asyncio.gather(*asking)
    assert {answered for answered, _ in answers} == {200}
    assert neuron.count("POST /models/load") + second.count("POST /models/load") == 1
    assert len(neuron.requests) + len(second.requests) == 200
    assert await client.metric("cortex_cold_starts_total", model=MODEL, node="alpha") == 200
    assert await client.metric("cortex_model_loads_total", model=MODEL, outcome="loaded") == 1


async def test_two_gateways_get_by_with_one_load_each_and_the_neuron_joins_them(
    neuron: FakeNeuron, start: Start
) -> None:
    neuron.load_gate.clear()
    clients = [await start(neuron, catalogue=catalogue()) for _ in range(2)]
    asking = [asyncio.ensure_future(client.chat()) for client in clients for _ in range(20)]
    async with asyncio.timeout(30):
        while sum(client.started.gateway.relay.num_active for client in clients) < 40:
            await asyncio.sleep(0.01)
    neuron.load_gate.set()
    assert {answered for answered, _ in await asyncio.gather(*asking)} == {200}
    assert neuron.count("POST /models/load") <= 2


async def test_a_load_someone_else_started_is_waited_for(neuron: FakeNeuron, start: Start) -> None:
    neuron.have(MODEL, status="loading", progress={"phase": "weights", "bytes_done": 0, "bytes_total": 9})
    client = await start(neuron)
    asking = asyncio.ensure_future(client.chat())
    neuron.polled.clear()
    await neuron.polled.wait()
    neuron.have(MODEL)
    answered, _ = await asking
    assert answered == 200
    assert neuron.count("POST /models/load") == 0


@pytest.mark.parametrize("name", ["fast", "claude-3-haiku-x", "claude-haiku-4-5"])
async def test_aliases_exact_and_wildcard_reach_the_model_and_the_body_stays_as_it_was(
    neuron: FakeNeuron, start: Start, name: str
) -> None:
    client = await start(neuron, catalogue=catalogue(aliases={"fast": MODEL, "claude-*haiku*": MODEL}))
    async with client.post("/v1/messages", {"model": name, "messages": []}) as response:
        assert response.status == 200
        assert response.headers["x-cortex-model"] == MODEL
        assert response.headers["x-cortex-route"] == "cold"
    _, headers, sent = neuron.requests[0]
    assert headers["x-cortex-resolved-model"] == MODEL
    assert name.encode() in sent and MODEL.encode() not in sent


def sized(*names: str, mb: int = 10_000, **fields: Any) -> tuple[ModelProfile, ...]:
    return tuple(ModelProfile(id=name, vram_mb=mb, **fields) for name in names)


async def ask(client: Client, model: str) -> int:
    answered, _ = await client.chat(model=model)
    return answered


async def test_a_load_that_needs_room_evicts_the_least_recently_used(neuron: FakeNeuron, start: Start) -> None:
    neuron.footprints = {"a": 10_000, "b": 10_000, "c": 10_000}
    client = await start(neuron, catalogue=catalogue(*sized("a", "b", "c")))
    for model in ("a", "b", "a", "c"):
        assert await ask(client, model) == 200
        await client.get("/admin/fleet?refresh=1")
    assert sorted(neuron.models) == ["a", "c"]
    assert neuron.count("POST /models/unload") == 1
    assert await client.metric("cortex_evictions_total", model="b", node="alpha") == 1


async def test_an_evicted_model_comes_back_when_it_is_asked_for(neuron: FakeNeuron, start: Start) -> None:
    """Also one that only the neuron knew of, and whose size only the neuron knows."""
    neuron.enforce_memory = True
    neuron.footprints = {"a": 20_000, "b": 20_000}
    neuron.have("a")
    client = await start(neuron, catalogue=catalogue(*sized("b", mb=20_000)))
    for model in ("b", "a", "b"):
        assert await ask(client, model) == 200
        async with client.get("/admin/fleet?refresh=1"):
            pass
        assert list(neuron.models) == [model]


async def test_a_busy_model_is_not_evicted_but_waited_for(neuron: FakeNeuron, start: Start) -> None:
    neuron.footprints = {"a": 20_000, "b": 20_000}
    neuron.have("a")
    neuron.answer_gate.clear()
    client = await start(neuron, catalogue=catalogue(*sized("a", "b", mb=20_000)))
    busy = asyncio.ensure_future(ask(client, "a"))
    await neuron.request_arrived.wait()
    waiting = asyncio.ensure_future(ask(client, "b"))
    neuron.polled.clear()
    await neuron.polled.wait()  # the gateway watches the node for a change: it has decided to wait
    assert neuron.count("POST /models/unload") == 0 and "a" in neuron.models
    neuron.answer_gate.set()
    assert await busy == 200
    assert await waiting == 200
    assert list(neuron.models) == ["b"]


async def test_a_pinned_model_stays_and_the_neurons_refusal_is_a_503(neuron: FakeNeuron, start: Start) -> None:
    neuron.enforce_memory = True
    neuron.footprints = {"a": 20_000, "b": 20_000}
    neuron.have("a")
    profiles = (*sized("a", mb=20_000, pinned_on=("alpha",)), *sized("b", mb=20_000))
    client = await start(neuron, catalogue=catalogue(*profiles))
    answered, document = await client.chat(model="b")
    assert (answered, document["error"]["code"]) == (503, "insufficient_vram")
    assert list(neuron.models) == ["a"]


async def test_a_refusal_for_lack_of_memory_is_answered_by_evicting(neuron: FakeNeuron, start: Start) -> None:
    """The catalogue has no sizes: only the neuron knows that there is no room."""
    neuron.enforce_memory = True
    neuron.footprints = {"a": 10_000, "b": 10_000, "c": 20_000}
    client = await start(neuron, catalogue=catalogue(*(ModelProfile(id=name) for name in "abc")))
    for model in ("a", "b", "c"):
        assert await ask(client, model) == 200
    assert list(neuron.models) == ["c"]


async def test_a_victim_that_turns_out_to_be_busy_makes_the_request_wait_not_fail(
    neuron: FakeNeuron, start: Start
) -> None:
    """The neuron works for another gateway, and its last poll did not show it."""
    neuron.footprints = {"a": 20_000, "b": 20_000}
    neuron.have("a")
    client = await start(neuron, catalogue=catalogue(*sized("a", "b", mb=20_000)))
    neuron.unload_error = (404, {"error": "cannot unload: inference still in flight"})
    waiting = asyncio.ensure_future(ask(client, "b"))
    async with asyncio.timeout(10):
        while neuron.count("POST /models/unload") < 2:
            await asyncio.sleep(0.01)
    neuron.unload_error = None
    assert await waiting == 200
    assert list(neuron.models) == ["b"]


async def test_F20_already_loaded_counts_as_success(neuron: FakeNeuron, start: Start) -> None:
    client = await start(neuron, catalogue=catalogue())
    neuron.load_error = (400, {"error": f"model '{MODEL}' already loaded"})
    neuron.have(MODEL)
    assert await ask(client, MODEL) == 200


async def test_a_field_that_an_older_neuron_would_ignore_goes_only_to_one_that_reads_it(
    neuron: FakeNeuron, second: FakeNeuron, start: Start
) -> None:
    second.features = ["triton", "load.dtype"]
    client = await start(neuron, second, catalogue=catalogue(ModelProfile(id=MODEL, dtype="float32")))
    assert await ask(client, MODEL) == 200
    assert not neuron.load_bodies and [body["dtype"] for body in second.load_bodies] == ["float32"]


@pytest.mark.parametrize(("by_hand", "refused"), [(False, 503), (True, 422)])
async def test_where_all_neurons_are_older_the_field_is_refused_by_name(
    neuron: FakeNeuron, start: Start, by_hand: bool, refused: int
) -> None:
    client = await start(neuron, catalogue=catalogue(ModelProfile(id=MODEL, dtype="float32")))
    if by_hand:
        async with client.post("/admin/models/load", {"model": MODEL, "node": "alpha"}) as response:
            status, document = response.status, await response.json()
    else:
        status, document = await client.chat()
    assert (status, document["error"]["code"]) == (refused, "unsupported_load_field")
    assert "alpha" in document["error"]["message"] and "`dtype`" in document["error"]["message"]
    assert not neuron.load_bodies
    neuron.features = ["load.dtype"]  # upgraded: another process, which is asked what it is
    neuron.health_extra = {"uptime_secs": 0, "instance": "another"}
    async with client.get("/admin/fleet?refresh=1") as response:
        assert response.status == 200
    if by_hand:  # what failed by hand is remembered, for a while
        async with client.post("/admin/models/load", {"model": MODEL, "node": "alpha"}) as response:
            assert response.status == 200
    else:
        assert (await client.chat())[0] == 200
    assert [body["dtype"] for body in neuron.load_bodies] == ["float32"]


async def test_all_who_wait_for_a_load_that_fails_are_told_why_and_it_is_not_repeated(
    neuron: FakeNeuron, start: Start
) -> None:
    neuron.load_gate.clear()
    neuron.load_error = (503, {"error": "driver mismatch", "code": "cuda_unavailable"})
    client = await start(neuron, catalogue=catalogue())
    asking = [asyncio.ensure_future(client.chat()) for _ in range(20)]
    async with asyncio.timeout(10):
        while client.started.gateway.relay.num_active < 20:
            await asyncio.sleep(0.01)
    neuron.load_gate.set()
    for answered, document in await asyncio.gather(*asking):
        assert (answered, document["error"]["code"]) == (503, "cuda_unavailable")
        assert "driver mismatch" in document["error"]["message"]
    assert neuron.count("POST /models/load") == 1
    assert await client.metric("cortex_model_loads_total", model=MODEL, outcome="failed") == 1


async def test_a_request_for_a_model_that_is_being_unloaded_waits_and_loads_it_again(
    neuron: FakeNeuron, start: Start
) -> None:
    neuron.have(MODEL)
    unloading, proceed = asyncio.Event(), asyncio.Event()
    client = await start(neuron, catalogue=catalogue())
    original = client.started.gateway.placement.loads._neurons["alpha"].unload

    async def slow_unload(model: str, timeout_s: float) -> None:
        unloading.set()
        await proceed.wait()
        await original(model, timeout_s)

    client.started.gateway.placement.loads._neurons["alpha"].unload = slow_unload  # type: ignore[method-assign]
    removing = asyncio.ensure_future(client.post("/admin/models/unload", {"model": MODEL}).__aenter__())
    await unloading.wait()
    asking = asyncio.ensure_future(ask(client, MODEL))
    async with asyncio.timeout(10):
        while not client.started.gateway.relay.num_active:
            await asyncio.sleep(0)
    proceed.set()
    assert (await removing).status == 200
    assert await asking == 200
    assert (neuron.count("POST /models/load"), len(neuron.requests)) == (1, 1)


async def test_the_neurons_own_name_for_a_model_is_used_towards_it(neuron: FakeNeuron, start: Start) -> None:
    client = await start(neuron, catalogue=catalogue(ModelProfile(id=MODEL, source="hf2")))
    assert await ask(client, MODEL) == 200
    assert neuron.load_bodies[0]["model_id"] == f"hf2:{MODEL}"
    assert await ask(client, MODEL) == 200
    assert neuron.requests[-1][1]["x-cortex-resolved-model"] == f"hf2:{MODEL}"
    assert neuron.count("POST /models/load") == 1


async def test_an_answer_that_is_not_from_a_neuron_does_not_break_a_load(neuron: FakeNeuron, start: Start) -> None:
    client = await start(neuron, catalogue=catalogue())
    neuron.load_error = (500, {})

    async def nonsense(request: web.Request) -> web.StreamResponse:
        return web.Response(text="<html>")

    neuron.answer = nonsense
    answered, document = await client.chat()
    assert (answered, document["error"]["code"]) == (503, "model_load_failed")
    await until(lambda: status(client, MODEL) is None, client)
