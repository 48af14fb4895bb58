"""The neuron as one application: its routes, and what is answered where there is none."""

from __future__ import annotations

import pytest

from tests.neuron.daemon.api.harness import RunningNeuron, error_of

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nowhere", 404),
        ("POST", "/v1/messages/nowhere", 404),
        ("GET", "/v1/responses", 405),
        ("GET", "/v1/responses/resp_1", 404),
        ("GET", "/v1/chat/completions", 405),
        ("GET", "/v1/messages", 405),
        ("PUT", "/v1/messages", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/health", 405),
        ("GET", "/v1/models/nobody/here", 404),
        ("GET", "/models/nobody%2Fhere/endpoint", 404),
        ("GET", "/models/nobody%2Fhere/capabilities", 404),
    ],
)
async def test_unknown_paths_and_methods_answer_in_the_dialect(
    neuron: RunningNeuron, method: str, path: str, status: int
) -> None:
    async with neuron.client.request(method, neuron.url + path) as response:
        assert response.status == status
        error_of(path, await response.read())


async def test_a_query_is_no_other_path_and_v1_is_optional(neuron: RunningNeuron) -> None:
    for path in ("/v1/messages?beta=true", "/messages?beta=true", "/v1/messages/count_tokens?beta=true"):
        assert (await neuron.post(path, neuron.chat()))[0] == 200
    for path in ("/chat/completions", "/v1/tokenize"):
        assert (await neuron.post(path, neuron.chat()))[0] == 200
    async with neuron.client.head(neuron.url + "/") as response:
        assert response.status == 200


async def test_a_request_id_that_is_no_id_is_replaced(neuron: RunningNeuron) -> None:
    _, headers, _ = await neuron.post("/v1/chat/completions", neuron.chat(), {"x-request-id": "no id <here>"})
    assert headers["x-request-id"].startswith("req_")
