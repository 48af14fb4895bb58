"""Bad input gets a typed error in the caller's dialect, and nothing else breaks."""

from __future__ import annotations

import asyncio
import gzip
import json
from typing import Any

import pytest

from tests.neuron.daemon.api.harness import RunningNeuron, error_of, run_neuron

pytestmark = pytest.mark.asyncio(loop_scope="module")

INFERENCE = [
    *("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/responses/input_tokens"),
    *("/v1/messages", "/v1/messages/count_tokens"),
]
ROUTES = [*INFERENCE, "/tokenize", "/detokenize", "/models/load", "/models/unload", "/chat/completions", "/messages"]
NO_REQUESTS = [
    b"",
    b"[]",
    b"null",
    b'"text"',
    b"7",
    b"true",
    b"{",
    b'{"model": ',
    b"{} {}",
    b"{'model': 1}",
    b"\xff\xfe{}",
    b"\x00",
    b'{"model": "m", "messages": [{"role": "user", "content": "\xff"}], "max_tokens": 5}',
    b'{"model": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"model": "m", "model_id": "m", "messages": ' + b'[{"a":' * 5_000 + b"1" + b"}]" * 5_000 + b"}",
    b'{"model": 7, "model_id": 7, "messages": [], "max_tokens": 5}',
    b'{"model": null, "model_id": null}',
    b'{"model": NaN}',
    b"{}",
]


async def assert_still_serves(neuron: RunningNeuron) -> None:
    status, _, body = await neuron.post("/v1/chat/completions", neuron.chat())
    assert status == 200, body


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("body", NO_REQUESTS, ids=lambda body: repr(body[:24]))
async def test_a_body_that_is_no_request_is_a_400(neuron: RunningNeuron, path: str, body: bytes) -> None:
    body = body.replace(b'"m"', json.dumps(neuron.model).encode())  # an unknown model is refused unread
    status, headers, answer = await neuron.post(path, body)
    assert status == 400, answer[:300]
    assert headers["x-request-id"] == headers["request-id"]
    error_of(path, answer)
    await assert_still_serves(neuron)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/messages/count_tokens"])
@pytest.mark.parametrize(
    "change",
    [
        {"messages": "hello"},
        {"messages": []},
        {"messages": [7]},
        {"messages": [{"role": "wizard", "content": "hi"}]},
        {"messages": [{"role": "user", "content": 7}]},
        {"messages": [{"role": "user", "content": [{"type": "hologram"}]}]},
        {"messages": [{"content": "hi"}]},
        {"messages": [{"role": "user", "content": "\udc00"}]},
        {"max_tokens": "many"},
        {"max_tokens": -1},
        {"temperature": "hot"},
        {"stream": "yes"},
        {"tools": "none"},
        {"tools": [7]},
        {"tool_choice": 5, "tools": []},
    ],
    ids=lambda change: json.dumps(change)[:48],
)
async def test_a_field_of_the_wrong_kind_is_a_400(neuron: RunningNeuron, path: str, change: dict[str, Any]) -> None:
    status, _, answer = await neuron.post(path, neuron.chat(**change))
    assert status == 400, answer[:300]
    error_of(path, answer)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/messages/count_tokens"])
async def test_unknown_fields_are_ignored(neuron: RunningNeuron, path: str) -> None:
    body = neuron.chat(surprise={"deep": [1]}, metadata={"user_id": "x"}, service_tier="auto", context_management={})
    status, _, answer = await neuron.post(path, body)
    assert status == 200, answer[:300]


async def test_a_bad_schema_and_an_unknown_tool_are_named(neuron: RunningNeuron) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "wizard"}}}
    tool = {"type": "function", "function": {"name": "known", "parameters": {"type": "object"}}}
    other = {"type": "function", "function": {"name": "unknown"}}
    for change in ({"response_format": schema}, {"tools": [tool], "tool_choice": other}):
        status, _, answer = await neuron.post("/v1/chat/completions", neuron.chat(**change))
        assert status == 400, answer
        error_of("/v1/chat/completions", answer)


async def test_tokens_outside_the_vocabulary_are_named(neuron: RunningNeuron) -> None:
    for tokens in ([-1], [10**9], [10**30], ["a"], "abc", 7, [1.5]):
        status, _, answer = await neuron.post("/detokenize", {"model": neuron.model, "tokens": tokens})
        assert status == 400 and "tokens" in error_of("/detokenize", answer)["message"]
    for body in ({}, {"prompt": 7}, {"messages": "x"}):
        status, _, answer = await neuron.post("/tokenize", {"model": neuron.model, **body})
        assert status == 400, answer


@pytest.mark.parametrize("path", [*INFERENCE, "/models/load"])
async def test_a_body_of_50_mb_is_a_413_that_its_sender_can_read(neuron: RunningNeuron, path: str) -> None:
    status, headers, answer = await neuron.post(path, b"x" * (50 * 2**20))
    assert status == 413 and headers["connection"] == "close"
    error_of(path, answer)
    await assert_still_serves(neuron)


async def test_a_body_without_a_length_is_counted(neuron: RunningNeuron) -> None:
    async def chunks() -> Any:
        for _ in range(40):
            yield b"x" * 2**20

    async with neuron.client.post(neuron.url + "/v1/messages", data=chunks()) as response:
        assert response.status == 413
        assert (await response.json())["error"]["type"] == "request_too_large"


async def test_compressed_bodies_are_read_and_bombs_are_not(neuron: RunningNeuron) -> None:
    path, gz = "/v1/chat/completions", {"content-encoding": "gzip"}
    body = json.dumps(neuron.chat()).encode()
    assert (await neuron.post(path, gzip.compress(body), gz))[0] == 200
    for data, headers, status in (
        (gzip.compress(b"x" * (40 * 2**20)), gz, 413),
        (gzip.compress(body)[:-9], gz, 400),
        (body, gz, 400),
        (body, {"content-encoding": "br"}, 415),
    ):
        got, _, answer = await neuron.post(path, data, headers)
        assert got == status, answer
        error_of(path, answer)


async def test_a_body_that_stalls_is_a_408(checkpoint: Any) -> None:
    async with run_neuron(checkpoint, load=False, body_timeout_s=0.2) as neuron:
        port = int(neuron.url.rsplit(":", 1)[1])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /v1/messages HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408")
        writer.close()
