"""What each dialect's routes do beyond generating: counting, filters, names in errors, models in the asker's shape."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from neuron.daemon.common.config import EngineSection, NeuronConfig, PromptFilters

from tests.neuron.daemon.api.harness import RunningNeuron, run_neuron

pytestmark = pytest.mark.asyncio(loop_scope="module")

TOOL = {"type": "function", "name": "f", "parameters": {"type": "object"}}
ATTRIBUTION = "x-anthropic-billing-header: cc_version=2.1.329.f09; cc_entrypoint=cli;"
BAD_SCHEMA = {"type": "wrong"}


def message(neuron: RunningNeuron, **fields: Any) -> dict[str, Any]:
    return {"model": neuron.model, "max_tokens": 3, "messages": [{"role": "user", "content": "hi"}], **fields}


async def test_a_responses_answer_streamed_and_not(neuron: RunningNeuron) -> None:
    body = {"model": neuron.model, "input": "hi", "max_output_tokens": 3, "temperature": 0}
    status, headers, answer = await neuron.post("/v1/responses", body)
    assert status == 200 and headers["x-request-id"]
    whole = json.loads(answer)
    assert whole["object"] == "response" and whole["model"] == neuron.model and whole["usage"]["output_tokens"] == 3
    status, headers, stream = await neuron.post("/v1/responses", {**body, "stream": True})
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    events = [json.loads(line[6:]) for line in stream.decode().splitlines() if line.startswith("data: ")]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[0]["type"] == "response.created" and events[-1]["response"]["usage"] == whole["usage"]
    texts = [item["content"][0]["text"] for item in whole["output"] if item["type"] == "message"]
    assert "".join(texts) == "".join(e["delta"] for e in events if e["type"] == "response.output_text.delta")


async def test_input_tokens_are_what_the_request_reports(neuron: RunningNeuron) -> None:
    body = {"model": neuron.model, "input": "How are you?", "instructions": "Be brief.", "tools": [TOOL]}
    status, _, counted = await neuron.post("/v1/responses/input_tokens", body)
    assert status == 200
    _, _, answer = await neuron.post("/v1/responses", {**body, "max_output_tokens": 1})
    count = json.loads(answer)["usage"]["input_tokens"]
    assert json.loads(counted) == {"object": "response.input_tokens", "input_tokens": count}


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/chat/completions", {"response_format": {"schema": BAD_SCHEMA}}, "response_format.json_schema.schema"),
        ("/v1/responses", {"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
        ("/v1/messages", {"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
        ("/v1/messages", {"output_format": {"type": "json_schema"}}, "output_format.schema"),
        ("/v1/chat/completions", "tools", "tools[0].function.parameters"),
        ("/v1/responses", "tools", "tools[1].tools[0].parameters"),
        ("/v1/messages", "tools", "tools[1].input_schema"),
        ("/v1/chat/completions", "image", "messages"),
        ("/v1/responses", "image", "input"),
        ("/v1/responses/input_tokens", "image", "input"),
        ("/v1/messages", "image", "messages"),
        ("/v1/messages/count_tokens", "image", "messages"),
    ],
)
async def test_an_error_names_the_field_as_its_dialect_does(
    neuron: RunningNeuron, path: str, fields: Any, param: str
) -> None:
    status, _, answer = await neuron.post(path, faulty_body(neuron, path, fields))
    assert status == 400, answer
    error = json.loads(answer)["error"]
    if path.startswith("/v1/messages"):
        assert error["message"].startswith(param), error
    else:
        assert error["param"] == param, error


def faulty_body(neuron: RunningNeuron, path: str, fault: Any) -> dict[str, Any]:
    """A request of the path's dialect with a fault that only the text layer can find."""
    is_chat, is_responses = "chat" in path, "responses" in path
    body: dict[str, Any] = {"model": neuron.model, "input": "hi"} if is_responses else message(neuron)
    if fault == "image":
        pixel = "data:image/png;base64,iVBORw0KGgo="
        if is_chat:
            part: Any = {"type": "image_url", "image_url": {"url": pixel}}
        elif is_responses:
            part = {"type": "input_image", "image_url": pixel}
        else:
            source = {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}
            part = {"type": "image", "source": source}
        body["input" if is_responses else "messages"] = [{"role": "user", "content": [part]}]
    elif fault == "tools":
        if is_chat:
            function = {"name": "f", "parameters": BAD_SCHEMA}
            body |= {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}
        elif is_responses:
            member = {"type": "function", "name": "f", "parameters": BAD_SCHEMA}
            space = {"type": "namespace", "name": "n", "tools": [member]}
            body |= {"tools": [{"type": "web_search"}, space], "tool_choice": "required"}
        else:
            search = {"type": "web_search_20250305", "name": "web_search"}
            body |= {"tools": [search, {"name": "f", "input_schema": BAD_SCHEMA}], "tool_choice": {"type": "any"}}
    elif "response_format" in fault:
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "n", "schema": BAD_SCHEMA}}
    else:
        for name, value in fault.items():
            fmt = value.get("format", value)
            body[name] = (
                {"format": {**fmt, "schema": BAD_SCHEMA}} if "format" in value else {**fmt, "schema": BAD_SCHEMA}
            )
    return body


