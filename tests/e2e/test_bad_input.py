"""Bad input gets a typed error in the caller's dialect, and the next good request is answered."""

from __future__ import annotations

import json
import socket
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.e2e.fleet_process import MODEL, FleetProcess, call

INFERENCE = [
    *("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/responses/input_tokens"),
    *("/v1/messages", "/v1/messages/count_tokens"),
]
CHAT_LIKE = ["/v1/chat/completions", "/v1/messages", "/v1/messages/count_tokens"]


def error_of(path: str, body: bytes) -> dict[str, Any]:
    """The error object, after checking the envelope of the route's dialect."""
    document = json.loads(body)
    error = document["error"]
    assert isinstance(error["message"], str) and error["message"]
    if path.startswith("/v1/messages"):
        assert document["type"] == "error" and document["request_id"].startswith("req_")
        assert set(error) >= {"type", "message"}
    else:
        assert set(error) >= {"message", "type", "param", "code"}
        assert error["code"] is None or isinstance(error["code"], str)
    return dict(error)


@pytest.fixture(autouse=True)
def nothing_else_breaks(fleet: FleetProcess) -> Any:
    yield
    status, _, body = call(fleet.url, "POST", "/v1/chat/completions", good())
    assert status == 200 and b"42" in body


def good() -> dict[str, Any]:
    return {"model": MODEL, "max_tokens": 50, "messages": [{"role": "user", "content": "What is 12+30?"}]}


@pytest.mark.parametrize("path", INFERENCE)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"null",
        b'"text"',
        b"7",
        b"{",
        b'{"model": ',
        b"\xff\xfe{}",
        b'{"model": "cortex/demo", "messages": [{"role": "user", "content": "\xff"}], "max_tokens": 5}',
        b'{"model": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model": "cortex/demo", "max_tokens": 5, "messages": ' + b'[{"a":' * 5_000 + b"1" + b"}]" * 5_000 + b"}",
        b'{"model": 7, "messages": [], "max_tokens": 5}',
        b"{}",
    ],
    ids=lambda body: repr(body[:24]),
)
def test_a_body_that_is_no_request_is_a_400(fleet: FleetProcess, path: str, body: bytes) -> None:
    status, headers, answer = call(fleet.url, "POST", path, body)
    assert status == 400, answer[:300]
    assert headers["x-request-id"] and headers["request-id"]
    error_of(path, answer)


@pytest.mark.parametrize("path", CHAT_LIKE)
@pytest.mark.parametrize(
    "change",
    [
        {"messages": "hello"},
        {"messages": []},
        {"messages": [7]},
        {"messages": [{"role": "wizard", "content": "hi"}]},
        {"messages": [{"role": "user", "content": 7}]},
        {"messages": [{"role": "user", "content": [{"type": "hologram"}]}]},
        {"messages": [{"content": "hi"}]},
        {"tools": "none"},
        {"tool_choice": 5, "tools": []},
    ],
    ids=lambda change: json.dumps(change)[:40],
)
def test_a_field_of_the_wrong_kind_is_named(fleet: FleetProcess, path: str, change: dict[str, Any]) -> None:
    status, _, answer = call(fleet.url, "POST", path, {**good(), **change})
    assert status == 400, answer[:300]
    error = error_of(path, answer)
    assert next(iter(change)) in error["message"] + str(error.get("param")), error


@pytest.mark.parametrize("path", CHAT_LIKE)
def test_unknown_fields_are_ignored(fleet: FleetProcess, path: str) -> None:
    body = {**good(), "surprise": {"deep": [1]}, "metadata": {"user_id": "x"}, "service_tier": "auto"}
    status, _, answer = call(fleet.url, "POST", path, body)
    assert status == 200, answer[:300]


@pytest.mark.parametrize("path", INFERENCE)
def test_a_body_of_50_mb_is_a_413(fleet: FleetProcess, path: str) -> None:
    """Read by hand: the server may answer and close before the body has been sent."""
    parts = urlsplit(fleet.url)
    with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=60) as connection:
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {50 * 2**20}\r\n\r\n"
        connection.sendall(head.encode())
        try:
            for _ in range(50):
                connection.sendall(b"x" * 2**20)
        except OSError:
            pass
        answer = b""
        try:
            while chunk := connection.recv(65536):
                answer += chunk
                if b"}" in chunk:
                    break
        except OSError:
            pass
    assert answer.startswith(b"HTTP/1.1 413"), answer[:200]
    error_of(path, answer.partition(b"\r\n\r\n")[2].partition(b"\r\n0\r\n")[0])


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nowhere", 404),
        ("POST", "/v1/messages/nowhere", 404),
        ("GET", "/v1/chat/completions", 405),
        ("GET", "/v1/messages", 405),
        ("DELETE", "/v1/models", 405),
    ],
)
def test_unknown_paths_and_methods_answer_in_the_dialect(
    fleet: FleetProcess, method: str, path: str, status: int
) -> None:
    got, _, answer = call(fleet.url, method, path)
    assert got == status
    error_of(path, answer)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_the_neuron_itself_answers_bad_input_the_same_way(fleet: FleetProcess, path: str) -> None:
    for body in (b"[]", b"{", b'{"model": "cortex/demo", "max_tokens": 5}'):
        status, _, answer = call(fleet.neuron_url, "POST", path, body)
        assert status == 400, answer
        error_of(path, answer)


def test_a_query_string_is_no_other_path(fleet: FleetProcess) -> None:
    body = {**good(), "max_tokens": 50}
    status, _, answer = call(fleet.url, "POST", "/v1/messages?beta=true", body)
    assert status == 200 and b"42" in answer
    status, _, answer = call(fleet.url, "POST", "/v1/messages/count_tokens?beta=true", body)
    assert status == 200 and json.loads(answer)["input_tokens"] > 0
