"""Health, probes, and what is not there."""

from __future__ import annotations

import json

import pytest

from tests.cortex_gateway.fake_neuron import FakeNeuron
from tests.cortex_gateway.gateway_client import MODEL, Start


@pytest.mark.parametrize("path", ["/", "/health"])
async def test_health_counts_nodes(neuron: FakeNeuron, start: Start, path: str) -> None:
    client = await start(neuron)
    async with client.get(path) as response:
        assert response.status == 200
        assert json.loads(await response.read()) == {"status": "ok", "nodes": {"healthy": 1, "total": 1}}


async def test_a_fleet_without_a_healthy_node_is_degraded(neuron: FakeNeuron, start: Start) -> None:
    neuron.is_down = True
    for client, total in ((await start(neuron), 1), (await start(), 0)):
        async with client.get("/health") as response:
            assert json.loads(await response.read()) == {
                "status": "degraded",
                "nodes": {"healthy": 0, "total": total},
            }


async def test_F24_a_model_that_cannot_be_served_impairs_the_fleet(neuron: FakeNeuron, start: Start) -> None:
    neuron.have(MODEL, servable={"ok": False, "reason": "vram", "detail": "leak"})
    client = await start(neuron)
    async with client.get("/health") as response:
        document = json.loads(await response.read())
    assert document["status"] == "impaired"
    assert document["unservable"] == [{"node": "alpha", "model": MODEL, "reason": "vram", "detail": "leak"}]


async def test_H7_a_model_that_its_node_was_to_load_and_has_not_impairs_the_fleet(
    neuron: FakeNeuron, start: Start
) -> None:
    failure = {"model_id": "acme/heavy", "error": "The neuron ended 3 times in a row", "retry_at": 1_790_000_000}
    here = {"model_id": MODEL, "error": "it was loaded by hand since"}
    neuron.have(MODEL)
    neuron.health_extra = {"activation": {"state": "ready", "failed": [failure, here]}}
    client = await start(neuron)
    async with client.get("/health") as response:
        document = json.loads(await response.read())
    assert document["status"] == "impaired"
    assert document["not_loaded"] == [
        {"node": "alpha", "model": "acme/heavy", "error": failure["error"], "retry_at": 1_790_000_000}
    ]
