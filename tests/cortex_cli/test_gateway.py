"""The command line's HTTP client: what it sends, and what it says where something goes wrong."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from cortex_cli.exits import EXIT_FAILED, EXIT_NOT_FOUND, EXIT_UNREACHABLE, CliError
from cortex_cli.gateway import Gateway

from tests.cortex_cli.harness import Stub, stub


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    monkeypatch.delenv("CORTEX_API_KEY", raising=False)
    with stub() as running:
        yield running


@pytest.mark.parametrize("endpoint", ["ftp://host", "http://", "//", "unix:///run/cortex"])
def test_an_endpoint_that_is_none_is_a_usage_error(endpoint: str) -> None:
    with pytest.raises(CliError, match="is not an http") as caught:
        Gateway(endpoint)
    assert caught.value.exit_code == 2


def test_a_scheme_may_be_left_out_and_a_path_is_kept(server: Stub) -> None:
    server.answers["GET", "/below/health"] = 200, b'{"status": "ok"}'
    gateway = Gateway(f"127.0.0.1:{server.server_port}/")
    assert gateway.endpoint == server.url
    assert Gateway(f"{server.url}/below/").get("/health") == {"status": "ok"}


def test_bodies_are_json_and_the_key_comes_from_the_environment(server: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answers["POST", "/models/load"] = 200, b"{}"
    server.answers["DELETE", "/x"] = 200, b"[]"
    gateway = Gateway(server.url)
    gateway.post("/models/load", {"model_id": "ä"})
    monkeypatch.setenv("CORTEX_API_KEY", "secret")
    assert gateway.delete("/x") == []
    (_, _, first, body), (_, _, second, nothing) = server.asked
    assert body == {"model_id": "ä"} and nothing is None
    assert "authorization" not in first and second["authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    ("status", "body", "message", "code"),
    [
        (404, b'{"error": {"message": "no such model"}}', "no such model", EXIT_NOT_FOUND),
        (409, b'{"error": "busy"}', "busy", EXIT_FAILED),
        (500, b"<html>oops", "<html>oops", EXIT_FAILED),
        (502, b"", "HTTP 502", EXIT_FAILED),
        (503, b'{"error": {}}', '{"error": {}}', EXIT_FAILED),
        (503, b"[1]", "[1]", EXIT_FAILED),
    ],
)
def test_a_refusal_is_said_in_the_servers_words(
    server: Stub, status: int, body: bytes, message: str, code: int
) -> None:
    server.answers["GET", "/health"] = status, body
    with pytest.raises(CliError) as caught:
        Gateway(server.url).get("/health")
    assert (str(caught.value), caught.value.exit_code) == (message, code)


def test_what_is_no_json_is_no_gateway(server: Stub) -> None:
    server.answers["GET", "/health"] = 200, b"<html>"
    with pytest.raises(CliError, match="is it a gateway"):
        Gateway(server.url).get("/health")


def test_where_nobody_listens_it_says_so() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        with pytest.raises(CliError, match="Is it running") as caught:
            Gateway(f"http://127.0.0.1:{held.getsockname()[1]}", timeout_s=5).get("/health")
    assert caught.value.exit_code == EXIT_UNREACHABLE


def test_events_and_lines_come_one_by_one(server: Stub) -> None:
    server.answers["POST", "/stream"] = 200, b": ping\n\nevent: x\ndata: 1\n\ndata: a\ndata: b\n\n"
    assert list(Gateway(server.url).stream("/stream", {})) == [("x", "1"), ("message", "a\nb")]
    server.answers["GET", "/lines"] = 200, b"one\n\xff\ntwo"
    assert list(Gateway(server.url).lines("/lines")) == ["one", "\ufffd", "two"]
