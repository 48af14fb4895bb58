"""What is kept of an exchange, what never is, and that it stays within its bounds."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from typing import Any

import msgspec
import pytest
from aiohttp import web
from cortex_core.gateway_config import CaptureSection

from tests.cortex_gateway.fake_neuron import OPENAI_END, OPENAI_EVENTS, FakeNeuron
from tests.cortex_gateway.fake_openai import MODEL as FOREIGN_MODEL
from tests.cortex_gateway.fake_openai import FakeOpenAI
from tests.cortex_gateway.gateway_client import MODEL, Client, Start
from tests.cortex_gateway.relay.test_resume import END, speaking

CHAT = "/v1/chat/completions"
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}


async def ask(client: Client, body: Any = BODY, path: str = CHAT, **headers: str) -> str:
    """The id of the exchange, which is over when this returns."""
    async with client.post(path, body, headers=headers) as response:
        await response.read()
        return str(response.headers["x-request-id"])


async def listed(client: Client) -> dict[str, Any]:
    async with client.get("/admin/captures") as response:
        assert response.status == 200
        found: dict[str, Any] = json.loads(await response.read())
        return found


async def shown(client: Client, request_id: str) -> dict[str, Any]:
    async with client.get(f"/admin/captures/{request_id}") as response:
        assert response.status == 200
        found: dict[str, Any] = json.loads(await response.read())
        return found


async def test_a_stream_is_kept_piece_by_piece_with_its_times(neuron: FakeNeuron, start: Start) -> None:
    neuron.have(MODEL)
    neuron.answer_gate.clear()
    client = await start(neuron, capture={"exchanges": 5})
    body = {**BODY, "stream": True}
    headers = {"authorization": "Bearer hunter2", "cookie": "a=b"}
    async with client.post(f"{CHAT}?api_key=hunter2&beta=1", body, headers=headers) as response:
        await response.content.readuntil(b"\n\n")
        neuron.answer_gate.set()
        await response.read()
        request_id = response.headers["x-request-id"]
    seen = await shown(client, request_id)
    request, answer = seen["request"], seen["answer"]
    assert (request["method"], request["path"], request["query"]) == ("POST", CHAT, "api_key=[removed]&beta=1")
    assert json.loads(request["body"]) == body and not request["is_cut"] and not request["is_shortened"]
    kept = dict(request["headers"])
    assert (kept["authorization"], kept["cookie"]) == ("[removed]", "[removed]")
    assert kept["content-type"] == "application/json"
    assert "".join(piece["text"] for piece in answer["pieces"]) == b"".join([*OPENAI_EVENTS, OPENAI_END]).decode()
    times = [piece["at_ms"] for piece in answer["pieces"]]
    assert len(times) > 1 and times == sorted(times) and times[0] > 0
    assert answer["status"] == 200 and dict(answer["headers"])["x-request-id"] == request_id
    (attempt,) = seen["attempts"]
    assert (attempt["node"], attempt["route"]) == ("alpha", "loaded")
    assert seen["summary"]["outcome"] == "ok" and seen["summary"]["completion_tokens"] == 7
    (summary,) = (await listed(client))["captures"]
    assert summary["id"] == request_id and summary["request_bytes"] == len(json.dumps(body))


async def test_refusals_resumes_and_translations_are_kept_as_they_went(
    neuron: FakeNeuron, second: FakeNeuron, openai_server: FakeOpenAI, start: Start
) -> None:
    neuron.have(MODEL)
    neuron.answer = speaking([1, 2], then=None)
    second.have(MODEL)
    second.answer = speaking([3], then=END)
    client = await start(neuron, second, openai_server, capture={"exchanges": 5})
    refused = await shown(client, await ask(client, b"no json"))
    assert refused["answer"]["status"] == 400 and "invalid_json" in refused["answer"]["pieces"][0]["text"]
    assert refused["request"]["body"] == "no json" and refused["attempts"] == []
    translated = await ask(client, {**BODY, "model": FOREIGN_MODEL, "max_tokens": 5}, "/v1/messages")
    assert (await shown(client, translated))["summary"]["translated"] == "messages->chat"
    async with client.post(CHAT, {**BODY, "stream": True}) as response:
        neuron.models.clear()
        await response.read()
        resumed = await shown(client, response.headers["x-request-id"])
    assert [attempt["node"] for attempt in resumed["attempts"]] == ["alpha", "beta"]
    assert resumed["summary"]["resumes"] == 1
    assert "cortex-" not in "".join(piece["text"] for piece in resumed["answer"]["pieces"])


async def test_no_more_are_kept_than_asked_for_and_what_is_forgotten_is_not_found(
    neuron: FakeNeuron, start: Start
) -> None:
    neuron.have(MODEL)
    client = await start(neuron, capture={"exchanges": 2})
    ids = [await ask(client) for _ in range(3)]
    assert [entry["id"] for entry in (await listed(client))["captures"]] == ids[1:]
    async with client.get(f"/admin/captures/{ids[0]}") as response:
        assert response.status == 404 and json.loads(await response.read())["error"]["code"] == "capture_not_found"
    async with client.session.delete(client.url + "/admin/captures") as response:
        assert json.loads(await response.read()) == {"cleared": 2}
    found = await listed(client)
    assert (found["captures"], found["bytes"]) == ([], 0)


async def test_an_exchange_that_is_too_large_is_cut_and_its_client_gets_all_of_it(
    neuron: FakeNeuron, start: Start
) -> None:
    neuron.have(MODEL)
    events = [b"data: %d%b\n\n" % (number, b"x" * 1000) for number in range(50)]

    async def answer(request: web.Request) -> web.StreamResponse:
        response = await FakeNeuron.begin_stream(request)
        for event in events:
            await response.write(event)
        return response

    neuron.answer = answer
    client = await start(neuron, capture={"exchanges": 5, "exchange_bytes": 20_000})
    body = {"model": MODEL, "stream": True, "messages": [{"role": "user", "content": "y" * 50_000}]}
    async with client.post(CHAT, body) as response:
        assert await response.read() == b"".join(events)
        seen = await shown(client, response.headers["x-request-id"])
    assert seen["request"]["is_cut"] and len(seen["request"]["body"]) == 10_000
    assert seen["request"]["num_bytes"] == len(json.dumps(body))
    kept = "".join(piece["text"] for piece in seen["answer"]["pieces"])
    assert seen["answer"]["is_cut"] and seen["answer"]["num_bytes"] == sum(map(len, events)) > len(kept)
    assert seen["num_bytes"] <= 20_000


async def test_all_together_never_hold_more_than_their_bound(neuron: FakeNeuron, start: Start) -> None:
    neuron.have(MODEL)
    neuron.answer_gate.clear()
    client = await start(neuron, capture={"exchanges": 100, "exchange_bytes": 20_000, "total_bytes": 50_000})
    captures = client.started.gateway.captures
    body = {**BODY, "stream": True, "user": "z" * 9000}
    running = [asyncio.ensure_future(ask(client, body)) for _ in range(12)]
    async with asyncio.timeout(20):
        while neuron.num_running < 12:
            await asyncio.sleep(0.01)
    assert 30_000 < captures.num_bytes <= 50_000
    neuron.answer_gate.set()
    await asyncio.gather(*running)
    assert captures.num_bytes <= 50_000
    for _ in range(6):
        await ask(client, body)
    found = await listed(client)
    assert 0 < len(found["captures"]) <= 5 and found["bytes"] <= 50_000
    assert captures.num_bytes == sum(exchanged.num_bytes for exchanged in captures.all())


async def test_a_client_that_leaves_and_one_that_sends_no_body_are_kept_too(neuron: FakeNeuron, start: Start) -> None:
    neuron.have(MODEL)
    neuron.answer_gate.clear()
    client = await start(neuron, capture={"exchanges": 5})
    async with client.post(CHAT, {**BODY, "stream": True}) as response:
        await response.content.readuntil(b"\n\n")
        request_id = response.headers["x-request-id"]
    async with asyncio.timeout(20):
        while client.started.gateway.relay.num_active:
            await asyncio.sleep(0.01)
    seen = await shown(client, request_id)
    assert seen["summary"]["outcome"] == "client_gone" and seen["answer"]["pieces"]
    async with client.session.post(client.url + CHAT, headers={"content-length": "99999999999"}) as response:
        assert response.status == 413
        seen = await shown(client, response.headers["x-request-id"])
    assert seen["request"]["body"] is None and seen["answer"]["status"] == 413


async def test_off_is_the_default_and_an_admin_can_switch(neuron: FakeNeuron, start: Start) -> None:
    neuron.have(MODEL)
    client = await start(neuron)
    await ask(client)
    found = await listed(client)
    assert (found["exchanges"], found["captures"], found["bytes"]) == (0, [], 0)
    for switched, kept in ((3, 2), (1, 1), (0, 0), (None, 0)):
        async with client.post("/admin/captures", {"exchanges": switched}) as response:
            assert response.status == 200
        await ask(client)
        await ask(client)
        assert len((await listed(client))["captures"]) == kept
    for wrong in ({}, {"exchanges": -1}, {"exchanges": "all"}, b"nonsense"):
        async with client.post("/admin/captures", wrong) as response:
            assert response.status == 400


@pytest.mark.parametrize(
    ("events", "kept"),
    [
        ([b'data: {"api_key": "hunter2"}\n\n', b"data: x\n\n"], ['data: {"api_key": "[removed]"}\n\n', "data: x\n\n"]),
        ([b"data: sk-cortex-0123\n\n"], ["data: sk-cortex-0123\n\n"]),
    ],
)
async def test_secrets_in_answers_go_too(
    neuron: FakeNeuron, start: Start, events: list[bytes], kept: list[str]
) -> None:
    neuron.have(MODEL)
    client = await start(neuron, capture={"exchanges": 1})
    seen = await relayed(client, neuron, events)
    assert [piece["text"] for piece in seen["answer"]["pieces"]] == kept


async def test_a_secret_that_comes_in_parts_goes_as_well(neuron: FakeNeuron, start: Start) -> None:
    neuron.have(MODEL)
    client = await start(neuron, capture={"exchanges": 1})
    seen = await relayed(client, neuron, [b"data: " + b"x" * 300 + b" sk-cortex-0123456789abcdef\n\n"], split_at=325)
    (piece,) = seen["answer"]["pieces"]
    assert piece["text"] == f"data: {'x' * 300} [removed]\n\n"


async def relayed(
    client: Client, neuron: FakeNeuron, events: list[bytes], *, split_at: int | None = None
) -> dict[str, Any]:
    """What is kept of an answer in which each event is a piece of its own, or that is no stream and comes in two."""
    steps = [asyncio.Event() for _ in events]

    async def answer(request: web.Request) -> web.StreamResponse:
        if split_at is not None:
            whole = web.StreamResponse(headers={"content-type": "application/json"})
            await whole.prepare(request)
            await whole.write(events[0][:split_at])
            await steps[0].wait()
            await whole.write(events[0][split_at:])
            return whole
        response = await FakeNeuron.begin_stream(request)
        for event, step in zip(events, steps, strict=True):
            await response.write(event)
            await step.wait()
        return response

    neuron.answer = answer
    async with client.post(CHAT, {**BODY, "stream": split_at is None}) as response:
        for step in steps:
            assert await response.content.readany()
            step.set()
        await response.read()
        return await shown(client, response.headers["x-request-id"])


async def test_the_bounds_are_those_of_the_configuration_that_applies_now(neuron: FakeNeuron, start: Start) -> None:
    neuron.have(MODEL)
    client = await start(neuron)
    gateway = client.started.gateway
    for bounds, kept in ((CaptureSection(exchanges=2), 2), (CaptureSection(exchanges=1), 1), (CaptureSection(), 0)):
        value = gateway.current.value
        gateway.apply(dataclasses.replace(value, config=msgspec.structs.replace(value.config, capture=bounds)))
        for _ in range(3):
            await ask(client)
        assert len((await listed(client))["captures"]) == kept


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
async def test_prompts_are_for_admins_only(neuron: FakeNeuron, start: Start, method: str) -> None:
    neuron.have(MODEL)
    keys = [{"key_id": "ops", "key": "admin-secret", "admin": True}, {"key_id": "ci", "key": "plain-secret"}]
    client = await start(neuron, capture={"exchanges": 5}, entitlements={"keys": keys, "admin_from_loopback": False})
    request_id = await ask(client)
    paths = ["/admin/captures", *([f"/admin/captures/{request_id}"] if method == "GET" else [])]
    for path in paths:
        for key, status in (("plain-secret", 403), (None, 403), ("admin-secret", 200)):
            headers = {"x-api-key": key} if key is not None else {}
            async with client.session.request(
                method, client.url + path, headers=headers, data=b'{"exchanges": 5}'
            ) as response:
                assert response.status == status
