"""Captured exchanges: shown as both sides saw them, and as a command that asks again."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner
from cortex_cli.commands.captures import REMOVED, _bounds, _line, _shown, captures, curl_of
from cortex_cli.exits import CliError

from tests.cortex_cli.harness import Stub, stub

ENDPOINT = "http://127.0.0.1:31313"


def exchanged(**request: Any) -> dict[str, Any]:
    asked = {
        **{"method": "POST", "path": "/v1/chat/completions", "query": "", "is_cut": False, "num_bytes": 20},
        **{"headers": [["content-type", "application/json"]], "body": '{"model": "it\'s"}'},
    }
    return {
        "request": {**asked, **request},
        "attempts": [{"at_ms": 1.5, "node": "alpha", "route": "hot"}],
        "answer": {
            **{"status": 200, "headers": [["x-a", "1"]], "is_cut": False, "num_bytes": 9},
            "pieces": [{"at_ms": 2.0, "text": "data: 1\n\n"}, {"at_ms": 3.0, "text": "a\nb\n"}],
        },
        "summary": {"outcome": "ok", "duration_ms": 7.4},
    }


@pytest.fixture
def server() -> Iterator[Stub]:
    with stub() as running:
        yield running


def words_of(command: str) -> list[str]:
    return shlex.split(command.replace("\\\n", ""))


def test_the_command_asks_the_same_whatever_stands_in_the_body() -> None:
    words = words_of(curl_of(exchanged(query="beta=true"), ENDPOINT))
    assert f"{ENDPOINT}/v1/chat/completions?beta=true" in words
    assert words[words.index("--data-binary") + 1] == '{"model": "it\'s"}'
    assert "content-type: application/json" in words


@pytest.mark.parametrize(
    ("name", "header"),
    [("authorization", "authorization: Bearer $CORTEX_API_KEY"), ("x-api-key", "x-api-key: $CORTEX_API_KEY")],
)
def test_a_key_that_was_removed_comes_from_the_environment(name: str, header: str) -> None:
    command = curl_of(exchanged(headers=[[name, REMOVED], ["cookie", REMOVED]]), ENDPOINT)
    assert f'-H "{header}"' in command and "cookie" not in command and REMOVED not in command


@pytest.mark.parametrize("request_fields", [{"is_cut": True}, {"body": None}])
def test_what_was_not_kept_whole_is_not_asked_again(request_fields: dict[str, Any]) -> None:
    with pytest.raises(CliError, match="not kept whole"):
        curl_of(exchanged(**request_fields), ENDPOINT)


def test_an_exchange_is_shown_in_order_with_its_times() -> None:
    lines = _shown(exchanged()).splitlines()
    assert lines[0] == "> POST /v1/chat/completions" and "< 200" in lines
    order = [next(at for at, line in enumerate(lines) if mark in line) for mark in ("> content", "sent to", "< 200")]
    assert order == sorted(order)
    assert "      1.5 ms  sent to alpha (hot)" in "\n".join(lines)
    assert f"{'':15} b" in lines, "lines of one piece stand below each other"
    assert lines[-1] == "* ok after 7 ms"


def test_what_is_missing_is_said() -> None:
    cut = _shown(exchanged(is_cut=True, num_bytes=3 * 2**20, body=None))
    assert "(no body was read)" in cut and "(cut: 3.0 MiB came)" in cut


def test_a_line_of_the_list_says_how_much_went_where() -> None:
    entry = {
        **{"id": "req_1", "status": 200, "outcome": "ok", "duration_ms": 7.4, "path": "/v1/messages", "is_cut": True},
        **{"request_bytes": 500, "answer_bytes": 2048, "node": "alpha"},
    }
    assert _line(entry) == "req_1  200  ok  7ms  /v1/messages  -  on alpha  500 B -> 2.0 KiB  cut"


def test_whether_anything_is_kept_and_how_much() -> None:
    assert "nothing is captured" in _bounds({"exchanges": 0})
    sizes = {"exchange_bytes": 2**20, "total_bytes": 32 * 2**20, "bytes": 10}
    assert _bounds({"exchanges": 5, **sizes}) == (
        "the last 5 exchanges are kept, 1.0 MiB of each and 32.0 MiB of all; 10 B are in use"
    )


def test_starting_and_stopping_are_one_number(server: Stub) -> None:
    server.answers["POST", "/admin/captures"] = 200, json.dumps({"exchanges": 0}).encode()
    server.answers["DELETE", "/admin/captures"] = 200, b'{"cleared": 3}'
    runner = CliRunner(env={"CORTEX_API_KEY": os.environ.get("CORTEX_API_KEY", "")})
    assert runner.invoke(captures, ["start", "-n", "7", "--endpoint", server.url]).exit_code == 0
    assert runner.invoke(captures, ["stop", "--endpoint", server.url]).exit_code == 0
    assert [body for _, _, _, body in server.asked] == [{"exchanges": 7}, {"exchanges": 0}]
    assert runner.invoke(captures, ["clear", "--endpoint", server.url]).output == "forgot 3\n"
    assert runner.invoke(captures, ["start", "-n", "0", "--endpoint", server.url]).exit_code == 2
