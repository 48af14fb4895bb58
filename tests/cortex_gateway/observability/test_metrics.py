"""Every metric that is described is emitted, with the names, labels and buckets of the reference."""

from __future__ import annotations

import asyncio
import re

from cortex_core.catalogue import Catalogue, ModelProfile
from cortex_gateway.observability.metrics import (
    LONG_BUCKETS,
    SHORT_BUCKETS,
    TOKENS_PER_SECOND_BUCKETS,
    Metrics,
)

from tests.cortex_gateway.fake_neuron import FakeNeuron
from tests.cortex_gateway.gateway_client import MODEL, Client, Start, until

REFERENCE = {
    "cortex_requests_total": "counter",
    "cortex_request_duration_seconds": "histogram",
    "cortex_request_errors_total": "counter",
    "cortex_cold_starts_total": "counter",
    "cortex_evictions_total": "counter",
    "cortex_time_to_first_token_seconds": "histogram",
    "cortex_tokens_per_second": "histogram",
    "cortex_prompt_tokens_total": "counter",
    "cortex_completion_tokens_total": "counter",
    "cortex_cached_prompt_tokens_total": "counter",
    "cortex_model_in_flight": "gauge",
    "cortex_model_queue_depth": "gauge",
    "cortex_model_max_in_flight": "gauge",
    "cortex_model_max_queue_depth": "gauge",
    "cortex_model_tok_s_prefill": "gauge",
    "cortex_model_tok_s_decode": "gauge",
    "cortex_model_anon_in_flight": "gauge",
    "cortex_model_anon_max_in_flight": "gauge",
    "cortex_model_rejections_total": "counter",
    "cortex_device_vram_used_mb": "gauge",
    "cortex_device_vram_free_mb": "gauge",
    "cortex_device_utilization_pct": "gauge",
    "cortex_device_temp_c": "gauge",
    "cortex_spend_tokens_total": "counter",
    "cortex_spend_prompt_tokens_total": "counter",
    "cortex_spend_completion_tokens_total": "counter",
}
OWN = {
    "cortex_client_gone_total": "counter",
    "cortex_rejected_requests_total": "counter",
    "cortex_model_loads_total": "counter",
    "cortex_model_load_seconds": "histogram",
    "cortex_key_refusals_total": "counter",
    "cortex_node_healthy": "gauge",
    "cortex_in_flight": "gauge",
    "cortex_breaker_state": "gauge",
    "cortex_waiting_requests": "gauge",
    "cortex_queue_wait_seconds": "histogram",
    "cortex_affinity_hits_total": "counter",
    "cortex_config_reloads_total": "counter",
    "cortex_config_valid": "gauge",
}
SAMPLED_ELSEWHERE = {"cortex_leaving_requests"}
"""In tests of their own: `configuration/test_reload.py`."""


async def scrape(client: Client) -> str:
    async with client.session.get(client.started.metrics_url + "/metrics") as response:
        assert response.status == 200
        assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
        return await response.text()


def samples(text: str) -> set[str]:
    """Names that have at least one sample; histograms by their base name."""
    names = {line.split("{")[0].split(" ")[0] for line in text.splitlines() if not line.startswith("#")}
    return {re.sub(r"_(bucket|count|sum)$", "", name) for name in names}


