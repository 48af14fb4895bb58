"""The operator's routes."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from cortex_core.catalogue import Catalogue, ModelProfile
from cortex_core.errors import ApiError
from cortex_core.sse import SseDecoder
from cortex_gateway.routes.admin import require_operator
from starlette.requests import Request

from tests.cortex_gateway.fake_neuron import FakeNeuron
from tests.cortex_gateway.gateway_client import MODEL, Client, Start

CATALOGUE = Catalogue(models=(ModelProfile(id=MODEL, vram_mb=1000),), aliases={"fast": MODEL})


async def admin(client: Client, verb: str, **body: Any) -> tuple[int, dict[str, Any]]:
    async with client.post(f"/admin/models/{verb}", body) as response:
        return response.status, json.loads(await response.read())


async def test_load_answers_when_the_model_is_there(neuron: FakeNeuron, start: Start) -> None:
    client = await start(neuron, catalogue=CATALOGUE)
    assert await admin(client, "load", model="fast") == (200, {"model": MODEL, "node": "alpha", "status": "loaded"})
    assert await admin(client, "load", model=MODEL) == (200, {"model": MODEL, "node": "alpha", "status": "loaded"})
    assert neuron.count("POST /models/load") == 1
    assert (await client.chat())[0] == 200


async def test_load_goes_to_the_named_node(neuron: FakeNeuron, second: FakeNeuron, start: Start) -> None:
    client = await start(neuron, second, catalogue=CATALOGUE)
    status, answer = await admin(client, "load", model=MODEL, node="beta")
    assert (status, answer["node"]) == (200, "beta")
    assert (len(neuron.load_bodies), len(second.load_bodies)) == (0, 1)


async def test_a_model_outside_the_catalogue_can_be_loaded_by_hand(
    neuron: FakeNeuron, second: FakeNeuron, start: Start
) -> None:
    neuron.footprints = {"big": 20_000}
    neuron.have("big")
    client = await start(neuron, second)
    status, answer = await admin(client, "load", model="other/model")
    assert (status, answer["node"]) == (200, "beta")
    assert second.load_bodies == [{"model_id": "other/model", "harness": "candle"}]


async def test_load_streams_its_progress(neuron: FakeNeuron, start: Start) -> None:
    neuron.load_gate.clear()
    client = await start(neuron, catalogue=CATALOGUE)
    decoder, seen = SseDecoder(), []
    headers = {"accept": "text/event-stream"}
    async with client.post("/admin/models/load", {"model": MODEL}, headers=headers) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        async for chunk in response.content.iter_any():
            for event in decoder.feed(chunk):
                seen.append((event.event, json.loads(event.data)))
                if event.event == "progress" and event.data and seen[-1][1]["bytes_done"] == 1:
                    neuron.models[MODEL]["progress"]["bytes_done"] = 4
                elif event.event == "progress":
                    neuron.load_gate.set()
    progress = {"node": "alpha", "phase": "weights", "bytes_done": 1, "bytes_total": 4, "eta_s": None}
    assert seen[0] == ("progress", progress)
    assert seen[-1] == ("done", {"model": MODEL, "node": "alpha", "status": "loaded"})


async def test_a_load_that_fails_says_so_in_either_form(neuron: FakeNeuron, start: Start) -> None:
    neuron.load_error = (422, {"error": {"kind": "empty_repo", "model_id": MODEL}})
    client = await start(neuron, catalogue=CATALOGUE)
    status, answer = await admin(client, "load", model=MODEL)
    assert (status, answer["error"]["code"]) == (422, "empty_repo")
    headers = {"accept": "text/event-stream"}
    async with client.post("/admin/models/load", {"model": MODEL}, headers=headers) as response:
        text = (await response.read()).decode()
    assert text.startswith("event: error\n") and "empty_repo" in text


async def test_a_client_that_leaves_the_progress_does_not_cancel_the_load(neuron: FakeNeuron, start: Start) -> None:
    neuron.load_gate.clear()
    client = await start(neuron, catalogue=CATALOGUE)
    headers = {"accept": "text/event-stream"}
    async with client.post("/admin/models/load", {"model": MODEL}, headers=headers) as response:
        await response.content.readuntil(b"\n\n")
        response.close()
    neuron.load_gate.set()
    assert (await client.chat())[0] == 200
    assert neuron.count("POST /models/load") == 1


async def test_unload_takes_the_model_from_everywhere_or_from_the_named_node(
    neuron: FakeNeuron, second: FakeNeuron, start: Start
) -> None:
    for each in (neuron, second):
        each.have(MODEL)
    client = await start(neuron, second, catalogue=CATALOGUE)
    assert await admin(client, "unload", model=MODEL, node="beta") == (
        200,
        {"model": MODEL, "nodes": ["beta"], "status": "unloaded"},
    )
    assert (list(neuron.models), list(second.models)) == ([MODEL], [])
    status, answer = await admin(client, "unload", model="fast")
    assert (status, answer["nodes"]) == (200, ["alpha"])
    status, answer = await admin(client, "unload", model=MODEL)
    assert (status, answer["error"]["code"]) == (404, "model_not_found")


async def test_an_unload_that_is_refused_is_a_conflict_and_the_model_stays(neuron: FakeNeuron, start: Start) -> None:
    neuron.have(MODEL)
    neuron.unload_error = (404, {"error": "cannot unload: inference still in flight"})
    client = await start(neuron)
    status, answer = await admin(client, "unload", model=MODEL)
    assert status == 409 and "in flight" in answer["error"]["message"]
    assert (await client.chat())[0] == 200


async def test_the_fleet_is_shown_with_what_is_under_way(neuron: FakeNeuron, start: Start) -> None:
    neuron.have(MODEL)
    neuron.answer_gate.clear()
    client = await start(neuron)
    asking = asyncio.ensure_future(client.chat())
    await neuron.request_arrived.wait()
    async with client.get("/admin/fleet") as response:
        document = json.loads(await response.read())
    neuron.answer_gate.set()
    await asking
    (node,) = document["nodes"]
    assert (node["name"], node["endpoint"], node["health"]) == ("alpha", neuron.url, "healthy")
    assert (node["models"][0]["id"], node["models"][0]["status"], node["models"][0]["in_flight"]) == (
        MODEL,
        "loaded",
        1,
    )
    assert document["in_flight"] == 1


async def test_refresh_polls_before_it_shows(neuron: FakeNeuron, start: Start) -> None:
    client = await start(neuron)
    neuron.have(MODEL)
    for query, expected in (("", []), ("?refresh=0", []), ("?refresh=1", [MODEL])):
        async with client.get("/admin/fleet" + query) as response:
            document = json.loads(await response.read())
        assert [model["id"] for model in document["nodes"][0]["models"]] == expected


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"model":1}', b'{"model":"m","nod":"x"}', b"\xff"])
async def test_bad_bodies_are_400(start: Start, body: bytes) -> None:
    client = await start()
    async with client.post("/admin/models/load", body) as response:
        assert response.status == 400
        assert json.loads(await response.read())["error"]["code"] == "invalid_body"


async def test_an_unknown_node_is_named(neuron: FakeNeuron, start: Start) -> None:
    client = await start(neuron)
    for verb in ("load", "unload"):
        status, answer = await admin(client, verb, model=MODEL, node="gamma")
        assert status == 404 and "alpha" in answer["error"]["message"]


def request_from(client: str | None, /, **headers: str) -> Request:
    headers = {"host": "localhost:31313", **headers}
    scope = {
        "type": "http",
        "method": "GET",
        "path": "/admin/fleet",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        "client": None if client is None else (client, 1),
    }
    return Request(scope)


def test_only_the_loopback_may_by_a_name_of_its_own() -> None:
    for host in ("127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"):
        require_operator(request_from(host))
    for name in ("127.0.0.1:31313", "[::1]:31313", "localhost"):
        require_operator(request_from("127.0.0.1", host=name))
    for request in (
        request_from("192.168.1.9"),
        request_from("2001:db8::1"),
        request_from(None),
        request_from("127.0.0.1", host="page.example:31313"),  # whose name now means this host
        request_from("127.0.0.1", host="localhost.page.example"),
        request_from("127.0.0.1", host="evil-localhost"),
        request_from("127.0.0.1", host="gpu1:31313"),
        request_from("127.0.0.1", host=""),
    ):
        with pytest.raises(ApiError) as refused:
            require_operator(request)
        assert refused.value.status == 403


@pytest.mark.parametrize("last", ["²", "-1", "x", "", "9" * 5000])
async def test_a_number_of_log_lines_that_is_none_is_a_400_and_a_huge_one_means_all(start: Start, last: str) -> None:
    client = await start()
    async with client.get("/admin/log", params={"last": last}) as response:
        assert response.status == (200 if last.isascii() and last.isdigit() else 400), await response.text()
