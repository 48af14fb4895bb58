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
from neuron.daemon.admission.admission import Ticket
from neuron.daemon.supervisor.generation import Generation

from tests.neuron.daemon.api.harness import (
    CHAT,
    COMPLETIONS,
    MESSAGES,
    RunningNeuron,
    body_for,
    events_of,
    run_neuron,
    said,
    spelled,
    text_of,
)
from tests.neuron.scripted_engine import eventually
from tests.neuron.scripted_worker import DIE, HOLD, REFUSE, SILENT

pytestmark = pytest.mark.asyncio(loop_scope="module")


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


async def test_the_resolved_model_serves_and_the_asked_name_returns(neuron: RunningNeuron) -> None:
    headers = {"x-cortex-resolved-model": neuron.model}
    status, _, body = await neuron.post(CHAT, neuron.chat(model="claude-alias"), headers)
    assert status == 200 and json.loads(body)["model"] == "claude-alias"


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


@pytest.mark.parametrize(("word", "priority"), [("high", 1), ("low", -1), ("normal", 0), ("urgent", 0), (None, 0)])
async def test_what_a_gateway_says_of_priority_reaches_queue_and_engine(
    neuron: RunningNeuron, monkeypatch: pytest.MonkeyPatch, word: str | None, priority: int
) -> None:
    admission, (_, group) = neuron.served.admission, neuron.served.serving()
    apply, generate = admission.apply, group.generate
    seen: list[int] = []

    def applied(principal: str | None, priority: int = 0) -> Ticket:
        seen.append(priority)
        return apply(principal, priority)

    async def generated(frames: Any, **settings: Any) -> Generation:
        seen.extend(frame.priority for frame in frames)
        return await generate(frames, **settings)

    monkeypatch.setattr(admission, "apply", applied)
    monkeypatch.setattr(group, "generate", generated)
    headers = {} if word is None else {"x-cortex-priority": word}
    assert (await neuron.post(CHAT, neuron.chat(n=2), headers))[0] == 200
    assert seen == [priority] * 3