async def test_after_a_bit_of_everything_each_described_metric_has_samples(
    neuron: FakeNeuron, second: FakeNeuron, start: Start
) -> None:
    for each in (neuron, second):
        each.have("twice")
    neuron.footprints = {MODEL: 20_000, "other": 20_000}
    neuron.loads[MODEL] = {
        "in_flight": 1,
        "queue_depth": 2,
        "max_in_flight": 3,
        "max_queue_depth": 4,
        "anon_max_in_flight": 2,
        "rejected_queue_full": 5,
        "tok_s_decode": 10.5,
    }
    profiles = tuple(
        ModelProfile(id=model, vram_mb=mb, pinned_on=("alpha",))
        for model, mb in ((MODEL, 20_000), ("other", 20_000), ("third", 1_000))
    )
    keys = [{"key_id": "ci", "key": "secret", "models": [MODEL]}]
    client = await start(neuron, second, catalogue=Catalogue(models=profiles), entitlements={"keys": keys})
    assert (await client.chat())[0] == 200
    for model, status in ((MODEL, 200), ("other", 403)):
        body = {"model": model, "messages": []}
        async with client.post("/v1/chat/completions", body, headers={"x-api-key": "secret"}) as response:
            assert response.status == status
    assert (await client.chat(model="nobody"))[0] == 404
    neuron.loads.clear()
    async with client.get("/admin/fleet?refresh=1"):
        pass
    assert (await client.chat(model="other"))[0] == 200
    for _ in range(2):
        assert (await client.chat(model="twice", prompt_cache_key="conversation"))[0] == 200
    neuron.load_gate.clear()
    waiting = asyncio.ensure_future(client.chat(model="third"))
    await until(lambda: client.started.gateway.fleet.snapshot.nodes["alpha"].status("third") == "loading", client)
    neuron.loads["twice"] = {"in_flight": 1, "max_in_flight": 3, "max_queue_depth": 4, "anon_max_in_flight": 2}
    async with client.get("/admin/fleet?refresh=1"):
        pass
    text = await scrape(client)
    neuron.load_gate.set()
    assert (await waiting)[0] == 200
    for name, kind in (REFERENCE | OWN).items():
        assert f"# TYPE {name} {kind}" in text, name
        assert name in samples(text), name
    described = {line.split(" ")[2] for line in text.splitlines() if line.startswith("# TYPE")}
    assert {name for name in described if not name.endswith("_created")} == set(REFERENCE | OWN) | SAMPLED_ELSEWHERE
    assert await client.metric("cortex_evictions_total", model=MODEL) == 1
    assert await client.metric("cortex_rejected_requests_total", code="model_not_found") == 1
    assert await client.metric("cortex_device_vram_free_mb", node="alpha", device="0") == 4000


async def test_a_ceiling_of_zero_is_unknown_and_not_exposed(neuron: FakeNeuron, start: Start) -> None:
    neuron.have(MODEL)
    neuron.loads[MODEL] = {"in_flight": 0}
    client = await start(neuron)
    assert await client.metric("cortex_model_in_flight", model=MODEL) == 0
    assert await client.metric("cortex_model_max_in_flight", model=MODEL) is None


async def test_G7_histograms_have_the_references_buckets(neuron: FakeNeuron, start: Start) -> None:
    neuron.have(MODEL)
    client = await start(neuron)
    await client.chat()
    text = await scrape(client)
    for name, buckets in (
        ("cortex_request_duration_seconds", LONG_BUCKETS),
        ("cortex_time_to_first_token_seconds", SHORT_BUCKETS),
        ("cortex_tokens_per_second", TOKENS_PER_SECOND_BUCKETS),
    ):
        found = [float(edge) for edge in re.findall(rf'{name}_bucket{{le="([\d.]+)"', text)]
        assert found == [float(edge) for edge in buckets]


async def test_names_that_clients_invent_never_become_labels(neuron: FakeNeuron, start: Start) -> None:
    neuron.have(MODEL)
    client = await start(neuron)
    for number in range(5):
        await client.chat(model=f"invented-{number}")
    assert "invented" not in await scrape(client)


async def test_the_metrics_listener_serves_nothing_else(start: Start) -> None:
    client = await start()
    for method, path, status in (("GET", "/", 404), ("GET", "/v1/models", 404), ("POST", "/metrics", 405)):
        async with client.session.request(method, client.started.metrics_url + path) as response:
            assert response.status == status
    async with client.get("/metrics") as response:
        assert response.status == 404


def test_two_gateways_in_one_process_do_not_share_a_registry() -> None:
    first, second = Metrics(), Metrics()
    first.evicted("m", "alpha", "room")
    assert b"cortex_evictions_total{" in first.render()
    assert b"cortex_evictions_total{" not in second.render()
