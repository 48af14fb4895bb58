"""A server that speaks only OpenAI chat behind the gateway: every surface reaches it, and reads its own dialect."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from aiohttp import web
from cortex_core.catalogue import Catalogue, ModelProfile
from cortex_core.errors import ApiError
from cortex_core.gateway_config import PromptFiltersSection
from cortex_core.sse import SseDecoder, SseEvent
from cortex_gateway.surfaces import anthropic, openai
from cortex_gateway.translation.errors import UpstreamFault, refused, retry_advice, retry_seconds
from cortex_gateway.translation.translation import ThroughChat, translation_of
from hypothesis import given
from hypothesis import strategies as st

from tests.cortex_gateway.fake_neuron import FakeNeuron
from tests.cortex_gateway.fake_openai import ANSWER, EVENTS, MODEL, TOOL_EVENTS, FakeOpenAI, chunk
from tests.cortex_gateway.gateway_client import Client, Start, until

CHAT, COMPLETIONS, MESSAGES, RESPONSES = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/messages",
    "/v1/responses",
)
SURFACES = {surface.name: surface for surface in (*openai.SURFACES, *anthropic.SURFACES)}
ASKED: dict[str, dict[str, Any]] = {
    CHAT: {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]},
    COMPLETIONS: {"model": MODEL, "prompt": "hi"},
    MESSAGES: {
        "model": MODEL,
        "max_tokens": 50,
        "thinking": {"type": "adaptive"},
        "messages": [{"role": "user", "content": "hi"}],
    },
    RESPONSES: {"model": MODEL, "input": "hi", "max_output_tokens": 50},
}
TOOLS = {
    MESSAGES: [{"name": "get_weather", "input_schema": {"type": "object"}}],
    RESPONSES: [{"type": "function", "name": "get_weather", "parameters": {"type": "object"}}],
}
TRANSLATED = pytest.mark.parametrize("path", [MESSAGES, RESPONSES])


def events_of(raw: bytes) -> list[SseEvent]:
    decoder = SseDecoder()
    return [event for event in (*decoder.feed(raw), *decoder.flush()) if isinstance(event, SseEvent)]


async def ask(client: Client, path: str, **fields: Any) -> tuple[int, dict[str, str], bytes]:
    async with client.post(path, {**ASKED[path], **fields}) as response:
        return response.status, {name.lower(): value for name, value in response.headers.items()}, await response.read()


# ---------------------------------------------------------------------------------------------- what passes


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_chat_and_completions_pass_byte_for_byte(openai_server: FakeOpenAI, start: Start, path: str) -> None:
    client = await start(openai_server)
    body = b'{"model" : "%b",\t"stream":true, "strange": [1.50, "\\u00e9"] }' % MODEL.encode()
    async with client.post(path, body, headers={"x-api-key": "mine", "accept": "text/plain"}) as response:
        assert (response.status, await response.read()) == (200, b"".join(EVENTS))
        assert "x-cortex-translated" not in response.headers and "x-internal" not in response.headers
        assert response.headers["x-cortex-node"] == "other" and response.headers["cache-control"] == "no-cache"
    asked_path, headers, sent = openai_server.requests[-1]
    assert (asked_path, sent) == (path, body)
    assert headers["accept"] == "text/plain"
    assert not any(name.startswith("x-cortex") or name in ("x-api-key", "authorization") for name in headers)


async def test_an_answer_that_is_not_streamed_passes(openai_server: FakeOpenAI, start: Start) -> None:
    client = await start(openai_server)
    status, headers, body = await ask(client, CHAT)
    assert (status, json.loads(body)) == (200, ANSWER)
    assert "x-internal" not in headers


async def test_an_alias_is_another_name_in_the_same_body(openai_server: FakeOpenAI, start: Start) -> None:
    client = await start(openai_server, catalogue=Catalogue(aliases={"fast": MODEL}))
    messages = b'[ {"role":"user","content":"model fast \\"model\\": \\"fast\\""}]'
    body = b' {"stream": false, "messages" :' + messages + b', "model": "fast" }'
    async with client.post(CHAT, body) as response:
        assert response.status == 200
        assert response.headers["x-cortex-model"] == MODEL
    assert openai_server.requests[-1][2] == body.replace(b'"model": "fast" }', b'"model": "%b" }' % MODEL.encode())


async def test_credentials_are_the_gateways_and_are_shown_to_nobody(
    openai_server: FakeOpenAI, start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTHER_KEY", "sk-other")
    monkeypatch.setenv("OTHER_ORG", "org-9")
    openai_server.api_key, openai_server.headers = "env:OTHER_KEY", {"x-org": "env:OTHER_ORG"}
    openai_server.key = "sk-other"
    with caplog.at_level("DEBUG"):
        client = await start(openai_server)
        for path in (CHAT, MESSAGES):
            assert (await ask(client, path))[0] == 200
            assert openai_server.requests[-1][1]["x-org"] == "org-9"
        openai_server.key = "another"
        for path in (CHAT, MESSAGES, RESPONSES):
            status, _, body = await ask(client, path)
            assert status == 502 and b"credentials" in body and b"sk-other" not in body
        async with client.get("/admin/fleet") as response:
            assert b"sk-other" not in await response.read()
    assert "sk-other" not in caplog.text and "org-9" not in caplog.text


# ---------------------------------------------------------------------------------------------- what is translated


async def test_messages_are_translated(openai_server: FakeOpenAI, start: Start) -> None:
    client = await start(openai_server)
    status, headers, body = await ask(client, MESSAGES)
    assert (status, headers["x-cortex-translated"]) == (200, "messages->chat")
    answer = json.loads(body)
    thinking, text = answer["content"]
    assert thinking["thinking"] == "six by seven" and thinking["signature"]
    assert text == {"type": "text", "text": "42 \N{HONEYBEE}"}
    assert (answer["model"], answer["stop_reason"]) == (MODEL, "end_turn")
    assert answer["usage"]["input_tokens"] == 8 and answer["usage"]["cache_read_input_tokens"] == 3
    sent = openai_server.last_body
    assert openai_server.requests[-1][0] == CHAT
    assert (sent["model"], sent["stream"], sent["max_tokens"]) == (MODEL, True, 50)
    assert sent["messages"] == [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("said", "reason", "sequence"),
    [
        ({"stop_reason": "END"}, "stop_sequence", "END"),
        ({"matched_stop": "END"}, "stop_sequence", "END"),
        ({"matched_stop": 151645}, "end_turn", None),
        ({}, "end_turn", None),
    ],
)
async def test_the_stop_sequence_of_a_message_is_told_where_the_server_tells(
    openai_server: FakeOpenAI, start: Start, stream: bool, said: dict[str, Any], reason: str, sequence: str | None
) -> None:
    last = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop", **said}]}
    openai_server.events = [*EVENTS[:6], b"data: " + json.dumps(last).encode() + b"\n\n", *EVENTS[7:]]
    client = await start(openai_server)
    status, _, raw = await ask(client, MESSAGES, stream=stream, stop_sequences=["never", "END"])
    assert status == 200 and openai_server.last_body["stop"] == ["never", "END"]
    if stream:
        events = [json.loads(event.data) for event in events_of(raw)]
        ending = next(event["delta"] for event in events if event["type"] == "message_delta")
    else:
        ending = json.loads(raw)
    assert (ending["stop_reason"], ending["stop_sequence"]) == (reason, sequence)


async def test_responses_are_translated(openai_server: FakeOpenAI, start: Start) -> None:
    client = await start(openai_server)
    status, headers, body = await ask(client, RESPONSES)
    assert (status, headers["x-cortex-translated"]) == (200, "responses->chat")
    answer = json.loads(body)
    assert [item["type"] for item in answer["output"]] == ["reasoning", "message"]
    assert answer["output"][1]["content"][0]["text"] == "42 \N{HONEYBEE}"
    assert answer["status"] == "completed" and answer["usage"]["input_tokens"] == 11


@TRANSLATED
async def test_a_stream_says_what_the_whole_answer_says(openai_server: FakeOpenAI, start: Start, path: str) -> None:
    client = await start(openai_server)
    _, _, whole = await ask(client, path)
    status, headers, raw = await ask(client, path, stream=True)
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    assert headers["x-cortex-translated"].endswith("->chat")
    events = [json.loads(event.data) for event in events_of(raw)]
    if path == RESPONSES:
        assert events[-1]["type"] == "response.completed"
        streamed, expected = events[-1]["response"], json.loads(whole)
        assert [item["type"] for item in streamed["output"]] == [item["type"] for item in expected["output"]]
        assert streamed["output"][1]["content"] == expected["output"][1]["content"]
        assert streamed["usage"] == expected["usage"]
    else:
        assert events[-1] == {"type": "message_stop"} and events[0]["type"] == "message_start"
        text = "".join(event["delta"].get("text", "") for event in events if event["type"] == "content_block_delta")
        assert text == "42 \N{HONEYBEE}"
        assert events[-2]["usage"] == json.loads(whole)["usage"]


@TRANSLATED
@pytest.mark.parametrize("stream", [True, False])
async def test_tool_calls_are_translated(openai_server: FakeOpenAI, start: Start, path: str, stream: bool) -> None:
    openai_server.events = TOOL_EVENTS
    client = await start(openai_server)
    status, _, raw = await ask(client, path, stream=stream, tools=TOOLS[path])
    assert status == 200
    sent = openai_server.last_body["tools"]
    assert [tool["function"]["name"] for tool in sent] == ["get_weather"]
    if path == RESPONSES:
        answer = json.loads(events_of(raw)[-1].data)["response"] if stream else json.loads(raw)
        calls = [item for item in answer["output"] if item["type"] == "function_call"]
        assert [call["arguments"] for call in calls] == ['{"city": "Oslo"}', '{"city": "Rome"}']
        assert [call["call_id"] for call in calls] == ["call_a1", "call_b2"]
    elif stream:
        events = [json.loads(event.data) for event in events_of(raw)]
        starts = [event["content_block"] for event in events if event["type"] == "content_block_start"]
        assert [block["type"] for block in starts] == ["text", "tool_use", "tool_use"]
        inputs: dict[int, str] = {}
        for event in events:
            if event["type"] == "content_block_delta" and event["delta"]["type"] == "input_json_delta":
                inputs[event["index"]] = inputs.get(event["index"], "") + event["delta"]["partial_json"]
        assert [json.loads(text) for text in inputs.values()] == [{"city": "Oslo"}, {"city": "Rome"}]
        assert events[-2]["delta"]["stop_reason"] == "tool_use"
    else:
        answer = json.loads(raw)
        assert [block.get("input") for block in answer["content"]] == [None, {"city": "Oslo"}, {"city": "Rome"}]
        assert answer["stop_reason"] == "tool_use"


@TRANSLATED
@pytest.mark.parametrize("stream", [True, False])
async def test_a_server_that_does_not_stream_is_understood(
    openai_server: FakeOpenAI, start: Start, path: str, stream: bool
) -> None:
    openai_server.can_stream = False
    client = await start(openai_server)
    status, _, raw = await ask(client, path, stream=stream)
    assert status == 200 and "42 \N{HONEYBEE}" in raw.decode()
    if stream:
        assert events_of(raw)[-1].event in ("message_stop", "response.completed")


async def test_an_alias_is_what_the_client_reads_and_the_servers_own_name_what_it_gets(
    openai_server: FakeOpenAI, start: Start
) -> None:
    client = await start(openai_server, catalogue=Catalogue(aliases={"fast": MODEL}))
    _, _, body = await ask(client, MESSAGES, model="fast")
    assert json.loads(body)["model"] == "fast"
    assert openai_server.last_body["model"] == MODEL


async def test_the_attribution_line_is_dropped_unless_told_otherwise(openai_server: FakeOpenAI, start: Start) -> None:
    system = [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=1;"},
        {"type": "text", "text": "Be brief."},
    ]
    for filters, expected in (
        ({}, "Be brief."),
        ({"claude_code_attribution": False}, "x-anthropic-billing-header: cc_version=1;\nBe brief."),
    ):
        client = await start(openai_server, prompt_filters=filters)
        assert (await ask(client, MESSAGES, system=system))[0] == 200
        assert openai_server.last_body["messages"][0] == {"role": "system", "content": expected}
        line = json.loads(client.started.gateway.access_log.last(1)[0])
        assert line["translated"] == "messages->chat"
        assert line.get("dropped") == (["claude_code_attribution"] if not filters else None)


async def test_a_server_that_knows_no_extensions_is_sent_none(openai_server: FakeOpenAI, start: Start) -> None:
    openai_server.extensions = False
    client = await start(openai_server)
    status, _, raw = await ask(client, MESSAGES, top_k=5)
    assert status == 400 and "top_k" in raw.decode() and openai_server.requests == []
    assert (await ask(client, MESSAGES))[0] == 200
    assert "chat_template_kwargs" not in openai_server.last_body
    assert (await ask(client, CHAT, top_k=5))[0] == 200
    assert openai_server.last_body["top_k"] == 5


# ---------------------------------------------------------------------------------------------- counting


@pytest.mark.parametrize(
    ("path", "body", "key"),
    [
        (
            "/v1/messages/count_tokens",
            {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]},
            "input_tokens",
        ),
        ("/v1/responses/input_tokens", {"model": MODEL, "input": "hi"}, "input_tokens"),
    ],
)
async def test_tokens_are_counted_where_the_server_can(
    openai_server: FakeOpenAI, start: Start, path: str, body: dict[str, Any], key: str
) -> None:
    client = await start(openai_server)
    async with client.post(path, body) as response:
        assert response.status == 400
        assert "no /tokenize" in await response.text()
    openai_server.count = 17
    async with client.post(path, body) as response:
        assert response.status == 200
        assert json.loads(await response.read())[key] == 17
        assert response.headers["x-cortex-translated"].endswith("->tokenize")
    assert openai_server.last_body["messages"] == [{"role": "user", "content": "hi"}]


# ---------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("status", "document", "headers", "expected"),
    [
        (400, {"error": {"message": "no such thing", "param": "top_k"}}, {}, (400, "invalid_request_error", None)),
        (404, {"error": {"message": "gone", "code": 404}}, {}, (404, "not_found_error", None)),
        (422, {"detail": "wrong"}, {}, (400, "invalid_request_error", None)),
        (429, {"error": {"message": "slow down"}}, {"retry-after": "6.2"}, (429, "rate_limit_error", "7")),
        (429, {"error": {"message": "slow down"}}, {}, (429, "rate_limit_error", "2")),
        (401, {"error": {"message": "Incorrect API key"}}, {}, (502, "api_error", None)),
        (402, {"error": {"message": "pay"}}, {}, (502, "api_error", None)),
        (500, "<html>", {}, (500, "api_error", None)),
        (502, "<html>", {}, (502, "api_error", "2")),
        (503, {"error": "loading"}, {}, (529, "overloaded_error", "2")),
        (418, "tea", {}, (502, "api_error", "2")),
    ],
)
async def test_an_error_status_is_a_typed_error_of_the_callers_dialect(
    openai_server: FakeOpenAI, start: Start, status: int, document: Any, headers: dict[str, str], expected: Any
) -> None:
    openai_server.refusal = (status, document, headers)
    client = await start(openai_server)
    for stream in (False, True):
        code, got, raw = await ask(client, MESSAGES, stream=stream)
        body = json.loads(raw)
        assert (code, body["error"]["type"], got.get("retry-after")) == expected, body
        assert body["type"] == "error" and got["x-cortex-node"] == "other"
    for path in (CHAT, RESPONSES):
        code, got, raw = await ask(client, path)
        assert code == (503 if status == 503 else expected[0])
        assert set(json.loads(raw)["error"]) >= {"message", "type", "param", "code"}
        assert got.get("retry-after") == expected[2]


async def test_a_prompt_that_is_too_long_is_said_in_the_words_agents_know(
    openai_server: FakeOpenAI, start: Start
) -> None:
    message = "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens in the messages."
    openai_server.refusal = (400, {"object": "error", "message": message, "code": 400}, {})
    client = await start(openai_server)
    _, _, raw = await ask(client, MESSAGES)
    assert json.loads(raw)["error"]["message"] == "prompt is too long: 5000 tokens > 4096 maximum"
    _, _, raw = await ask(client, RESPONSES)
    assert (json.loads(raw)["error"]["code"], json.loads(raw)["error"]["param"]) == ("context_length_exceeded", "input")


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        (MESSAGES, {"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]}, "document"),
        (RESPONSES, {"previous_response_id": "resp_1"}, "previous_response_id"),
        (MESSAGES, {"max_tokens": "many"}, "max_tokens"),
    ],
)
async def test_what_cannot_be_carried_is_refused_by_name_and_nothing_is_sent(
    openai_server: FakeOpenAI, start: Start, path: str, body: dict[str, Any], named: str
) -> None:
    client = await start(openai_server)
    status, _, raw = await ask(client, path, **body)
    assert status == 400 and named in raw.decode()
    assert openai_server.requests == []
    assert client.started.gateway.fleet.activity.total_in_flight() == 0


@TRANSLATED
async def test_an_error_before_the_first_event_is_a_status(openai_server: FakeOpenAI, start: Start, path: str) -> None:
    openai_server.events = [chunk({"role": "assistant"}), b'data: {"error": {"message": "out of memory"}}\n\n']
    client = await start(openai_server)
    for stream in (True, False):
        status, _, raw = await ask(client, path, stream=stream)
        assert status == 500 and "out of memory" in raw.decode()


@TRANSLATED
@pytest.mark.parametrize("end", [b'data: {"error": {"message": "out of memory"}}\n\n', b"", EVENTS[5].rstrip()])
async def test_a_stream_that_breaks_off_ends_in_an_error_event(
    openai_server: FakeOpenAI, start: Start, path: str, end: bytes
) -> None:
    openai_server.events = [*EVENTS[:4], end]
    client = await start(openai_server)
    status, _, raw = await ask(client, path, stream=True)
    events = events_of(raw)
    assert status == 200
    last = json.loads(events[-1].data)
    is_error = b"error" in end
    message = "out of memory" if is_error else "ended before"
    if path == RESPONSES:
        assert events[-1].event == "response.failed"
        assert message in last["response"]["error"]["message"]
        numbers = [json.loads(event.data)["sequence_number"] for event in events]
        assert numbers == list(range(len(events)))
    else:
        assert events[-1].event == "error" and message in last["error"]["message"]
    status, headers, _ = await ask(client, path)
    assert status == (500 if is_error else 502)
    assert headers.get("retry-after") == (None if is_error else "1")


async def test_a_connection_that_breaks_is_a_retryable_error(openai_server: FakeOpenAI, start: Start) -> None:
    async def broken(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(EVENTS[3])
        assert request.transport is not None
        request.transport.abort()
        return response

    openai_server.answer = broken
    client = await start(openai_server)
    status, headers, _ = await ask(client, MESSAGES)
    assert (status, headers["retry-after"]) == (502, "1")
    _, _, raw = await ask(client, MESSAGES, stream=True)
    assert events_of(raw)[-1].event == "error"


# ---------------------------------------------------------------------------------------------- streams in time


@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_hangs_up_ends_the_request_there(
    openai_server: FakeOpenAI, start: Start, path: str, stream: bool
) -> None:
    openai_server.gate.clear()
    client = await start(openai_server)
    asked = asyncio.create_task(ask(client, path, stream=stream))
    async with asyncio.timeout(20):
        await openai_server.request_arrived.wait()
        asked.cancel()
        await openai_server.request_aborted.wait()
        await client.started.gateway.relay.wait_idle()
    assert client.started.gateway.fleet.activity.total_in_flight() == 0


@pytest.mark.parametrize(
    ("path", "ping"), [(CHAT, b": ping\n\n"), (MESSAGES, b"event: ping\n"), (RESPONSES, b": ping")]
)
@pytest.mark.parametrize("hold_before", [0, 5])
async def test_a_server_that_is_silent_does_not_leave_the_client_in_silence(
    openai_server: FakeOpenAI, start: Start, path: str, ping: bytes, hold_before: int
) -> None:
    openai_server.hold_before = hold_before
    openai_server.gate.clear()
    client = await start(openai_server, gateway={"stream_hold_s": 0.05, "ping_interval_s": 0.05})
    raw = b""
    async with client.post(path, {**ASKED[path], "stream": True}) as response:
        while raw.count(ping) < 2:
            raw += await response.content.readany()
        openai_server.gate.set()
        raw += await response.read()
    if path == CHAT:
        assert raw.replace(ping, b"") == b"".join(EVENTS)
    else:
        assert events_of(raw)[-1].event in ("message_stop", "response.completed")


async def test_a_broken_stream_never_goes_on_there(neuron: FakeNeuron, openai_server: FakeOpenAI, start: Start) -> None:
    """A neuron's stream can only be continued by a neuron: another server knows nothing of token ids."""
    neuron.have(MODEL)

    async def broken(request: web.Request) -> web.StreamResponse:
        response = await FakeNeuron.begin_stream(request)
        head = b': cortex-stream {"id":"chatcmpl-1","created":5,"seeds":[7]}\n\n'
        await response.write(head + b"data: 1\n\n\n: cortex-tokens [[0,[1]]]\n\n")
        neuron.answer = whole
        assert request.transport is not None
        request.transport.abort()
        return response

    async def whole(request: web.Request) -> web.StreamResponse:
        assert "x-cortex-resume" in request.headers
        response = await FakeNeuron.begin_stream(request)
        await response.write(b': cortex-stream {"id":"chatcmpl-1","created":5,"seeds":[7]}\n\ndata: 2\n\n')
        await response.write_eof()
        return response

    neuron.answer = broken
    client = await start(neuron, openai_server)
    openai_server.health_status = 503
    assert await client.started.gateway._poller.refresh("other")
    openai_server.health_status = None
    async with client.post(CHAT, {**ASKED[CHAT], "stream": True}) as response:
        assert await client.started.gateway._poller.refresh("other")
        assert await response.read() == b"data: 1\n\ndata: 2\n\n"
    assert openai_server.requests == []


