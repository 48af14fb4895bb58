"""What the gateway itself says is said in the dialect of the one who asks."""

from __future__ import annotations

import json

import anthropic
import openai
import pytest
from cortex_core.catalogue import Catalogue, ModelProfile

from tests.cortex_gateway.fake_neuron import FakeNeuron
from tests.cortex_gateway.gateway_client import MODEL, Start

ANTHROPIC = {"anthropic-version": "2023-06-01"}


async def test_models_come_in_anthropics_own_shape_to_its_clients(neuron: FakeNeuron, start: Start) -> None:
    neuron.have(MODEL, limit={"context": 4096})
    client = await start(neuron)
    async with client.get("/v1/models?limit=1000", headers=ANTHROPIC) as response:
        listed = json.loads(await response.read())
    assert set(listed) == {"data", "has_more", "first_id", "last_id"} and listed["first_id"] == MODEL
    assert set(listed["data"][0]) <= set(anthropic.types.ModelInfo.model_fields)
    async with client.get(f"/v1/models/{MODEL}", headers=ANTHROPIC) as response:
        assert json.loads(await response.read()) == listed["data"][0]
    async with client.get("/v1/models") as response:
        assert json.loads(await response.read())["object"] == "list"


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("GET", "/v1/models/no/such", 404, "not_found_error"),
        ("GET", "/v1/models?limit=x", 400, "invalid_request_error"),
        ("GET", "/v1/files", 404, "not_found_error"),
        ("DELETE", "/v1/models", 405, "invalid_request_error"),
    ],
)
async def test_errors_on_shared_paths_follow_the_header(
    neuron: FakeNeuron, start: Start, method: str, path: str, status: int, kind: str
) -> None:
    client = await start(neuron)
    for headers in (ANTHROPIC, {}):
        async with client.session.request(method, client.url + path, headers=headers) as response:
            assert response.status == status
            document = json.loads(await response.read())
        if headers:
            assert document["type"] == "error" and document["error"]["type"] == kind and document["request_id"]
        else:
            assert set(document["error"]) >= {"message", "type", "param", "code"}


async def test_a_responses_stream_whose_model_fails_to_load_ends_as_the_sdk_expects(
    neuron: FakeNeuron, start: Start
) -> None:
    neuron.load_gate.clear()
    neuron.load_error = (422, {"error": {"kind": "quant_not_found", "model_id": MODEL}})
    catalogue = Catalogue(models=(ModelProfile(id=MODEL),))
    client = await start(neuron, catalogue=catalogue, gateway={"stream_hold_s": 0.0})
    async with openai.AsyncOpenAI(base_url=client.url + "/v1", api_key="none", max_retries=0) as sdk:
        answer = await sdk.responses.create(model=MODEL, input="hi", stream=True)  # opened: the load is waited for
        neuron.load_gate.set()
        with pytest.raises(openai.APIError, match="quant_not_found") as caught:
            _ = [event async for event in answer]
    assert isinstance(caught.value.body, dict) and set(caught.value.body) == {"type", "code", "message", "param"}


async def test_counting_for_responses_goes_to_a_node_that_has_the_model(
    neuron: FakeNeuron, second: FakeNeuron, start: Start
) -> None:
    second.have(MODEL)
    client = await start(neuron, second)
    for path in ("/v1/responses/input_tokens", "/responses/input_tokens"):
        async with client.post(path, {"model": MODEL, "input": "hi"}) as response:
            await response.read()
    assert [request[0] for request in second.requests] == ["/v1/responses/input_tokens"] * 2
    assert not neuron.requests
