"""One line per request, whatever became of it."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from cortex_gateway.observability.access_log import AccessRecord, write

from tests.cortex_gateway.fake_neuron import FakeNeuron
from tests.cortex_gateway.gateway_client import MODEL, Start


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [json.loads(record.getMessage()) for record in caplog.records if record.name == "cortex_gateway.access"]


async def test_each_request_ends_in_exactly_one_line(
    neuron: FakeNeuron, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "cortex_gateway.access")
    neuron.have(MODEL)
    client = await start(neuron)
    identities = []
    for method, path, body in (
        ("POST", "/v1/chat/completions", {"model": MODEL, "messages": []}),
        ("POST", "/v1/messages", {"model": MODEL, "messages": [], "stream": True}),
        ("POST", "/v1/messages", {"model": "no\nbody", "messages": []}),
        ("POST", "/v1/messages", [1]),
        ("GET", "/v1/models", None),
        ("GET", "/health", None),
        ("GET", "/nothing", None),
        ("OPTIONS", "/v1/messages", None),
    ):
        content = None if body is None else json.dumps(body).encode()
        async with client.session.request(method, client.url + path, data=content) as response:
            await response.read()
            identities.append((response.headers["x-request-id"], path, response.status))
    logged = lines(caplog)
    assert [(line["id"], line["path"], line["status"]) for line in logged] == identities
    assert [line["outcome"] for line in logged] == ["ok", "ok", *["rejected"] * 2, "ok", "ok", "rejected", "ok"]
    assert logged[2]["error"].startswith("model_not_found")
    assert "\n" not in caplog.records[-1].getMessage()


def test_fields_that_do_not_apply_are_left_out_and_text_cannot_break_the_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "cortex_gateway.access")
    write(
        AccessRecord(
            id="req_1", method="POST", path="/x", status=404, outcome="rejected", duration_ms=1.5, model="a\nb"
        )
    )
    assert lines(caplog) == [
        {
            "id": "req_1",
            "method": "POST",
            "path": "/x",
            "status": 404,
            "outcome": "rejected",
            "duration_ms": 1.5,
            "model": "a\nb",
        }
    ]
    assert "\n" not in caplog.records[0].getMessage()
