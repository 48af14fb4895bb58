"""Access lines as a person reads them, and a log that is followed over the end of its gateway."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import click
from cortex_cli.commands.logs import _shown


def entry(**fields: Any) -> dict[str, Any]:
    known = {"id": "req_1", "method": "POST", "path": "/v1/messages", "status": 200, "outcome": "ok"}
    return {**known, "duration_ms": 12.3, **fields}


def shown(**fields: Any) -> str:
    return click.unstyle(_shown(entry(**fields)))


def test_an_answer() -> None:
    line = shown(
        model="fast",
        resolved="org/model",
        node="n1",
        route="cold",
        ttft_ms=1500.0,
        duration_ms=125_000,
        prompt_tokens=10,
        cached_tokens=4,
        completion_tokens=7,
        finish=["stop", "length"],
        attempts=3,
        resumes=2,
        key="ci",
    )
    assert line == (
        "  200     125 s  /v1/messages  fast = org/model  n1/cold  first 1.5 s  10 (4 cached) -> 7 tokens  stop,length"
        "  3 attempts, 2 resumed  key ci  req_1"
    )


def test_an_error_of_a_neuron_is_its_message_and_not_its_document() -> None:
    document = json.dumps({"error": {"message": "too odd", "type": "invalid_request_error", "code": "invalid_value"}})
    assert "upstream_error" in (line := shown(status=400, outcome="upstream_error", error=document))
    assert "invalid_value: too odd  req_1" in line and "{" not in line
    for text in ("model_not_found: no such", '{"error": {"mess', "[1]", '{"error": 7}'):
        assert text in shown(status=404, outcome="rejected", error=text)


def test_a_log_that_is_followed_goes_on_when_the_gateway_is_back() -> None:
    answers = [
        [entry(id="req_1", at=1.0), entry(id="req_2", at=2.0)],
        [entry(id="req_2", at=1.5), entry(id="req_3", at=3.0)],
    ]
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            for each in answers.pop(0) if answers else []:
                self.wfile.write(json.dumps(each).encode() + b"\n")

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    command = [
        sys.executable,
        "-m",
        "cortex_cli",
        "logs",
        "-f",
        "--json",
        "-e",
        f"http://127.0.0.1:{server.server_port}",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stderr is not None
        read = [json.loads(process.stdout.readline())["id"] for _ in range(3)]
        assert read == ["req_1", "req_2", "req_3"]
        assert "waiting for it to come back" in process.stderr.readline()
        assert "is back" in process.stderr.readline()
        assert asked[:2] == ["/admin/log?last=50&follow=1", "/admin/log?last=1000&follow=1"]
    finally:
        process.kill()
        process.wait()
        server.shutdown()
        server.server_close()
