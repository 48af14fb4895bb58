"""`cortex captures` against a running fleet: what a client got is found, read, and asked again by hand."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from typing import Any

import pytest

from tests.e2e.fleet_process import MODEL, FleetProcess, call
from tests.e2e.harness import cortex

BODY: dict[str, Any] = {
    "model": MODEL,
    "max_tokens": 12,
    "temperature": 0,
    "messages": [{"role": "user", "content": "What's 12+30? \N{SNOWMAN}"}],
}


def test_an_exchange_is_captured_shown_asked_again_and_forgotten(fleet: FleetProcess) -> None:
    def captures(*arguments: str) -> str:
        done = cortex("captures", *arguments, "-e", fleet.url)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "nothing is captured" in cortex("captures", "list", "-e", fleet.url).stderr
    assert "last 5 exchanges" in captures("start", "-n", "5")
    try:
        headers = {"authorization": "Bearer none-of-your-business", "anthropic-version": "2023-06-01"}
        _, given, first = call(fleet.url, "POST", "/v1/messages", {**BODY, "stream": True}, headers)
        request_id = given["request-id"]
        listed = captures("list").splitlines()
        assert [line for line in listed if request_id in line and "ok" in line and "on local" in line]
        shown = captures("show", request_id)
        assert "> authorization: [removed]" in shown and "none-of-your-business" not in shown
        assert "sent to local" in shown and "event: message_stop" in shown and "* ok after" in shown
        document = json.loads(captures("show", request_id, "--json"))
        assert "".join(piece["text"] for piece in document["answer"]["pieces"]) == first.decode()
        command = captures("show", request_id, "--curl")
        assert "$CORTEX_API_KEY" in command
        if shutil.which("curl") is not None:
            again = subprocess.run(
                ["sh", "-c", command], capture_output=True, timeout=60, env={**os.environ, "CORTEX_API_KEY": "none"}
            )
            assert text_of(again.stdout) == text_of(first) != ""
        missing = cortex("captures", "show", "req_nobody", "-e", fleet.url)
        assert missing.returncode == 4 and "req_nobody" in missing.stderr
        assert captures("clear").startswith("forgot ")
        assert json.loads(captures("list", "--json"))["captures"] == []
    finally:
        assert "nothing is captured" in captures("stop")


def text_of(stream: bytes) -> str:
    events = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith(b"data: ")]
    return "".join(event["delta"].get("text", "") for event in events if event["type"] == "content_block_delta")


@pytest.mark.parametrize(("body", "is_cut"), [(None, False), ("{", True)])
def test_what_was_not_kept_whole_is_not_asked_again(body: str | None, is_cut: bool) -> None:
    from cortex_cli.commands.captures import curl_of
    from cortex_cli.exits import CliError

    request = {"method": "POST", "path": "/x", "query": "", "headers": [], "body": body, "is_cut": is_cut}
    with pytest.raises(CliError, match="not kept whole"):
        curl_of({"request": request}, "http://x")
