"""Polling real sockets: in parallel, with patience, and at once when something is waited for."""

from __future__ import annotations

import asyncio

from cortex_core.fleet import ModelSpec
from cortex_gateway.fleet.snapshot import NodeSnapshot

from tests.cortex_gateway.fake_neuron import FakeNeuron
from tests.cortex_gateway.gateway_client import MODEL, Client, Start, until


def alpha(client: Client) -> NodeSnapshot:
    return client.started.gateway.fleet.snapshot.nodes["alpha"]


async def refresh(client: Client) -> None:
    async with client.get("/admin/fleet?refresh=1") as response:
        assert response.status == 200
        await response.read()


async def test_a_poll_brings_discovery_models_and_health(neuron: FakeNeuron, start: Start) -> None:
    neuron.have(MODEL, limit={"context": 4096}, progress=None)
    neuron.loads[MODEL] = {"in_flight": 2, "tok_s_decode": 12.5}
    client = await start(neuron)
    node = alpha(client)
    assert node.health == "healthy"
    assert node.discovery is not None and node.discovery.devices[0].vram_total_mb == 24000
    assert node.models[MODEL].limit is not None and node.models[MODEL].limit.context == 4096
    assert (node.loads[MODEL].in_flight, node.devices[0].vram_free_mb) == (2, 24000)


async def test_discovery_is_asked_once_and_again_after_a_restart(neuron: FakeNeuron, start: Start) -> None:
    client = await start(neuron)
    await refresh(client)
    assert neuron.count("GET /discovery") == 1
    neuron.health_extra = {"uptime_secs": 0}
    await refresh(client)
    assert neuron.count("GET /discovery") == 2


async def test_a_build_that_did_not_say_what_it_reads_is_asked_again_until_it_does(
    neuron: FakeNeuron, start: Start
) -> None:
    neuron.version_status = 503
    neuron.features = ["load.dtype"]
    client = await start(neuron)
    order = ModelSpec(MODEL, dtype="float32")
    assert alpha(client).features is None and not alpha(client).reads(order)
    neuron.version_status = 200
    await refresh(client)
    assert alpha(client).features == {"load.dtype"} and alpha(client).reads(order)
    asked = neuron.count("GET /version")
    await refresh(client)
    assert neuron.count("GET /version") == asked
    neuron.version_status = 503
    neuron.health_extra = {"uptime_secs": 0}  # another process, maybe an older one
    await refresh(client)
    assert alpha(client).features is None
    neuron.version_status = 404
    await refresh(client)
    assert alpha(client).features == frozenset(), "it says nothing of itself, and is not asked for ever"


async def test_F23_a_node_is_routable_until_the_third_miss_and_comes_back(neuron: FakeNeuron, start: Start) -> None:
    neuron.have(MODEL)
    client = await start(neuron)
    neuron.is_down = True
    seen = []
    for _ in range(3):
        await refresh(client)
        seen.append(alpha(client).health)
    assert seen == ["suspect", "suspect", "unhealthy"]
    assert (await client.chat())[0] == 503
    neuron.is_down = False
    await refresh(client)
    assert alpha(client).health == "healthy"
    assert (await client.chat())[0] == 200


async def test_a_failing_health_call_does_not_cost_the_node_its_health(neuron: FakeNeuron, start: Start) -> None:
    neuron.have(MODEL)
    client = await start(neuron)
    neuron.health_fails = True
    for _ in range(4):
        await refresh(client)
    assert alpha(client).health == "healthy"
    assert (await client.chat())[0] == 200


async def test_a_node_that_does_not_answer_delays_no_other(neuron: FakeNeuron, start: Start) -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    try:
        neuron.have(MODEL)
        stuck = FakeNeuron("stuck")
        stuck.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        client = await start(stuck, neuron, poll={"timeout_s": 60.0}, wait_polled=False)
        await until(lambda: alpha(client).health == "healthy", client)
        assert (await client.chat())[0] == 200
        assert client.started.gateway.fleet.snapshot.nodes["stuck"].health == "unknown"
    finally:
        server.close()


async def test_an_older_neuron_with_few_fields_is_understood(neuron: FakeNeuron, start: Start) -> None:
    """Appendix F 2: no limit, servable, models or progress."""
    neuron.models[MODEL] = {"id": MODEL, "harness": "candle", "status": "loaded", "devices": [0], "vram_used_mb": None}
    client = await start(neuron)
    assert (await client.chat())[0] == 200


async def test_a_neuron_that_answers_nonsense_is_a_miss_and_not_a_crash(neuron: FakeNeuron, start: Start) -> None:
    client = await start(neuron)
    neuron.models = {"x": {"status": 5}}
    await refresh(client)
    assert alpha(client).health == "suspect"
    neuron.models = {}
    await refresh(client)
    assert alpha(client).health == "healthy"


async def test_the_interval_is_the_configured_one(neuron: FakeNeuron, start: Start) -> None:
    client = await start(neuron, poll={"interval_s": 0.01})
    neuron.have(MODEL)
    await until(lambda: alpha(client).status(MODEL) == "loaded", client)
