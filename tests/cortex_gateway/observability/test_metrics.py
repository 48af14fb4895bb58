"""Every metric that is described is emitted, with the names, labels and buckets of the reference."""

from __future__ import annotations

import asyncio
import re

from aiohttp import web
from cortex_core.catalogue import Catalogue, ModelProfile
from cortex_gateway.observability.metrics import (
    LONG_BUCKETS,
    SHORT_BUCKETS,
    TOKENS_PER_SECOND_BUCKETS,
    Metrics,
)

from tests.cortex_gateway.fake_neuron import OPENAI_EVENTS, FakeNeuron
from tests.cortex_gateway.gateway_client import MODEL, Client, Start, until
from tests.cortex_gateway.relay.test_resume import END, speaking

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
    "cortex_connections": "gauge",
    "cortex_connections_limit": "gauge",
    "cortex_connections_accepted_total": "counter",
    "cortex_connections_ended_total": "counter",
    "cortex_log_lines_left_out_total": "counter",
    "cortex_client_gone_total": "counter",
    "cortex_blamed_requests_total": "counter",
    "cortex_finished_requests_total": "counter",
    "cortex_retries_total": "counter",
    "cortex_resumes_total": "counter",
    "cortex_mixed_streams_total": "counter",
    "cortex_breaker_openings_total": "counter",
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
    "cortex_leaving_requests": "gauge",
    "cortex_access_refused_total": "counter",
    "cortex_body_workers_ended_total": "counter",
    "cortex_node_refusing": "gauge",
}
MOVED_ELSEWHERE = {
    *("cortex_leaving_requests", "cortex_config_reloads_total", "cortex_node_refusing"),
    *("cortex_connections_ended_total", "cortex_log_lines_left_out_total", "cortex_body_workers_ended_total"),
    "cortex_blamed_requests_total",
}
"""In tests of their own: `configuration/test_reload.py`, `e2e/test_connections.py`, `access/test_fleet_secret.py`,
`bodies/test_large_bodies.py`, `relay/test_deaths.py`."""


async def scrape(client: Client) -> str:
    async with client.session.get(client.started.metrics_url + "/metrics") as response:
        assert response.status == 200
        assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
        return await response.text()


def moved(text: str) -> set[str]:
    """Names of which some series is not 0: histograms that have observed something, counters that have counted."""
    names = set()
    for line in text.splitlines():
        if not line.startswith("#") and float(line.rpartition(" ")[2]) != 0:
            names.add(re.sub(r"_count$", "", line.split("{")[0].split(" ")[0]))
    return names


class Faults:
    """A neuron that fails in the way that the model is named after, and serves all others."""

    def __init__(self, neuron: FakeNeuron) -> None:
        self._neuron = neuron
        self._begun: set[str] = set()
        neuron.answer = self.answer
        for model in ("refused", "aborted", "stale", "cut", "slow"):
            neuron.have(model)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        headers = {name.lower(): value for name, value in request.headers.items()}
        model = headers["x-cortex-resolved-model"]
        is_first, transport = model not in self._begun, request.transport
        self._begun.add(model)
        assert transport is not None
        match model:
            case "refused":
                return web.json_response({"error": {"message": "no", "code": "no"}}, status=500)
            case "aborted":
                response = await FakeNeuron.begin_stream(request)
                await response.write(OPENAI_EVENTS[0])
                transport.abort()
                return response
            case "stale" if is_first:
                transport.abort()
            case "cut":
                return await speaking([1] if is_first else [2], then=None if is_first else END)(request)
            case "slow":
                response = await FakeNeuron.begin_stream(request)
                await response.write(OPENAI_EVENTS[0])
                await asyncio.Event().wait()
        return await self._neuron._default_answer(request, headers, await request.read())


