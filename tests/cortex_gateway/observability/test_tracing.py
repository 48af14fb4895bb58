"""What a collector is told of the gateway's requests, and that neither it nor a client's headers can harm one."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from aiohttp import web
from cortex_core.catalogue import Catalogue, ModelProfile

from tests.cortex_gateway import fake_openai
from tests.cortex_gateway.fake_neuron import OPENAI_EVENTS, FakeNeuron
from tests.cortex_gateway.fake_openai import FakeOpenAI
from tests.cortex_gateway.gateway_client import MODEL, Start
from tests.cortex_gateway.relay.test_resume import END, speaking
from tests.otlp_collector import Collector, Span

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{CALLER}-01"
CHAT = "/v1/chat/completions"
SECRET_WORDS = "the moon is made of cheese"
BODY = {"model": MODEL, "messages": [{"role": "user", "content": SECRET_WORDS}]}


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    with Collector() as listening:
        yield listening


def telemetry(collector: Collector, **fields: Any) -> dict[str, Any]:
    return {"traces": True, "endpoint": collector.url, **fields}


def by_kind(spans: list[Span], kind: str) -> list[Span]:
    return [span for span in spans if span.kind == kind]


async def ask(client: Any, body: dict[str, Any], path: str = CHAT, **headers: str) -> tuple[int, bytes]:
    async with client.post(path, body, headers={"traceparent": PARENT, **headers}) as response:
        return response.status, await response.read()


async def spans_of(collector: Collector, count: int, trace: str = TRACE) -> list[Span]:
    return await asyncio.to_thread(collector.trace, trace, count=count)


async def test_a_request_is_one_server_span_with_its_attempt_and_the_neuron_goes_on_from_there(
    neuron: FakeNeuron, start: Start, collector: Collector
) -> None:
    neuron.have(MODEL)
    client = await start(neuron, telemetry=telemetry(collector))
    status, _ = await ask(client, BODY, tracestate="vendor=1", baggage="user=1")
    assert status == 200
    server, attempt = await spans_of(collector, 2)
    assert (server.service, server.name, server.kind) == ("cortex-gateway", f"POST {CHAT}", "SERVER")
    assert (server.parent_id, server.state, server.is_error) == (CALLER, "vendor=1", False)
    assert (attempt.name, attempt.kind, attempt.parent_id) == (f"chat {MODEL}", "CLIENT", server.span_id)
    _, headers, _ = neuron.requests[-1]
    assert headers["traceparent"] == f"00-{TRACE}-{attempt.span_id}-01"
    assert (headers["tracestate"], headers["baggage"]) == ("vendor=1", "user=1")
    expected = {
        "http.request.method": "POST",
        "http.route": CHAT,
        "http.response.status_code": 200,
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": MODEL,
        "gen_ai.request.stream": False,
        "gen_ai.response.model": MODEL,
        "gen_ai.usage.input_tokens": 11,
        "gen_ai.usage.output_tokens": 7,
        "gen_ai.usage.cache_read.input_tokens": 3,
        "cortex.node": "alpha",
        "cortex.route": "loaded",
        "cortex.attempts": 1,
        "cortex.outcome": "ok",
    }
    assert expected.items() <= server.attributes.items()
    assert attempt.attributes["http.response.status_code"] == 200
    assert attempt.attributes["url.full"] == f"{neuron.url}{CHAT}"
    assert [name for name, _ in attempt.events] == ["first_byte"]
    assert server.begins <= attempt.begins < attempt.ends <= server.ends
    assert not any(SECRET_WORDS.encode() in span.raw for span in (server, attempt))


async def test_a_stream_ends_its_span_when_it_ends_and_the_access_line_names_the_trace(
    neuron: FakeNeuron, start: Start, collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "cortex_gateway.access")
    neuron.have(MODEL)
    neuron.answer_gate.clear()
    client = await start(neuron, telemetry=telemetry(collector))
    async with client.post(CHAT, {**BODY, "stream": True}) as response:
        await response.content.readuntil(b"\n\n")
        assert not collector.spans
        neuron.answer_gate.set()
        await response.read()
    (server,) = await asyncio.to_thread(collector.find, lambda span: span.kind == "SERVER")
    assert server.parent_id == "" and server.attributes["gen_ai.usage.output_tokens"] == 7
    assert server.attributes["gen_ai.response.time_to_first_chunk"] > 0
    (line,) = [json.loads(record.getMessage()) for record in caplog.records if CHAT in record.getMessage()]
    assert line["trace_id"] == server.trace_id


async def test_a_resumed_stream_is_one_request_with_two_attempts(
    neuron: FakeNeuron, second: FakeNeuron, start: Start, collector: Collector
) -> None:
    neuron.have(MODEL)
    neuron.answer = speaking([1, 2], then=None)
    second.have(MODEL)
    second.answer = speaking([3], then=END)
    client = await start(neuron, second, telemetry=telemetry(collector))
    async with client.post(CHAT, {**BODY, "stream": True}, headers={"traceparent": PARENT}) as response:
        neuron.models.clear()
        await response.read()
    spans = await spans_of(collector, 3)
    (server,) = by_kind(spans, "SERVER")
    broken, resumed = by_kind(spans, "CLIENT")
    assert broken.is_error and broken.attributes["error.type"] == "broken_stream"
    assert (broken.attributes["cortex.node"], resumed.attributes["cortex.node"]) == ("alpha", "beta")
    assert resumed.attributes["cortex.resume"] is True and not resumed.is_error
    assert {broken.parent_id, resumed.parent_id} == {server.span_id}
    assert server.attributes["cortex.resumes"] == 1 and not server.is_error
    assert second.requests[-1][1]["traceparent"] == f"00-{TRACE}-{resumed.span_id}-01"


async def test_a_retry_is_a_second_attempt(neuron: FakeNeuron, start: Start, collector: Collector) -> None:
    neuron.have(MODEL)
    answers = iter((True, False))

    async def answer(request: web.Request) -> web.StreamResponse:
        if next(answers):
            assert request.transport is not None
            request.transport.abort()
        return web.json_response({"choices": []})

    neuron.answer = answer
    client = await start(neuron, telemetry=telemetry(collector))
    assert (await ask(client, BODY))[0] == 200
    stale, second = by_kind(await spans_of(collector, 3), "CLIENT")
    assert stale.is_error and stale.attributes["error.type"] == "stale_route"
    assert second.attributes["http.request.resend_count"] == 1 and not second.is_error


async def test_a_cold_model_shows_what_was_waited_for_and_what_had_to_go(
    neuron: FakeNeuron, start: Start, collector: Collector
) -> None:
    neuron.have("old")
    neuron.footprints = {MODEL: 20_000, "old": 20_000}
    profiles = tuple(ModelProfile(id=model, vram_mb=20_000) for model in (MODEL, "old"))
    client = await start(neuron, catalogue=Catalogue(models=profiles), telemetry=telemetry(collector))
    assert (await ask(client, BODY))[0] == 200
    spans = await spans_of(collector, 3)
    (waiting,) = by_kind(spans, "INTERNAL")
    (server,) = by_kind(spans, "SERVER")
    assert (waiting.name, waiting.parent_id) == ("placement", server.span_id)
    assert ("load", {"cortex.node": "alpha", "cortex.evicted": ["old"]}) in waiting.events
    (attempt,) = by_kind(spans, "CLIENT")
    assert waiting.ends <= attempt.begins and server.attributes["cortex.route"] == "cold"


async def test_what_the_node_gets_wrong_is_an_error_and_what_the_client_gets_wrong_is_none(
    neuron: FakeNeuron, start: Start, collector: Collector
) -> None:
    neuron.have(MODEL)

    async def answer(request: web.Request) -> web.StreamResponse:
        return web.json_response({"error": {"message": SECRET_WORDS, "code": "boom"}}, status=500)

    neuron.answer = answer
    client = await start(neuron, telemetry=telemetry(collector))
    assert (await ask(client, BODY))[0] == 500
    server, attempt = await spans_of(collector, 2)
    assert server.is_error and server.attributes["error.type"] == "500" and attempt.is_error
    assert SECRET_WORDS.encode() not in server.raw + attempt.raw
    async with client.post(CHAT, {"model": "nobody"}) as response:
        assert response.status == 404
    (refused,) = await asyncio.to_thread(
        collector.find, lambda span: span.attributes.get("gen_ai.request.model") == "nobody"
    )
    assert not refused.is_error and refused.attributes["http.response.status_code"] == 404


async def test_a_stream_that_fails_after_its_headers_is_an_error(
    neuron: FakeNeuron, start: Start, collector: Collector
) -> None:
    neuron.have(MODEL)

    async def answer(request: web.Request) -> web.StreamResponse:
        response = await FakeNeuron.begin_stream(request)
        await response.write(OPENAI_EVENTS[0])
        assert request.transport is not None
        request.transport.abort()
        return response

    neuron.answer = answer
    client = await start(neuron, telemetry=telemetry(collector))
    assert (await ask(client, {**BODY, "stream": True}))[0] == 200
    server, attempt = await spans_of(collector, 2)
    assert server.is_error and server.attributes["error.type"] == "upstream_connection_error"
    assert attempt.is_error and attempt.attributes["error.type"] == "upstream_connection_error"


async def test_a_client_that_hangs_up_is_nobodys_error(neuron: FakeNeuron, start: Start, collector: Collector) -> None:
    neuron.have(MODEL)
    neuron.answer_gate.clear()
    client = await start(neuron, telemetry=telemetry(collector))
    async with client.post(CHAT, {**BODY, "stream": True}, headers={"traceparent": PARENT}) as response:
        await response.content.readuntil(b"\n\n")
    server, attempt = await spans_of(collector, 2)
    assert server.attributes["cortex.outcome"] == "client_gone" and not server.is_error and not attempt.is_error


async def test_a_translated_request_is_traced_too(
    openai_server: FakeOpenAI, start: Start, collector: Collector
) -> None:
    client = await start(openai_server, telemetry=telemetry(collector))
    for path, fields in (
        ("/v1/messages", {"messages": BODY["messages"], "max_tokens": 9}),
        ("/v1/messages", {"messages": BODY["messages"], "max_tokens": 9, "stream": True}),
        ("/v1/responses", {"input": "hi", "stream": True}),
    ):
        assert (await ask(client, {"model": fake_openai.MODEL, **fields}, path))[0] == 200
    spans = await spans_of(collector, 6)
    servers, attempts = by_kind(spans, "SERVER"), by_kind(spans, "CLIENT")
    assert [span.attributes["gen_ai.response.finish_reasons"] for span in servers] == [["stop"]] * 3
    assert [span.attributes["cortex.translated"] for span in servers] == ["messages->chat"] * 2 + ["responses->chat"]
    assert {span.attributes["gen_ai.provider.name"] for span in attempts} == {"openai"}
    assert [span.parent_id for span in attempts] == [span.span_id for span in servers]
    sent = [headers["traceparent"] for path, headers, _ in openai_server.requests if path.endswith("/completions")]
    assert sent == [f"00-{TRACE}-{span.span_id}-01" for span in attempts]


@pytest.mark.parametrize("value", ["", "00-nonsense", f"00-{'0' * 32}-{CALLER}-01", "00-" + "f" * 9000, "\xff\xfe"])
async def test_a_trace_that_makes_no_sense_is_replaced_by_one_that_does(
    neuron: FakeNeuron, start: Start, collector: Collector, value: str
) -> None:
    neuron.have(MODEL)
    client = await start(neuron, telemetry=telemetry(collector))
    assert (await ask(client, BODY, traceparent=value, tracestate="=,=\xff"))[0] == 200
    (server,) = await asyncio.to_thread(collector.find, lambda span: span.kind == "SERVER")
    assert server.parent_id == "" and server.state == ""
    assert neuron.requests[-1][1]["traceparent"].startswith(f"00-{server.trace_id}-")


async def test_a_trace_that_its_caller_leaves_out_is_left_out_here_and_on_the_neuron(
    neuron: FakeNeuron, start: Start, collector: Collector
) -> None:
    neuron.have(MODEL)
    client = await start(neuron, telemetry=telemetry(collector))
    assert (await ask(client, BODY, traceparent=f"00-{TRACE}-{CALLER}-00"))[0] == 200
    left_out = neuron.requests[-1][1]["traceparent"]
    assert left_out.startswith(f"00-{TRACE}-") and left_out.endswith("-00") and CALLER not in left_out
    assert (await client.chat())[0] == 200
    await asyncio.to_thread(collector.find, lambda span: span.kind == "SERVER")
    assert all(span.trace_id != TRACE for span in collector.spans)


async def test_the_ratio_is_of_the_traces_that_begin_here(
    neuron: FakeNeuron, start: Start, collector: Collector
) -> None:
    neuron.have(MODEL)
    client = await start(neuron, telemetry=telemetry(collector, sample_ratio=0.0, service_name="edge"))
    assert (await client.chat())[0] == 200
    assert (await ask(client, BODY))[0] == 200
    spans = await spans_of(collector, 2)
    assert {span.service for span in spans} == {"edge"} and len(collector.spans) == 2


async def test_control_requests_are_traced_and_probes_are_not(
    neuron: FakeNeuron, start: Start, collector: Collector
) -> None:
    client = await start(neuron, telemetry=telemetry(collector))
    for path in ("/health", "/v1/models", "/no/such/path"):
        async with client.get(path) as response:
            await response.read()
    models, unknown = await asyncio.to_thread(collector.find, lambda span: True, count=2)
    assert (models.name, models.attributes["http.response.status_code"]) == ("GET /v1/models", 200)
    assert (unknown.name, unknown.attributes["http.response.status_code"]) == ("GET", 404)
    assert "http.route" not in unknown.attributes


async def test_what_is_queued_when_the_gateway_ends_is_sent_first(
    neuron: FakeNeuron, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "3600000")
    neuron.have(MODEL)
    with Collector() as collector:
        client = await start(neuron, telemetry=telemetry(collector))
        assert (await ask(client, BODY))[0] == 200
        assert not collector.spans
        await client.started.gateway.shutdown()
        assert len(collector.spans) == 2


async def test_without_telemetry_a_trace_is_handed_on_as_it_came_and_named_in_the_line(
    neuron: FakeNeuron, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "cortex_gateway.access")
    neuron.have(MODEL)
    client = await start(neuron)
    assert (await ask(client, BODY, tracestate="vendor=1"))[0] == 200
    _, headers, _ = neuron.requests[-1]
    assert (headers["traceparent"], headers["tracestate"]) == (PARENT, "vendor=1")
    assert json.loads(caplog.records[-1].getMessage())["trace_id"] == TRACE
    async with client.get("/v1/models", headers={"traceparent": PARENT}):
        pass
    assert json.loads(caplog.records[-1].getMessage())["trace_id"] == TRACE


def test_without_telemetry_nothing_of_it_is_imported() -> None:
    code = (
        "import sys, cortex_gateway.server, cortex_gateway.relay.relay\n"
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
