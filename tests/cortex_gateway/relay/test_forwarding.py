"""Which headers really leave a gateway, and which come back through it: on sockets, on every path."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from aiohttp import web

from tests.cortex_gateway.fake_neuron import JSON_ANSWER, FakeNeuron
from tests.cortex_gateway.fake_openai import ANSWER, MODEL, FakeOpenAI
from tests.cortex_gateway.gateway_client import Client, Start

SECRETS = {
    "authorization": "Bearer hostile-1",
    "x-api-key": "hostile-2",
    "api-key": "hostile-3",
    "x-goog-api-key": "hostile-4",
    "x-auth-token": "hostile-5",
    "x-forwarded-for": "hostile-6",
    "x-forwarded-host": "hostile-7",
    "x-real-ip": "hostile-8",
    "forwarded": "for=hostile-9",
    "via": "1.1 hostile-10",
    "cookie": "session=hostile-11",
    "proxy-authorization": "Basic hostile-12",
    "x-amz-security-token": "hostile-13",
    "x-amz-date": "hostile-14",
    "openai-organization": "hostile-15",
    "openai-project": "hostile-16",
    "x-stainless-lang": "hostile-17",
    "user-agent": "hostile-18",
    "origin": "https://hostile-19.example",
    "referer": "https://hostile-20.example",
    "x-cortex-hop": "hostile-21",
    "x-cortex-resume": "21",
    "x-cortex-principal": "hostile-22",
    "x-helexa-account-id": "hostile-23",
    "x-request-id": "hostile-24",
    "ocp-apim-subscription-key": "hostile-25",
    "cf-access-client-secret": "hostile-26",
    "x-csrf-token": "hostile-27",
    "x-anything-else": "hostile-28",
    "accept-encoding": "hostile-29",
    "x-http-method-override": "hostile-30",
    "x-client-cert": "hostile-31",
}
OPEN = {"allow_origins": [SECRETS["origin"]]}
"""The page that asks may: only then is there something that could go on."""
MESSAGES = [{"role": "user", "content": "hi"}]
PATHS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/completions": {"prompt": "hi"},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 5},
    "/v1/messages/count_tokens": {"messages": MESSAGES},
    "/v1/responses": {"input": "hi"},
    "/v1/responses/input_tokens": {"input": "hi"},
}
EVERY_PATH = pytest.mark.parametrize("path", PATHS)
EVERY_PARSER = pytest.mark.parametrize("parser", ["h11", "auto"])


async def ask(client: Client, path: str, **fields: Any) -> tuple[int, dict[str, str], bytes]:
    body = {"model": MODEL, **PATHS[path], **fields}
    async with client.post(path, body, headers=SECRETS) as response:
        return response.status, {name.lower(): value for name, value in response.headers.items()}, await response.read()


def leaked(headers: dict[str, str]) -> list[str]:
    return [name for name, value in headers.items() if "hostile" in value]


@EVERY_PATH
@EVERY_PARSER
@pytest.mark.parametrize("stream", [False, True])
async def test_H12_of_a_clients_headers_only_listed_ones_reach_another_server(
    openai_server: FakeOpenAI, start: Start, path: str, parser: str, stream: bool
) -> None:
    openai_server.count = 7
    client = await start(openai_server, gateway={"http1_parser": parser, **OPEN})
    assert (await ask(client, path, stream=stream))[0] == 200
    headers = {name.lower(): value for name, value in openai_server.requests[-1][1].items()}
    assert leaked(headers) == []
    assert headers["user-agent"] == "cortex-gateway" and headers["x-request-id"].startswith("req_")
    # And nothing else at all, whatever its value.
    allowed = {"host", "content-type", "content-length", "accept", "accept-encoding", "user-agent", "x-request-id"}
    assert set(headers) <= allowed
    for _, polled in openai_server.polls:
        assert set(polled) <= {"host"}


@pytest.mark.parametrize("path", [path for path in PATHS if path != "/v1/responses"])  # which the fake has not
async def test_H12_of_a_clients_headers_only_listed_ones_reach_a_neuron(
    neuron: FakeNeuron, start: Start, path: str
) -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(body=JSON_ANSWER, content_type="application/json")

    neuron.have(MODEL)
    neuron.answer = answer
    client = await start(neuron, gateway=OPEN)
    assert (await ask(client, path))[0] == 200
    headers = neuron.requests[-1][1]
    assert leaked(headers) == []
    ours = {"x-request-id", "x-cortex-hop", "x-cortex-resolved-model"}
    assert set(headers) <= ours | {"host", "content-type", "content-length", "accept"}


async def test_H12_more_headers_go_on_where_the_configuration_names_them(
    openai_server: FakeOpenAI, start: Start
) -> None:
    openai_server.forward_headers = ("OpenAI-Organization", "X-Goog-Api-Key")
    openai_server.count = 7
    client = await start(openai_server, gateway=OPEN)
    for path in PATHS:
        assert (await ask(client, path))[0] == 200
        headers = {name.lower(): value for name, value in openai_server.requests[-1][1].items()}
        assert sorted(leaked(headers)) == ["openai-organization", "x-goog-api-key"]


async def test_H12_the_trace_goes_along_and_baggage_stays(openai_server: FakeOpenAI, start: Start) -> None:
    openai_server.count = 7
    client = await start(openai_server, gateway=OPEN)
    trace = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01", "tracestate": "vendor=1", "baggage": "user=ann"}
    for path, fields in PATHS.items():
        async with client.post(path, {"model": MODEL, **fields}, headers=trace) as response:
            assert response.status == 200
        headers = {name.lower(): value for name, value in openai_server.requests[-1][1].items()}
        assert headers["traceparent"] == trace["traceparent"] and headers["tracestate"] == "vendor=1"
        assert "baggage" not in headers


# ---------------------------------------------------------------------------------------------- and back

HOSTILE_ANSWER = {
    "set-cookie": "session=hostile",
    "server": "hostile",
    "access-control-allow-origin": "https://hostile.example",
    "access-control-allow-credentials": "true",
    "access-control-expose-headers": "hostile",
    "x-cortex-node": "hostile",
    "x-cortex-model": "hostile",
    "x-cortex-route": "hostile",
    "x-cortex-anything": "hostile",
    "x-request-id": "hostile",
    "request-id": "hostile",
    "location": "https://hostile.example",
    "alt-svc": 'h3="hostile:443"',
    "strict-transport-security": "max-age=31536000",
    "clear-site-data": '"*"',
    "link": "<https://hostile.example>; rel=preload",
    "content-security-policy": "hostile",
    "www-authenticate": "Basic realm=hostile",
    "proxy-authenticate": "Basic realm=hostile",
    "x-ratelimit-remaining-requests": "hostile",
    "x-amzn-requestid": "hostile",
    "keep-alive": "timeout=hostile",
    "upgrade": "hostile",
    "refresh": "0; url=https://hostile.example",
}
OWN = {
    *("date", "content-type", "content-length", "transfer-encoding", "connection", "cache-control"),
    *("x-accel-buffering", "x-request-id", "request-id"),
    *("x-cortex-node", "x-cortex-model", "x-cortex-route", "x-cortex-translated"),
}


@EVERY_PATH
@pytest.mark.parametrize("kind", ["neuron", "openai"])
@pytest.mark.parametrize("status", [200, 404, 429, 500])
async def test_H12_of_a_servers_headers_only_listed_ones_come_back(
    neuron: FakeNeuron, openai_server: FakeOpenAI, start: Start, path: str, kind: str, status: int
) -> None:
    async def answer(request: web.Request) -> web.Response:
        document = ANSWER if status == 200 else {"error": {"message": "no", "type": "x", "code": "y"}}
        if "okenize" in request.path:
            document = {"count": 7}
        return web.Response(
            body=json.dumps(document), status=status, content_type="application/json", headers=HOSTILE_ANSWER
        )

    server: FakeNeuron | FakeOpenAI = neuron if kind == "neuron" else openai_server
    server.answer = answer
    neuron.have(MODEL)
    openai_server.count = 7
    client = await start(server, gateway=OPEN)
    found, headers, _ = await ask(client, path)
    if status == 200 and (kind, path) != ("neuron", "/v1/responses"):
        assert found == 200
    assert headers.pop("access-control-allow-origin") == SECRETS["origin"]
    assert not [name for name, value in headers.items() if "hostile" in value]
    cors = {"access-control-expose-headers", "vary"}
    assert set(headers) <= OWN | cors | {"retry-after", "x-should-retry"}


@EVERY_PARSER
async def test_H12_trailers_of_either_side_go_nowhere(openai_server: FakeOpenAI, start: Start, parser: str) -> None:
    """Trailers of a request and of an answer, and headers that the `connection` header claims for the hop."""
    client = await start(openai_server, gateway={"http1_parser": parser, **OPEN})
    host, port = client.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = json.dumps({"model": MODEL, "messages": []}).encode()
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ntrailer: accept, x-api-key\r\n"
        b"connection: close, traceparent\r\ntraceparent: 00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01\r\n"
        b"transfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\naccept: hostile\r\nx-api-key: hostile\r\n\r\n"
        % (len(body), body)
    )
    async with asyncio.timeout(10):
        answer = await reader.read()
    writer.close()
    assert b" 200 " in answer.partition(b"\r\n")[0] and b"hostile" not in answer
    headers = {name.lower(): value for name, value in openai_server.requests[-1][1].items()}
    assert leaked(headers) == [] and "traceparent" not in headers and "trailer" not in headers
