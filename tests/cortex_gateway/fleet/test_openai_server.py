"""What a server of kind openai says of itself, however much it says."""

from __future__ import annotations

import json
from typing import Any

from cortex_gateway.fleet.openai_server import MAX_LISTED, MAX_LISTING_BYTES

from tests.cortex_gateway.fake_openai import MODEL, FakeOpenAI
from tests.cortex_gateway.gateway_client import Start


async def listed(start: Start, server: FakeOpenAI, models: list[dict[str, Any]]) -> dict[str, Any]:
    server.models = models
    client = await start(server)
    async with client.get("/admin/fleet?refresh=1") as response:
        (node,) = json.loads(await response.read())["nodes"]
    return dict(node)


async def test_H13_more_models_than_anybody_has_are_not_all_taken(openai_server: FakeOpenAI, start: Start) -> None:
    node = await listed(start, openai_server, [{"id": f"m{number}"} for number in range(MAX_LISTED + 100)])
    assert len(node["models"]) == MAX_LISTED and node["health"] == "healthy"


async def test_H13_a_list_that_is_too_long_is_a_missed_look(openai_server: FakeOpenAI, start: Start) -> None:
    node = await listed(start, openai_server, [{"id": MODEL, "about": "x" * MAX_LISTING_BYTES}])
    assert node["models"] == [] and str(MAX_LISTING_BYTES) in node["last_error"]


async def test_H13_fields_that_may_hold_anything_are_taken_where_they_say_something(
    openai_server: FakeOpenAI, start: Start
) -> None:
    deep: Any = []
    for _ in range(400):
        deep = [deep]
    models = [
        {"id": "plain", "max_model_len": 4096, "modalities": ["vision"], "tool_call": False, "created": 5},
        {"id": "odd", "max_model_len": deep, "modalities": deep, "tool_call": [0] * 5000, "loaded": "x" * 5000},
        {"id": "away", "loaded": False},
    ]
    node = await listed(start, openai_server, models)
    assert {model["id"] for model in node["models"]} == {"plain", "odd"}
    client = await start(openai_server)
    async with client.get("/v1/models") as response:
        shown = {model["id"]: model for model in json.loads(await response.read())["data"]}
    assert shown["plain"]["limit"]["context"] == 4096
    assert "odd" in shown
