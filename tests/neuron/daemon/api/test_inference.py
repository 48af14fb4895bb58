"""The request path of every dialect, over a real socket and a scripted engine."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from cortex_core.sse import SseDecoder, SseEvent

from tests.neuron.daemon.api.harness import RunningNeuron, run_neuron
from tests.neuron.scripted_engine import eventually, scripted_with
from tests.neuron.scripted_worker import DIE, HOLD, REFUSE, SILENT

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT, COMPLETIONS, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/messages"


def events_of(body: bytes) -> list[SseEvent]:
    decoder = SseDecoder()
    return [event for event in decoder.feed(body) if isinstance(event, SseEvent)]


def text_of(body: bytes) -> str:
    chunks = [json.loads(event.data) for event in events_of(body) if event.data != "[DONE]"]
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


def body_for(neuron: RunningNeuron, path: str, **settings: Any) -> dict[str, Any]:
    if path == COMPLETIONS:
        return {"model": neuron.model, "prompt": "hi", "max_tokens": 3, **settings}
    return neuron.chat(**settings)


def spelled(neuron: RunningNeuron, token_ids: list[int]) -> str:
    assert neuron.served.text is not None
    return b"".join(map(neuron.served.text.tokens.token_bytes, token_ids)).decode("utf-8", "replace")


async def test_chat_answers_and_bills(neuron: RunningNeuron) -> None:
    status, headers, body = await neuron.post(CHAT, neuron.chat(max_tokens=4))
    answer = json.loads(body)
    assert status == 200, answer
    expected = spelled(neuron, [100, 101, 102, 103])
    assert answer["choices"][0]["message"]["content"].strip() == expected.strip()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 4
    assert answer["model"] == neuron.model
    assert headers["x-request-id"] == headers["request-id"]
    assert re.fullmatch(r"req_[0-9a-f]+", headers["x-request-id"])


async def test_a_stream_says_the_same_as_the_whole(neuron: RunningNeuron) -> None:
    _, _, whole = await neuron.post(CHAT, neuron.chat(max_tokens=20))
    status, headers, body = await neuron.post(CHAT, neuron.chat(max_tokens=20, stream=True))
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    assert text_of(body) == json.loads(whole)["choices"][0]["message"]["content"]
    assert body.endswith(b"data: [DONE]\n\n") and b"usage" not in body


async def test_messages_stream_in_their_own_events(neuron: RunningNeuron) -> None:
    status, _, body = await neuron.post(MESSAGES, neuron.chat(stream=True))
    names = [event.event for event in events_of(body)]
    assert status == 200 and names[0] == "message_start" and names[-2:] == ["message_delta", "message_stop"]


async def test_choices_have_their_own_index_and_one_prompt(neuron: RunningNeuron) -> None:
    _, _, one = await neuron.post(CHAT, neuron.chat())
    status, _, body = await neuron.post(CHAT, neuron.chat(n=3))
    answer = json.loads(body)
    assert status == 200 and [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    usage = answer["usage"]
    assert usage["completion_tokens"] == 9 and usage["prompt_tokens"] == json.loads(one)["usage"]["prompt_tokens"]


async def test_several_prompts_are_several_choices(neuron: RunningNeuron) -> None:
    status, _, body = await neuron.post(COMPLETIONS, body_for(neuron, COMPLETIONS, prompt=["a", "b"]))
    assert status == 200, body
    assert [choice["index"] for choice in json.loads(body)["choices"]] == [0, 1]


async def test_a_stop_string_ends_the_sequence_in_the_engine(neuron: RunningNeuron) -> None:
    stop = spelled(neuron, [104]).strip()
    status, _, body = await neuron.post(COMPLETIONS, body_for(neuron, COMPLETIONS, max_tokens=3000, stop=[stop]))
    answer = json.loads(body)
    assert status == 200 and answer["choices"][0]["finish_reason"] == "stop"
    assert stop not in answer["choices"][0]["text"]
    assert answer["usage"]["completion_tokens"] < 3000
    await eventually(lambda: neuron.served.stats.running == 0)


async def test_asking_for_nothing_still_computes_the_prompt(neuron: RunningNeuron) -> None:
    request = body_for(neuron, COMPLETIONS, max_tokens=0, echo=True, prompt="hello")
    status, _, body = await neuron.post(COMPLETIONS, request)
    answer = json.loads(body)
    assert status == 200, answer
    assert answer["choices"][0]["text"] == "hello" and answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, MESSAGES])
async def test_a_gateway_gets_usage_in_a_comment(neuron: RunningNeuron, path: str) -> None:
    request = body_for(neuron, path, stream=True)
    _, _, plain = await neuron.post(path, request)
    _, headers, body = await neuron.post(path, request, {"x-cortex-hop": "1", "x-request-id": "req_abc"})
    found = re.search(rb": cortex-usage (\{[^\n]*\})\n\n", body)
    assert found and b"cortex-usage" not in plain
    assert json.loads(found[1])["completion_tokens"] == 3
    terminal = b"event: message_stop" if path == MESSAGES else b"data: [DONE]"
    assert body[found.end() :].startswith(terminal)
    assert headers["x-request-id"] == "req_abc"


async def test_the_resolved_model_serves_and_the_asked_name_returns(neuron: RunningNeuron) -> None:
    headers = {"x-cortex-resolved-model": neuron.model}
    status, _, body = await neuron.post(CHAT, neuron.chat(model="claude-alias"), headers)
    assert status == 200 and json.loads(body)["model"] == "claude-alias"


@pytest.mark.parametrize("stream", [False, True])
async def test_an_error_before_the_first_token_is_an_http_error(neuron: RunningNeuron, stream: bool) -> None:
    for changes, expected in (
        ({"model": "nobody/here"}, 404),
        ({"top_k": REFUSE}, 400),
        ({"messages": [{"role": "user", "content": "word " * 9000}]}, 400),
    ):
        status, headers, body = await neuron.post(CHAT, neuron.chat(stream=stream, **changes))
        assert status == expected and headers["content-type"] == "application/json"
        assert json.loads(body)["error"]["type"] == "invalid_request_error"


async def test_an_over_long_prompt_says_so_in_the_words_clients_parse(neuron: RunningNeuron) -> None:
    long = [{"role": "user", "content": "word " * 9000}]
    _, _, body = await neuron.post(MESSAGES, neuron.chat(messages=long))
    assert re.fullmatch(r"prompt is too long: \d+ tokens > 4096 maximum", json.loads(body)["error"]["message"])
    _, _, body = await neuron.post(CHAT, neuron.chat(messages=long))
    assert json.loads(body)["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, MESSAGES])
async def test_a_request_that_kills_its_engine_is_an_error_for_good(neuron: RunningNeuron, path: str) -> None:
    got, headers, body = await neuron.post(path, body_for(neuron, path, top_k=DIE))
    assert got == 400 and "retry-after" not in headers and b"its end was" in body, body
    assert (await neuron.post(path, body_for(neuron, path)))[0] == 200  # it waits for the engine
    assert neuron.served.state.phase == "loaded" and neuron.served.admission.in_flight == 0


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, MESSAGES])
@pytest.mark.parametrize("stream", [False, True])
async def test_an_engine_that_dies_costs_its_requests_nothing(neuron: RunningNeuron, path: str, stream: bool) -> None:
    request = body_for(neuron, path, stream=stream, max_tokens=3000)
    _, _, undisturbed = await neuron.post(path, request)
    before = neuron.served.group.num_restarts
    asking = asyncio.create_task(neuron.post(path, request))
    await eventually(lambda: 0 < max_output(neuron) < 3000)
    os.kill(neuron.served.group.pids[0], signal.SIGKILL)
    status, _, body = await asking
    assert status == 200 and neuron.served.group.num_restarts == before + 1
    assert said(path, body, stream) == said(path, undisturbed, stream)
    assert neuron.served.admission.in_flight == 0 and neuron.served.group.num_live == 0


def max_output(neuron: RunningNeuron) -> int:
    return max((len(sequence.output_ids) for sequence in neuron.served.group._in_engine.values()), default=0)


def said(path: str, body: bytes, stream: bool) -> tuple[str, str]:
    """The text of an answer, and how it ended."""
    chunks = [json.loads(event.data) for event in events_of(body) if event.data != "[DONE]"] if stream else []
    if path == MESSAGES:
        if not stream:
            answer = json.loads(body)
            return answer["content"][0]["text"], answer["stop_reason"]
        text = "".join(chunk["delta"].get("text", "") for chunk in chunks if chunk["type"] == "content_block_delta")
        (reason,) = (chunk["delta"]["stop_reason"] for chunk in chunks if chunk["type"] == "message_delta")
        return text, reason
    if not stream:
        (choice,) = json.loads(body)["choices"]
        return choice["text"] if path == COMPLETIONS else choice["message"]["content"], choice["finish_reason"]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    text = "".join(
        choice.get("text") or "" if path == COMPLETIONS else choice["delta"].get("content") or "" for choice in choices
    )
    (reason,) = (choice["finish_reason"] for choice in choices if choice["finish_reason"])
    return text, reason


@pytest.mark.parametrize(("path", "ping"), [(CHAT, b": ping\n\n"), (MESSAGES, b"event: ping\n")])
async def test_a_stream_that_waits_for_its_engine_is_kept_alive(
    checkpoint: Path, tmp_path: Path, path: str, ping: bytes
) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    command = scripted_with("--gate", str(gate))
    async with run_neuron(checkpoint, load=False, command=command, stream_hold_s=0.05, ping_interval_s=0.05) as neuron:
        loading = asyncio.create_task(neuron.post("/models/load", {"model_id": neuron.model}))
        await asyncio.to_thread(gate.write_text, "go")
        assert (await loading)[0] == 200
        os.kill(neuron.served.group.pids[0], signal.SIGKILL)
        await eventually(lambda: neuron.served.state.phase == "recovering")
        request = json.dumps(neuron.chat(stream=True))
        async with neuron.client.post(neuron.url + path, data=request) as response:
            assert response.status == 200
            body = b""
            while body.count(ping) < 2:
                body += await response.content.readany()
            await asyncio.to_thread(gate.write_text, "go")
            body += await response.read()
        assert said(path, body, True)[0]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("script", [HOLD, SILENT])
async def test_a_client_that_hangs_up_stops_its_generation(neuron: RunningNeuron, stream: bool, script: int) -> None:
    asking = asyncio.create_task(
        neuron.post(CHAT, neuron.chat(stream=stream, top_k=script, max_tokens=50)),
    )
    await eventually(lambda: neuron.served.group.num_live == 1 and neuron.served.stats.running == 1)
    asking.cancel()
    await eventually(lambda: neuron.served.stats.running == 0)
    await eventually(lambda: neuron.served.admission.in_flight == 0)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_hangs_up_in_the_queue_leaves_it(checkpoint: Path, stream: bool) -> None:
    async with run_neuron(checkpoint, stream_hold_s=0.0, ping_interval_s=0.05) as neuron:
        neuron.served.admission.max_in_flight = 1
        first = asyncio.create_task(neuron.post(CHAT, neuron.chat(top_k=HOLD, max_tokens=50)))
        await eventually(lambda: neuron.served.admission.in_flight == 1)
        second = asyncio.create_task(neuron.post(CHAT, neuron.chat(stream=stream)))
        await eventually(lambda: neuron.served.admission.queue_depth == 1)
        second.cancel()
        await eventually(lambda: neuron.served.admission.queue_depth == 0)
        first.cancel()
        await eventually(lambda: neuron.served.admission.in_flight == 0)


@pytest.mark.parametrize(("path", "ping"), [(CHAT, b": ping\n\n"), (MESSAGES, b"event: ping\n")])
async def test_F30_a_silent_stream_is_kept_alive(checkpoint: Path, path: str, ping: bytes) -> None:
    async with run_neuron(checkpoint, stream_hold_s=0.05, ping_interval_s=0.05) as neuron:
        request = json.dumps(neuron.chat(stream=True, top_k=SILENT))
        async with neuron.client.post(neuron.url + path, data=request) as response:
            assert response.status == 200
            body = b""
            while body.count(ping) < 2:
                body += await response.content.readany()
        first = events_of(body)[0]
        assert first.event == "message_start" if path == MESSAGES else "role" in first.data


async def test_a_queued_stream_is_kept_alive_and_then_answered(checkpoint: Path) -> None:
    async with run_neuron(checkpoint, stream_hold_s=0.02, ping_interval_s=0.02) as neuron:
        neuron.served.admission.max_in_flight = 1
        first = asyncio.create_task(neuron.post(CHAT, neuron.chat(top_k=HOLD, max_tokens=50)))
        await eventually(lambda: neuron.served.admission.in_flight == 1)
        async with neuron.client.post(neuron.url + CHAT, data=json.dumps(neuron.chat(stream=True))) as response:
            body = b""
            while b": ping" not in body:
                body += await response.content.readany()
            first.cancel()
            body += await response.read()
        assert body.endswith(b"data: [DONE]\n\n") and text_of(body)


async def test_a_full_queue_is_a_429_in_time(neuron: RunningNeuron, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neuron.served.admission, "max_in_flight", 1)
    monkeypatch.setattr(neuron.served.admission, "max_queue_depth", 0)
    first = asyncio.create_task(neuron.post(CHAT, neuron.chat(top_k=HOLD, max_tokens=50)))
    await eventually(lambda: neuron.served.admission.in_flight == 1)
    for path in (CHAT, MESSAGES):
        status, headers, body = await neuron.post(path, neuron.chat(stream=True))
        assert status == 429 and int(headers["retry-after"]) >= 1
        assert json.loads(body)["error"]["type"] == "rate_limit_error"
    first.cancel()
    await eventually(lambda: neuron.served.admission.in_flight == 0)


async def test_tokens_are_sent_as_they_come(neuron: RunningNeuron) -> None:
    request = json.dumps(neuron.chat(stream=True, top_k=HOLD, max_tokens=50))
    async with neuron.client.post(neuron.url + CHAT, data=request) as response:
        body = b""
        while not text_of(body):  # the engine will say no more: what it said must arrive nevertheless
            body += await response.content.readany()
    await eventually(lambda: neuron.served.admission.in_flight == 0)


async def test_counting_equals_billing(neuron: RunningNeuron) -> None:
    tools = [{"name": "get_weather", "description": "d", "input_schema": {"type": "object", "properties": {}}}]
    for changes in ({}, {"system": "Be brief."}, {"tools": tools}):
        request = neuron.chat("How is the weather?", **changes)
        _, _, counted = await neuron.post(MESSAGES + "/count_tokens", request)
        _, _, billed = await neuron.post(MESSAGES, request)
        assert json.loads(counted)["input_tokens"] == json.loads(billed)["usage"]["input_tokens"]


async def test_tokenize_and_detokenize_are_inverse(neuron: RunningNeuron) -> None:
    _, _, body = await neuron.post(
        "/tokenize", {"model": neuron.model, "prompt": "Grüße, 世界", "return_token_strs": True}
    )
    answer = json.loads(body)
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"]) and answer["max_model_len"] == 4096
    _, _, body = await neuron.post("/detokenize", {"model": neuron.model, "tokens": answer["tokens"]})
    assert json.loads(body)["prompt"] == "Grüße, 世界"
    _, _, body = await neuron.post("/tokenize", neuron.chat("hi"))
    _, _, counted = await neuron.post(MESSAGES + "/count_tokens", neuron.chat("hi"))
    assert json.loads(body)["count"] == json.loads(counted)["input_tokens"]


async def test_one_log_line_tells_how_each_request_ended(
    neuron: RunningNeuron, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="neuron.request"):
        await neuron.post(CHAT, neuron.chat(), {"x-request-id": "req_1"})
        await neuron.post(CHAT, neuron.chat(model="x\ny/z"), {"x-request-id": "req_2"})
        await neuron.post(MESSAGES, neuron.chat(top_k=REFUSE, stream=True), {"x-request-id": "req_3"})
    said = [entry.message for entry in caplog.records if entry.name == "neuron.request"]
    lines = {re.search(r"req_id=(\S+)", line)[1]: line for line in said}
    assert len(said) == 3
    assert "chat_completion: done" in lines["req_1"] and "completion_tokens=3" in lines["req_1"]
    assert "outcome=model_not_found" in lines["req_2"] and "asked=x\\ny/z" in lines["req_2"]
    assert "messages: " in lines["req_3"] and "outcome=invalid_schema" in lines["req_3"]