# ---------------------------------------------------------------------------------------------- the fleet


async def test_what_such_a_server_lists_is_listed(openai_server: FakeOpenAI, start: Start) -> None:
    openai_server.models = [
        {"id": MODEL, "created": 5, "max_model_len": 4096},
        {"id": "vision", "modalities": ["text", "vision"], "tool_call": False, "reasoning": True, "created": None},
        {"id": "elsewhere", "loaded": False},
    ]
    client = await start(openai_server)
    async with client.get("/v1/models") as response:
        listed = {model["id"]: model for model in json.loads(await response.read())["data"]}
    assert set(listed) == {MODEL, "vision"}
    assert listed[MODEL]["loaded"] and listed[MODEL]["max_model_len"] == 4096 and listed[MODEL]["tool_call"]
    assert listed["vision"]["modalities"] == ["text", "vision"] and not listed["vision"]["tool_call"]
    assert listed[MODEL]["locations"] == [{"node": "other", "status": "loaded"}]


@pytest.mark.parametrize("call", ["load", "unload", "pin", "unpin"])
async def test_nothing_is_loaded_unloaded_or_pinned_there(openai_server: FakeOpenAI, start: Start, call: str) -> None:
    client = await start(openai_server)
    async with client.post(f"/admin/models/{call}", {"model": MODEL, "node": "other"}) as response:
        body = json.loads(await response.read())
        assert response.status == 400 and body["error"]["code"] == "node_not_managed"


