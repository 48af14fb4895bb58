"""The neuron's OpenAPI document and its routes are the same thing."""

from __future__ import annotations

import json
import re

import pytest
from neuron.daemon.api.app import NeuronApp
from neuron.daemon.api.openapi import describe

from tests.neuron.daemon.api.harness import RunningNeuron
from tests.openapi_document import check_document

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_it_is_openapi_3_1() -> None:
    check_document(describe("1.0"))


async def test_every_route_is_described_and_none_is_invented(neuron: RunningNeuron) -> None:
    served = {
        (method.lower(), re.sub(r"\{model_id:path\}", "{model}", route.path))
        for route in NeuronApp(neuron.daemon.services).routes
        for method in route.methods or ()
        if method != "HEAD"
    }
    described = {(method, path) for path, methods in describe("1.0")["paths"].items() for method in methods}
    assert described == served


async def test_it_is_served(neuron: RunningNeuron) -> None:
    document = await neuron.get("/openapi.json")
    assert document == json.loads(json.dumps(describe(document["info"]["version"])))