# The attribution filter


async def test_the_attribution_line_is_dropped_and_the_log_says_so(
    neuron: RunningNeuron, caplog: pytest.LogCaptureFixture
) -> None:
    plain = [{"type": "text", "text": "Be brief."}]
    attributed = [{"type": "text", "text": ATTRIBUTION}, *plain]
    counts = [await counted(neuron, system) for system in (plain, attributed)]
    assert counts[0] == counts[1]
    with caplog.at_level(logging.INFO, logger="neuron.request"):
        status, _, answer = await neuron.post("/v1/messages", message(neuron, system=attributed))
        assert status == 200 and prompt_size(answer) == counts[0]
        await neuron.post("/v1/messages", message(neuron, system=plain))
    with_filter, without = (record.getMessage() for record in caplog.records if record.name == "neuron.request")
    assert "dropped=claude_code_attribution" in with_filter and "dropped=" not in without


async def test_one_line_of_configuration_turns_the_filter_off(checkpoint: Path) -> None:
    config = NeuronConfig(engine=EngineSection(stop_grace_s=2.0), prompt_filters=PromptFilters(False))
    async with run_neuron(checkpoint, config=config) as neuron:
        plain = await counted(neuron, "Be brief.")
        attributed = f"{ATTRIBUTION}\nBe brief."
        count = await counted(neuron, attributed)
        assert count > plain
        _, _, answer = await neuron.post("/v1/messages", message(neuron, system=attributed))
        assert prompt_size(answer) == count


async def counted(neuron: RunningNeuron, system: Any) -> int:
    status, _, answer = await neuron.post("/v1/messages/count_tokens", message(neuron, system=system))
    assert status == 200, answer
    return int(json.loads(answer)["input_tokens"])


def prompt_size(answer: bytes) -> int:
    usage = json.loads(answer)["usage"]
    names = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
    return sum(int(usage[name]) for name in names)


# Models


async def test_models_come_in_the_shape_of_the_dialect_that_asks(neuron: RunningNeuron) -> None:
    headers = {"anthropic-version": "2023-06-01"}
    async with neuron.client.get(neuron.url + "/v1/models", headers=headers) as response:
        listed = json.loads(await response.read())
    (entry,) = listed["data"]
    assert set(listed) == {"data", "has_more", "first_id", "last_id"}
    assert set(entry) >= {"id", "type", "display_name", "created_at", "lifecycle"} and "object" not in entry
    plain = await neuron.get("/v1/models")
    assert plain["object"] == "list" and plain["data"][0]["object"] == "model"
    async with neuron.client.get(neuron.url + "/v1/models/nobody", headers=headers) as response:
        assert response.status == 404
        assert json.loads(await response.read())["error"]["type"] == "not_found_error"


async def test_probes_are_answered(neuron: RunningNeuron) -> None:
    async with neuron.client.head(neuron.url + "/") as response:
        assert response.status == 200