async def test_a_server_that_is_not_well_gets_no_requests(openai_server: FakeOpenAI, start: Start) -> None:
    openai_server.health_status = 503
    client = await start(openai_server)
    status, headers, _ = await ask(client, CHAT)
    assert status == 503 and headers["retry-after"]
    openai_server.health_status = 200
    assert await client.started.gateway._poller.refresh("other")
    assert (await ask(client, CHAT))[0] == 200


async def test_a_model_it_no_longer_has_is_looked_for_again(
    openai_server: FakeOpenAI, neuron: FakeNeuron, start: Start
) -> None:
    client = await start(openai_server, neuron)
    neuron.have(MODEL)
    openai_server.models = []
    openai_server.refusal = (404, {"error": {"message": "gone", "code": "model_not_found"}}, {})
    await client.started.gateway._poller.refresh("alpha")
    async with client.post(MESSAGES, ASKED[MESSAGES]) as response:
        assert response.status == 200
        assert response.headers["x-cortex-node"] == "alpha" and "x-cortex-translated" not in response.headers


async def test_it_is_no_place_for_a_cold_model(openai_server: FakeOpenAI, neuron: FakeNeuron, start: Start) -> None:
    """Its unknown hardware is no hardware, though a neuron without devices serves from its CPU."""
    catalogue = Catalogue(models=(ModelProfile(id="org/cold", vram_mb=1000),))
    client = await start(openai_server, neuron, catalogue=catalogue)
    await until(lambda: client.started.gateway.fleet.snapshot.nodes["alpha"].is_routable, client)
    status, _, _ = await ask(client, CHAT, model="org/cold")
    assert status == 200 and neuron.count("POST /models/load") == 1
    assert openai_server.requests == []


