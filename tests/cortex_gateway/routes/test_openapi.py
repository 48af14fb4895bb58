"""The gateway's OpenAPI document and its routes are the same thing."""

from __future__ import annotations

import json
import re
from typing import Any

from cortex_gateway.routes.openapi import describe
from starlette.routing import Route

from tests.cortex_gateway.fake_neuron import FakeNeuron
from tests.cortex_gateway.gateway_client import Start
from tests.openapi_document import check_document


def served(gateway: Any) -> set[tuple[str, str]]:
    """Methods and paths that the application really has; HEAD goes without saying where GET is."""
    found = {("post", path) for path in gateway._inference}
    for route in gateway._control.routes:
        assert isinstance(route, Route)
        path = re.sub(r"\{(\w+):path\}", r"{\1}", route.path)
        found |= {(method.lower(), path) for method in route.methods or () if method != "HEAD"}
    return found


async def test_every_route_is_described_and_none_is_invented(neuron: FakeNeuron, start: Start) -> None:
    client = await start(neuron)
    described = {(method, path) for path, methods in describe()["paths"].items() for method in methods}
    heads = {place for place in described if place[0] == "head"}
    assert described - heads == served(client.started.gateway)
    assert {("get", path) for _, path in heads} <= described


def test_it_is_openapi_3_1() -> None:
    check_document(describe())


async def test_it_is_served_without_a_key(neuron: FakeNeuron, start: Start) -> None:
    client = await start(neuron, entitlements={"require_auth": True})
    async with client.get("/openapi.json") as answer:
        assert answer.status == 200
        assert json.loads(await answer.read()) == json.loads(json.dumps(describe()))
    async with client.get("/v1/models") as answer:
        assert answer.status == 401
