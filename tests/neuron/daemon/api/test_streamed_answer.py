"""One stream: held back, kept alive, and ended."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from pathlib import Path

import pytest
from cortex_core.errors import ApiError
from neuron.daemon.api.streamed_answer import seeded
from neuron.daemon.text.prompts import Choice, Prompt
from neuron.protocol import SamplingParams

from tests.neuron.daemon.api.harness import (
    CHAT,
    COMPLETIONS,
    MESSAGES,
    RunningNeuron,
    body_for,
    events_of,
    run_neuron,
    said,
    text_of,
)
from tests.neuron.scripted_engine import eventually, scripted_with
from tests.neuron.scripted_worker import HOLD, REFUSE, SILENT

pytestmark = pytest.mark.asyncio(loop_scope="module")


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


async def test_a_gateway_is_told_what_a_stream_is_served_with(neuron: RunningNeuron) -> None:
    request = body_for(neuron, CHAT, stream=True)
    _, plain, _ = await neuron.post(CHAT, request)
    _, headers, _ = await neuron.post(CHAT, request, {"x-cortex-hop": "1"})
    assert "x-cortex-fingerprint" not in plain
    (model,) = await neuron.get("/models")
    assert headers["x-cortex-fingerprint"] == model["fingerprint"] and len(model["fingerprint"]) == 16


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


async def test_tokens_are_sent_as_they_come(neuron: RunningNeuron) -> None:
    request = json.dumps(neuron.chat(stream=True, top_k=HOLD, max_tokens=50))
    async with neuron.client.post(neuron.url + CHAT, data=request) as response:
        body = b""
        while not text_of(body):  # the engine will say no more: what it said must arrive nevertheless
            body += await response.content.readany()
    await eventually(lambda: neuron.served.admission.in_flight == 0)


async def test_a_stream_that_goes_on_has_the_seeds_it_began_with() -> None:
    choices = [Choice(index, Prompt([1], ""), SamplingParams(seed=index), 5, ()) for index in range(2)]
    assert [choice.sampling.seed for choice in seeded(choices, (70, 80))] == [70, 80]
    assert [choice.sampling.seed for choice in choices] == [0, 1]
    with pytest.raises(ApiError, match="it has 1 choices, the request 2"):
        seeded(choices, (70,))