# ---------------------------------------------------------------------------------------------- any chunking


def translated(path: str, pieces: list[bytes]) -> bytes:
    surface = SURFACES["messages" if path == MESSAGES else "responses"]
    body = json.dumps({**ASKED[path], "tools": TOOLS[path], "stream": True}).encode()
    translation = translation_of(surface, body, MODEL, PromptFiltersSection())
    assert isinstance(translation, ThroughChat)
    stream = translation.stream(is_events=True)
    stream._projector = translation._dialect.Projector(translation.request, response_id="x", created=1, model=MODEL)
    out = b""
    try:
        for piece in pieces:
            out += stream.feed(piece)
        out += stream.flush()
    except UpstreamFault as fault:
        out += stream.fail(fault.error)
    return out


@TRANSLATED
@given(data=st.data())
def test_any_chunking_of_the_stream_gives_the_same_events(path: str, data: st.DataObject) -> None:
    events = data.draw(
        st.sampled_from(
            [
                EVENTS,
                TOOL_EVENTS,
                EVENTS[:5],
                [*EVENTS[:3], EVENTS[3][:-2]],
                [*TOOL_EVENTS[:4], b'data: {"error":"x"}\n\n'],
            ]
        )
    )
    raw = b"".join(events)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=12)))
    pieces = [raw[start:end] for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    decoded = [without_time(event) for event in events_of(translated(path, [raw]))]
    assert [without_time(event) for event in events_of(translated(path, pieces))] == decoded
    assert decoded


def without_time(event: SseEvent) -> Any:
    document = json.loads(event.data)
    if isinstance(document.get("response"), dict):
        document["response"]["completed_at"] = None
    return event.event, document


def test_the_reading_of_retry_after() -> None:
    assert [
        retry_seconds(value) for value in (None, "3", "2.1", "-1", "soon", "inf", "Wed, 21 Oct 2015 07:28:00 GMT")
    ] == [
        None,
        3,
        3,
        0,
        None,
        None,
        0,
    ]
    assert retry_seconds("1e9") == 3600


def test_H11_a_date_in_retry_after_counts_from_the_date_of_the_answer() -> None:
    """Whatever our own clock says: the server may live in another hour."""
    dates = {"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT", "date": "Wed, 21 Oct 2015 07:27:30 GMT"}
    assert retry_seconds(retry_advice(dates)) == 30
    assert retry_seconds(retry_advice({**dates, "date": "yesterday"})) == 0
    assert retry_seconds(retry_advice({"retry-after": "7", "date": dates["date"]})) == 7
    assert retry_advice({"date": dates["date"]}) is None


def test_a_spent_quota_is_not_worth_a_retry() -> None:
    error = refused(429, b'{"error": {"message": "spent", "code": "insufficient_quota"}}', None)
    assert isinstance(error, ApiError) and error.retry_after is None
