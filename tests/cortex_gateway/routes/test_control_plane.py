"""The control plane's routes, and what is answered where there is none."""

from __future__ import annotations

import json

import pytest

from tests.cortex_gateway.gateway_client import Start


@pytest.mark.parametrize("path", ["/", "/health", "/api/hello"])
async def test_connections_can_be_warmed(start: Start, path: str) -> None:
    client = await start()
    async with client.session.head(client.url + path) as response:
        assert response.status == 200
        assert await response.read() == b""


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "unknown_url"),
        ("POST", "/v1/embeddings", 404, "unknown_url"),
        ("GET", "/v1/models/", 404, "model_not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_supported"),
        ("DELETE", "/v1/models", 405, "method_not_supported"),
        ("PUT", "/health", 405, "method_not_supported"),
    ],
)
async def test_what_is_not_there_is_refused_in_the_openai_envelope(
    start: Start, method: str, path: str, status: int, code: str
) -> None:
    client = await start()
    async with client.session.request(method, client.url + path, data=b"x" * 300_000) as response:
        error = json.loads(await response.read())["error"]
        assert (response.status, error["code"], error["type"]) == (status, code, "invalid_request_error")
        assert response.headers["x-request-id"].startswith("req_")
        assert ("allow" in response.headers) == (status == 405)


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/messages", 405), ("POST", "/v1/messages/x", 404)])
async def test_and_in_the_anthropic_envelope_on_its_paths(start: Start, method: str, path: str, status: int) -> None:
    client = await start()
    async with client.session.request(method, client.url + path) as response:
        document = json.loads(await response.read())
        assert response.status == status
        assert document["type"] == "error" and document["request_id"] == response.headers["request-id"]


async def test_a_large_body_on_a_control_route_is_a_413_that_can_be_read(start: Start) -> None:
    client = await start()
    async with client.post("/nothing", b"x" * 5_000_000) as response:
        assert response.status == 413
    async with client.get("/health") as response:
        assert response.status == 200


async def test_preflight_of_a_page_is_answered(start: Start) -> None:
    client = await start(gateway={"allow_origins": ["https://page.example"]})
    headers = {"origin": "https://page.example", "access-control-request-headers": "authorization,content-type"}
    async with client.session.options(client.url + "/v1/chat/completions", headers=headers) as response:
        assert response.status == 204
        assert response.headers["access-control-allow-origin"] == "https://page.example"
        assert response.headers["access-control-allow-headers"] == "authorization, content-type"
