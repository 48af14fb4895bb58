"""The limits of a request on the real path: a daemon, its text workers and the demo model's tokenizer."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.neuron.daemon.api.harness import RunningNeuron
from tests.neuron.scripted_worker import REFUSE

pytestmark = pytest.mark.asyncio(loop_scope="module")

MB = 1_000_000


async def refused(neuron: RunningNeuron, path: str, body: Any, param: str | None) -> dict[str, Any]:
    data = body if isinstance(body, bytes) else json.dumps({"model": neuron.model, **body}).encode()
    status, _, answer = await neuron.post(path, data)
    assert status == 400, answer[:300]
    error = json.loads(answer)["error"]
    named = error.get("param") or error["message"].partition(":")[0]
    assert param is None or named == param, error
    assert len(answer) < 2000
    status, _, answer = await neuron.post("/v1/chat/completions", neuron.chat())
    assert status == 200, answer
    return dict(error)


async def test_H15_30_MB_of_blanks_are_a_400(neuron: RunningNeuron) -> None:
    blanks = " " * (30 * MB)
    for body in ({"prompt": blanks}, {"prompt": blanks, "add_special_tokens": False}):
        error = await refused(neuron, "/tokenize", body, "prompt")
        assert error["code"] == "context_length_exceeded" and error["prompt_len"] > error["max"] > 0
    messages = [{"role": "user", "content": blanks}]
    await refused(neuron, "/tokenize", {"messages": messages}, "messages")


async def test_H15_ids_without_end_are_a_400(neuron: RunningNeuron) -> None:
    ids = b"[" + b"1," * (10 * MB) + b"1]"
    head = b'{"model":' + json.dumps(neuron.model).encode()
    await refused(neuron, "/detokenize", head + b',"tokens":' + ids + b"}", None)
    await refused(neuron, "/v1/completions", head + b',"prompt":' + ids + b"}", None)
    few = [1] * 200_000
    error = await refused(neuron, "/v1/completions", {"prompt": [few, few]}, "prompt[0]")
    assert error["code"] == "context_length_exceeded"


async def test_H9_6_MB_are_not_counted_and_200000_messages_not_rendered(neuron: RunningNeuron) -> None:
    long = [{"role": "user", "content": "hello " * MB}]
    for path, body in (
        ("/v1/messages/count_tokens", {"messages": long}),
        ("/v1/responses/input_tokens", {"input": "hello " * MB}),
    ):
        error = await refused(neuron, path, body, None)
        assert "prompt is too long" in error["message"]
    many = [{"role": "user", "content": "a"}] * 200_000
    await refused(neuron, "/v1/chat/completions", {"messages": many}, "messages")
    await refused(neuron, "/v1/messages/count_tokens", {"messages": many}, "messages")
    await refused(neuron, "/v1/responses", {"input": many}, "input")


async def test_H2_a_long_stop_string_is_a_400_in_every_dialect(neuron: RunningNeuron) -> None:
    stop = "x" * 110_000
    for path, body in (
        ("/v1/chat/completions", neuron.chat()),
        ("/v1/responses", {"input": "hi"}),
        ("/v1/completions", {"prompt": "hi"}),
    ):
        error = await refused(neuron, path, {**body, "stop": stop}, "stop[0]")
        assert "1024" in error["message"] and "110000" in error["message"]
    await refused(neuron, "/v1/messages", neuron.chat(stop_sequences=[stop]), "stop_sequences[0]")


async def test_H1_a_schema_that_refers_to_itself_is_answered(neuron: RunningNeuron) -> None:
    parameters = {"anyOf": [{"$ref": "#"}] * 40}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    for _ in range(2):
        status, _, answer = await neuron.post(
            "/v1/chat/completions", neuron.chat(tools=[tool], tool_choice="required", max_tokens=3)
        )
        assert status == 200, answer


async def test_H1_what_only_the_engine_can_refuse_of_a_schema_is_refused_by_the_fields_name(
    neuron: RunningNeuron,
) -> None:
    """A grammar that compiles may still go beyond a limit of the matcher, step by step."""
    schema = {"type": "object"}
    format_ = {"type": "json_schema", "name": "x", "schema": schema}
    chat = neuron.chat(
        top_k=REFUSE, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    )
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    for path, body, param in (
        ("/v1/chat/completions", chat, "response_format"),
        ("/v1/chat/completions", neuron.chat(top_k=REFUSE, tools=[tool], tool_choice="required"), "tools"),
        ("/v1/responses", {"input": "hi", "top_k": REFUSE, "text": {"format": format_}}, "text.format"),
        ("/v1/messages", neuron.chat(top_k=REFUSE, output_config={"format": format_}), "output_config.format"),
    ):
        error = await refused(neuron, path, body, param)
        assert "cannot be constrained" in error["message"]