async def test_after_a_bit_of_everything_each_described_metric_has_moved(
    neuron: FakeNeuron, second: FakeNeuron, start: Start
) -> None:
    for each in (neuron, second):
        each.have("twice")
    Faults(second)
    neuron.footprints = {MODEL: 20_000, "other": 20_000}
    load = {"in_flight": 1, "queue_depth": 2, "max_in_flight": 3, "max_queue_depth": 4, "rejected_queue_full": 5}
    load |= {"anon_in_flight": 1, "anon_max_in_flight": 2, "tok_s_prefill": 99.5, "tok_s_decode": 10.5}
    device = {"index": 1, "vram_used_mb": 5, "vram_free_mb": 6, "utilization_pct": 50, "temp_c": 60}
    second.health_extra = {"devices": [device]}
    profiles = tuple(
        ModelProfile(id=model, vram_mb=mb, pinned_on=("alpha",))
        for model, mb in ((MODEL, 20_000), ("other", 20_000), ("third", 1_000))
    )
    keys = [{"key_id": "ci", "key": "secret", "models": [MODEL]}]
    client = await start(
        neuron,
        second,
        catalogue=Catalogue(models=profiles),
        entitlements={"keys": keys},
        breaker={"failures": 1, "backoff_s": 0.2},
    )
    assert (await client.chat())[0] == 200
    for model, status in ((MODEL, 200), ("other", 403)):
        body = {"model": model, "messages": []}
        async with client.post("/v1/chat/completions", body, headers={"x-api-key": "secret"}) as response:
            assert response.status == status
    assert (await client.chat(model="nobody"))[0] == 404
    async with client.get("/health", headers={"origin": "https://page.example"}) as response:
        assert response.status == 403
    assert (await client.chat(model="other"))[0] == 200
    for _ in range(2):
        assert (await client.chat(model="twice", prompt_cache_key="conversation"))[0] == 200
    assert (await client.chat(model="refused"))[0] == 500
    assert (await client.chat(model="stale"))[0] == 200
    for model in ("aborted", "cut", "slow"):
        async with client.post("/v1/chat/completions", {"model": model, "messages": [], "stream": True}) as response:
            await (response.content.readuntil(b"\n\n") if model == "slow" else response.read())
    neuron.load_gate.clear()
    waiting = asyncio.ensure_future(client.chat(model="third"))
    await until(lambda: client.started.gateway.fleet.snapshot.nodes["alpha"].status("third") == "loading", client)
    neuron.loads["twice"] = load
    async with client.get("/admin/fleet?refresh=1"):
        pass
    async with client.post("/v1/chat/completions", {"model": "slow", "messages": [], "stream": True}) as response:
        await response.content.readuntil(b"\n\n")
        text = await scrape(client)
    neuron.load_gate.set()
    assert (await waiting)[0] == 200
    for name, kind in (REFERENCE | OWN).items():
        assert f"# TYPE {name} {kind}" in text, name
    assert set(REFERENCE | OWN) - MOVED_ELSEWHERE - moved(text) == set()
    described = {line.split(" ")[2] for line in text.splitlines() if line.startswith("# TYPE")}
    assert {name for name in described if not name.endswith("_created")} == set(REFERENCE | OWN)
    assert await client.metric("cortex_evictions_total", model=MODEL, reason="room") == 1
    assert await client.metric("cortex_rejected_requests_total", code="model_not_found") == 1
    assert await client.metric("cortex_device_vram_free_mb", node="alpha", device="0") == 4000
    assert await client.metric("cortex_resumes_total", model="cut", node="beta") == 1
    assert await client.metric("cortex_retries_total", model="stale", node="beta") == 1
    assert await client.metric("cortex_request_errors_total", model="aborted", node="beta") == 1
    assert await client.metric("cortex_breaker_openings_total", model="refused", node="beta") == 1
    ended = {
        outcome: await client.metric("cortex_finished_requests_total", surface="chat_completions", outcome=outcome)
        for outcome in ("ok", "rejected", "upstream_error", "upstream_failed", "client_gone")
    }
    assert ended == {"ok": 8, "rejected": 2, "upstream_error": 1, "upstream_failed": 1, "client_gone": 2}


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


async def test_names_that_clients_invent_while_nothing_is_known_never_become_labels_either(
    neuron: FakeNeuron, start: Start
) -> None:
    neuron.models_hang = True
    client = await start(neuron, wait_polled=False, gateway={"unstreamed_wait_s": 0.2, "load_wait_s": 60.0})
    assert (await client.chat(model="invented-0"))[0] == 503
    waiting = client.started.gateway._waiting
    hanging = asyncio.ensure_future(client.chat(model="invented-1", stream=True))
    async with asyncio.timeout(10):
        while not waiting:
            await asyncio.sleep(0.01)
    assert await client.metric("cortex_waiting_requests", model="unknown") == 1
    assert "invented" not in await scrape(client)
    hanging.cancel()
    async with asyncio.timeout(10):
        while client.started.gateway.relay.num_active:
            await asyncio.sleep(0.01)
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
