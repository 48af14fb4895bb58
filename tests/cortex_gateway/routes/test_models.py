"""`/v1/models` over HTTP, for the clients of both vendors."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import openai
import pytest
from cortex_core.catalogue import Catalogue, ModelProfile
from yarl import URL

from tests.cortex_gateway.fake_neuron import FakeNeuron
from tests.cortex_gateway.gateway_client import MODEL, Client, Start

CATALOGUE = Catalogue(models=tuple(ModelProfile(id=f"org/m{i}") for i in range(4)), aliases={"claude-local": MODEL})


async def get(client: Client, path: str) -> tuple[int, dict[str, Any]]:
    async with client.session.get(URL(client.url + path, encoded=True)) as response:
        assert response.headers["request-id"] == response.headers["x-request-id"]
        return response.status, json.loads(await response.read())


@pytest.mark.parametrize("path", ["/v1/models", "/models"])
async def test_the_list_is_complete_by_default(neuron: FakeNeuron, start: Start, path: str) -> None:
    neuron.have(MODEL, limit={"context": 4096})
    client = await start(neuron, catalogue=CATALOGUE)
    status, document = await get(client, path)
    assert status == 200
    ids = [entry["id"] for entry in document["data"]]
    assert ids == ["claude-local", "org/m0", "org/m1", "org/m2", "org/m3", MODEL]
    assert document["data"][-1]["locations"] == [{"node": "alpha", "status": "loaded"}]
    assert document["data"][-1]["max_model_len"] == 4096


@pytest.mark.parametrize("spelling", ["org/model", "org%2Fmodel", "claude-local"])
@pytest.mark.parametrize("prefix", ["/v1", ""])
async def test_one_model_is_found_by_every_spelling_of_its_id(
    neuron: FakeNeuron, start: Start, prefix: str, spelling: str
) -> None:
    neuron.have(MODEL)
    client = await start(neuron, catalogue=CATALOGUE)
    status, document = await get(client, f"{prefix}/models/{spelling}")
    assert (status, document["id"]) == (200, spelling.replace("%2F", "/"))


async def test_an_unknown_model_is_a_404_and_a_bad_limit_a_400(neuron: FakeNeuron, start: Start) -> None:
    client = await start(neuron, catalogue=CATALOGUE)
    status, document = await get(client, "/v1/models/org/nothing")
    assert (status, document["error"]["code"]) == (404, "model_not_found")
    status, document = await get(client, "/v1/models?limit=many")
    assert (status, document["error"]["param"]) == (400, "limit")


async def test_both_sdks_read_the_list_and_page_through_it(neuron: FakeNeuron, start: Start) -> None:
    neuron.have(MODEL)
    client = await start(neuron, catalogue=CATALOGUE)
    async with openai.AsyncOpenAI(base_url=client.url + "/v1", api_key="none", max_retries=0) as sdk:
        assert [model.id async for model in sdk.models.list()][-1] == MODEL
        assert (await sdk.models.retrieve(MODEL)).id == MODEL
        with pytest.raises(openai.NotFoundError):
            await sdk.models.retrieve("org/nothing")
    async with anthropic.AsyncAnthropic(base_url=client.url, api_key="none", max_retries=0) as messages:
        assert len([model.id async for model in messages.models.list(limit=2)]) == 6
        assert (await messages.models.retrieve(MODEL)).display_name == MODEL


async def test_the_list_does_not_wait_for_a_dead_neuron(neuron: FakeNeuron, start: Start) -> None:
    client = await start(neuron, catalogue=CATALOGUE)
    neuron.is_down = True
    calls = len(neuron.calls)
    status, _ = await get(client, "/v1/models")
    assert status == 200
    assert len(neuron.calls) == calls
