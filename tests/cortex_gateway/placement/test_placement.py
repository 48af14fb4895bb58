"""Placement through real gateways: several clients, several gateways, several nodes, and an operator."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from typing import Any

import msgspec
import pytest
from aiohttp import web
from cortex_core.catalogue import Catalogue, ModelProfile
from cortex_core.gateway_config import PollSection
from cortex_gateway.fleet.snapshot import NodeSnapshot

from tests.cortex_gateway.fake_neuron import FakeNeuron
from tests.cortex_gateway.gateway_client import MODEL, Client, Start


def sized(*names: str, mb: int = 20_000, **fields: Any) -> Catalogue:
    return Catalogue(models=tuple(ModelProfile(id=name, vram_mb=mb, **fields) for name in names))


def node_of(client: Client, name: str = "alpha") -> NodeSnapshot:
    return client.started.gateway.fleet.snapshot.nodes[name]


async def ask(client: Client, model: str = MODEL, **fields: Any) -> dict[str, str]:
    """The headers of a good answer."""
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], **fields}
    async with client.post("/v1/chat/completions", body) as response:
        assert response.status == 200, await response.text()
        await response.read()
        return dict(response.headers)


async def admin(client: Client, verb: str, **body: Any) -> tuple[int, dict[str, Any]]:
    async with client.post(f"/admin/models/{verb}", body) as response:
        return response.status, json.loads(await response.read())


async def refresh(client: Client) -> dict[str, Any]:
    async with client.get("/admin/fleet?refresh=1") as response:
        document: dict[str, Any] = json.loads(await response.read())
        return document


# ---------------------------------------------------------------------------------------------- cold models


async def test_200_first_requests_through_two_gateways_load_a_cold_model_once(
    neuron: FakeNeuron, second: FakeNeuron, start: Start
) -> None:
    """The neuron is single-flight and both gateways choose the same one: one load, and at most one call of each."""
    for each in (neuron, second):
        each.load_gate.clear()
    clients = [await start(neuron, second, catalogue=sized(MODEL)) for _ in range(2)]
    asking = [asyncio.ensure_future(clients[i % 2].chat()) for i in range(200)]
    async with asyncio.timeout(30):
        while sum(client.started.gateway.relay.num_active for client in clients) < 200:
            await asyncio.sleep(0.01)
    for each in (neuron, second):
        each.load_gate.set()
    assert {status for status, _ in await asyncio.gather(*asking)} == {200}
    assert (neuron.num_loads, second.num_loads) == (1, 0)
    assert neuron.count("POST /models/load") <= 2


async def test_a_gateway_that_comes_later_joins_the_load_without_a_call(neuron: FakeNeuron, start: Start) -> None:
    neuron.load_gate.clear()
    early, late = [await start(neuron, catalogue=sized(MODEL)) for _ in range(2)]
    first = asyncio.ensure_future(early.chat())
    await neuron.load_started.wait()
    await refresh(late)
    others = [asyncio.ensure_future(late.chat()) for _ in range(20)]
    async with asyncio.timeout(10):
        while late.started.gateway.relay.num_active < 20:
            await asyncio.sleep(0)
    neuron.load_gate.set()
    assert {status for status, _ in await asyncio.gather(first, *others)} == {200}
    assert neuron.count("POST /models/load") == 1


async def test_a_b_c_a_b_c_of_models_that_displace_each_other_costs_few_swaps_and_serves_everyone(
    neuron: FakeNeuron, start: Start
) -> None:
    neuron.enforce_memory = True
    neuron.footprints = dict.fromkeys("abc", 20_000)
    clients = [await start(neuron, catalogue=sized(*"abc"), eviction={"patience_s": 1.0}) for _ in range(2)]
    async with asyncio.timeout(60):
        await asyncio.gather(*(ask(clients[i % 2], "abc"[i % 3]) for i in range(60)))
    # Three loads serve sixty requests where one gateway knows of all; two know only of their own.
    assert 3 <= neuron.num_loads <= 9


async def test_a_model_that_can_never_fit_is_refused_at_once_with_the_numbers(neuron: FakeNeuron, start: Start) -> None:
    client = await start(neuron, catalogue=sized(MODEL, mb=99_000))
    status, document = await client.chat()
    assert (status, document["error"]["code"]) == (503, "insufficient_vram")
    assert "99000" in document["error"]["message"] and "24000" in document["error"]["message"]
    assert (document["error"]["needed_mb"], document["error"]["largest_mb"]) == (99_000, 24_000)
    assert neuron.count("POST /models/load") == 0


async def test_G6_a_load_that_fails_is_tried_on_another_node_and_left_alone_on_the_first(
    neuron: FakeNeuron, second: FakeNeuron, start: Start
) -> None:
    neuron.load_error = (503, {"error": "driver mismatch", "code": "cuda_unavailable"})
    client = await start(neuron, second, catalogue=sized(MODEL))
    assert (await ask(client))["x-cortex-node"] == "beta"
    assert (neuron.count("POST /models/load"), second.num_loads) == (1, 1)


async def test_clients_that_retry_do_not_make_a_failing_load_be_repeated_each_time(
    neuron: FakeNeuron, start: Start
) -> None:
    neuron.load_error = (503, {"error": "driver mismatch", "code": "cuda_unavailable"})
    client = await start(neuron, catalogue=sized(MODEL))
    for _ in range(5):
        status, document = await client.chat()
        assert (status, document["error"]["code"]) == (503, "cuda_unavailable")
        assert "driver mismatch" in document["error"]["message"]
    assert neuron.count("POST /models/load") == 1


async def test_what_does_not_stream_waits_for_its_budget_and_then_hears_how_far_the_load_is(
    neuron: FakeNeuron, start: Start
) -> None:
    neuron.load_gate.clear()
    client = await start(neuron, catalogue=sized(MODEL), gateway={"unstreamed_wait_s": 1.0, "stream_hold_s": 0.01})
    body = {"model": MODEL, "messages": []}
    async with client.post("/v1/chat/completions", {**body, "stream": True}) as stream:
        async with client.post("/v1/chat/completions", body) as response:
            error = json.loads(await response.read())["error"]
        assert (response.status, error["code"]) == (503, "model_loading")
        assert int(response.headers["retry-after"]) > 0
        assert (error["node"], error["phase"], error["bytes_total"]) == ("alpha", "weights", 4)
        assert {response.headers[f"x-cortex-{name}"] for name in ("node", "model", "route")} == {"alpha", MODEL, "cold"}
        assert (await stream.content.readline()).startswith(b":")
        neuron.load_gate.set()
        assert b"42" in await stream.read() or neuron.requests
    assert neuron.num_loads == 1


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
async def test_streams_that_wait_can_be_told_how_far_the_load_is(neuron: FakeNeuron, start: Start, path: str) -> None:
    neuron.load_gate.clear()
    settings = {"show_loading": True, "stream_hold_s": 0.0, "ping_interval_s": 0.01}
    client = await start(neuron, catalogue=sized(MODEL), gateway=settings)
    async with client.post(path, {"model": MODEL, "messages": [], "stream": True}) as response:
        line = b""
        while b"weights" not in line:
            line = await response.content.readline()
        assert line.startswith(b": ") and b"org/model is loading on alpha: weights 25 % (0.0 of 0.0 GB)" in line
        neuron.load_gate.set()
        assert (await response.read()).rstrip().endswith((b"[DONE]", b'"message_stop"}'))


# ---------------------------------------------------------------------------------------------- replicas


async def test_a_conversation_stays_where_it_began_and_others_spread(
    neuron: FakeNeuron, second: FakeNeuron, start: Start
) -> None:
    for each in (neuron, second):
        each.have(MODEL)
    client = await start(neuron, second)
    homes = {}
    for turn in range(3):
        for name in ("one", "two", "three", "four"):
            headers = await ask(client, prompt_cache_key=name)
            assert homes.setdefault(name, headers["x-cortex-node"]) == headers["x-cortex-node"]
            assert headers["x-cortex-route"] == ("loaded" if turn == 0 else "session")
    assert set(homes.values()) == {"alpha", "beta"}
    hits = [await client.metric("cortex_affinity_hits_total", node=name, kind="session") for name in ("alpha", "beta")]
    assert hits == [4, 4]


async def test_a_long_prompt_goes_where_its_beginning_was(neuron: FakeNeuron, second: FakeNeuron, start: Start) -> None:
    for each in (neuron, second):
        each.have(MODEL)
    client = await start(neuron, second)
    history = [{"role": "user", "content": "once upon a time " * 500}]
    home = (await ask(client, messages=history))["x-cortex-node"]
    for _ in range(3):
        history = [*history, {"role": "assistant", "content": "there"}, {"role": "user", "content": "and then?"}]
        headers = await ask(client, messages=history)
        assert (headers["x-cortex-node"], headers["x-cortex-route"]) == (home, "prefix")


async def test_affinity_can_be_turned_off(neuron: FakeNeuron, second: FakeNeuron, start: Start) -> None:
    for each in (neuron, second):
        each.have(MODEL)
    client = await start(neuron, second, routing={"affinity": False})
    nodes = [(await ask(client, prompt_cache_key="one"))["x-cortex-node"] for _ in range(4)]
    assert nodes == ["alpha", "beta", "alpha", "beta"]


# ---------------------------------------------------------------------------------------------- failing nodes


async def failing(request: web.Request) -> web.StreamResponse:
    return web.json_response(
        {"error": {"message": "engine on fire", "type": "x", "code": "internal_error"}}, status=500
    )


async def test_a_node_that_fails_fast_does_not_attract_the_traffic(
    neuron: FakeNeuron, second: FakeNeuron, start: Start
) -> None:
    for each in (neuron, second):
        each.have(MODEL)
    neuron.answer = failing
    client = await start(neuron, second)
    statuses = [(await client.chat())[0] for _ in range(20)]
    assert statuses == [200] * 20, "what one node refuses another is asked"
    assert len(neuron.requests) == 1
    neuron.answer = None
    asking = await asyncio.gather(*(client.chat() for _ in range(40)))
    assert {status for status, _ in asking} == {200}
    assert len(neuron.requests) > 1, "under load it is tried again"


async def test_a_broken_node_gets_a_try_after_its_back_off_and_is_taken_back(neuron: FakeNeuron, start: Start) -> None:
    neuron.have(MODEL)
    neuron.answer = failing
    client = await start(neuron, breaker={"failures": 2, "backoff_s": 0.2})
    assert [(await client.chat())[0] for _ in range(2)] == [500, 500]
    async with client.post("/v1/chat/completions", {"model": MODEL, "messages": []}) as response:
        assert (response.status, json.loads(await response.read())["error"]["code"]) == (503, "circuit_open")
        assert int(response.headers["retry-after"]) >= 1
    assert len(neuron.requests) == 2
    assert await client.metric("cortex_breaker_state", node="alpha", model=MODEL) == 2
    neuron.answer = None
    async with asyncio.timeout(30):
        while (await client.chat())[0] != 200:
            await asyncio.sleep(0.02)
    assert await client.metric("cortex_breaker_state", node="alpha", model=MODEL) == 0


async def test_clients_that_hang_up_are_neither_success_nor_failure(neuron: FakeNeuron, start: Start) -> None:
    neuron.have(MODEL)
    neuron.answer_gate.clear()
    client = await start(neuron, breaker={"failures": 1})
    for _ in range(5):
        neuron.request_arrived.clear()
        leaving = asyncio.ensure_future(client.chat())
        await neuron.request_arrived.wait()
        leaving.cancel()
        async with asyncio.timeout(10):
            while client.started.gateway.relay.num_active:
                await asyncio.sleep(0.01)
    neuron.answer_gate.set()
    assert (await client.chat())[0] == 200
    assert not dict(client.started.gateway.fleet.breakers.items())


async def test_a_model_that_only_fails_where_it_is_comes_up_elsewhere(
    neuron: FakeNeuron, second: FakeNeuron, start: Start
) -> None:
    neuron.have(MODEL)
    neuron.answer = failing
    client = await start(neuron, second, catalogue=sized(MODEL), breaker={"failures": 1, "backoff_s": 600.0})
    assert (await client.chat())[0] == 500
    assert (await ask(client))["x-cortex-node"] == "beta"


async def test_tokens_that_flow_count_as_life_whatever_polls_say(neuron: FakeNeuron, start: Start) -> None:
    neuron.have(MODEL)
    more, done = asyncio.Event(), asyncio.Event()

    async def endless(request: web.Request) -> web.StreamResponse:
        response = await FakeNeuron.begin_stream(request)
        while not done.is_set():
            await response.write(b'data: {"choices":[]}\n\n')
            await asyncio.wait({asyncio.ensure_future(done.wait())}, timeout=0.005)
            more.set()
        return response

    neuron.answer = endless
    client = await start(neuron)
    body = {"model": MODEL, "messages": [], "stream": True}
    async with client.post("/v1/chat/completions", body) as response:
        await response.content.readline()
        reading = asyncio.ensure_future(response.read())
        healths = set()
        neuron.models_hang = True
        current = client.started.gateway.current
        impatient = msgspec.structs.replace(current.config, poll=PollSection(timeout_s=0.2))
        current.value = dataclasses.replace(current.value, config=impatient)
        for _ in range(4):
            await refresh(client)
            healths.add(node_of(client).health)
        assert healths == {"suspect"}
        done.set()
        await reading
    for _ in range(3):
        await refresh(client)
    assert node_of(client).health == "unhealthy"


# ---------------------------------------------------------------------------------------------- upkeep and pins


async def test_a_pinned_model_stays_until_it_is_unpinned_and_every_gateway_knows(
    neuron: FakeNeuron, start: Start
) -> None:
    neuron.enforce_memory = True
    neuron.footprints = {"a": 20_000, "b": 20_000}
    neuron.have("a")
    one, other = [await start(neuron, catalogue=sized("a", "b")) for _ in range(2)]
    status, answer = await admin(one, "pin", model="a")
    assert (status, answer["nodes"], answer["status"]) == (200, ["alpha"], "pinned")
    assert answer["kept_by"] == {"alpha": "neuron"}
    await refresh(other)
    status, document = await other.chat(model="b")
    assert (status, document["error"]["code"]) == (503, "insufficient_vram")
    assert list(neuron.models) == ["a"]
    await admin(other, "unpin", model="a")
    await refresh(one)
    assert (await one.chat(model="b"))[0] == 200
    assert list(neuron.models) == ["b"]


async def test_a_neuron_too_old_to_keep_a_pin_has_it_kept_by_the_gateway(stack: Any, start: Start) -> None:
    from tests.cortex_gateway.fake_neuron import listening

    old = FakeNeuron("alpha")
    old.is_old = True
    await stack.enter_async_context(listening(old))
    old.have("a")
    client = await start(old)
    _, answer = await admin(client, "pin", model="a")
    assert answer["kept_by"] == {"alpha": "gateway"}
    await refresh(client)
    assert node_of(client).is_pinned("a")
    await admin(client, "unpin", model="a")
    assert not node_of(client).is_pinned("a")


async def test_what_is_not_loaded_cannot_be_pinned(neuron: FakeNeuron, start: Start) -> None:
    client = await start(neuron, catalogue=sized(MODEL))
    status, answer = await admin(client, "pin", model=MODEL)
    assert (status, answer["error"]["code"]) == (404, "model_not_loaded")


async def test_an_idle_model_is_unloaded_and_a_request_brings_it_back(neuron: FakeNeuron, start: Start) -> None:
    neuron.have(MODEL)
    client = await start(neuron, catalogue=sized(MODEL, idle_unload_s=0.001))
    async with asyncio.timeout(30):
        while neuron.models:
            await asyncio.gather(*client.started.gateway.upkeep.do_chores())
            await asyncio.sleep(0.005)
    assert await client.metric("cortex_evictions_total", model=MODEL, reason="idle") == 1
    assert (await client.chat())[0] == 200


async def test_defrag_after_cycles_recycles_idle_models_and_requests_meanwhile_wait(
    neuron: FakeNeuron, start: Start
) -> None:
    neuron.have("pinned", pinned=True)
    neuron.have("a")
    client = await start(neuron, catalogue=sized("a", "pinned", mb=1_000), eviction={"defrag_after_cycles": 1})
    await admin(client, "unload", model="a")
    upkeep = client.started.gateway.upkeep
    assert upkeep.do_chores() == []  # the defragmentation begins
    neuron.load_gate.clear()
    (recycling,) = upkeep.do_chores()
    await neuron.load_started.wait()
    assert node_of(client).status("pinned") == "loading"
    asking = asyncio.ensure_future(ask(client, "pinned"))
    async with asyncio.timeout(10):
        while not client.started.gateway.relay.num_active:
            await asyncio.sleep(0)
    neuron.load_gate.set()
    await recycling
    assert (await asking)["x-cortex-route"] == "cold"
    assert neuron.count("POST /models/load") == 1
    assert neuron.models["pinned"]["pinned"] is True
    assert await client.metric("cortex_model_loads_total", model="pinned", reason="defrag") == 1
    assert upkeep.do_chores() == [] and node_of(client).defrag_since is None


# ---------------------------------------------------------------------------------------------- headers


@pytest.mark.parametrize("stream", [True, False])
async def test_every_answer_says_where_it_was_decided(neuron: FakeNeuron, start: Start, stream: bool) -> None:
    client = await start(neuron, catalogue=sized(MODEL))
    for expected in ("cold", "loaded"):
        body = {"model": MODEL, "messages": [], "stream": stream}
        async with client.post("/v1/chat/completions", body) as response:
            await response.read()
        decided = {name: response.headers[f"x-cortex-{name}"] for name in ("node", "model", "route")}
        assert decided == {"node": "alpha", "model": MODEL, "route": expected}
    async with client.post("/v1/chat/completions", {"model": "nobody", "messages": [], "stream": stream}) as response:
        assert response.status == 404
        assert response.headers["x-cortex-route"] == "refused"
        assert "x-cortex-node" not in response.headers
