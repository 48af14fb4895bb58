"""One line per request, whatever became of it."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pytest
from cortex_core.serving.log_lines import REQUESTS_BURST, left_out
from cortex_gateway.observability.access_log import AccessLog, AccessRecord

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
    AccessLog().write(
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


def access(number: int) -> AccessRecord:
    return AccessRecord(id=f"req_{number}", method="POST", path="/x", status=200, outcome="ok", duration_ms=1)


def ids(kept: list[bytes]) -> list[str]:
    return [json.loads(line)["id"] for line in kept]


async def test_the_last_lines_are_kept_and_probes_do_not_push_them_out() -> None:
    log = AccessLog(kept_lines=3)
    for number in range(5):
        log.write(access(number))
        log.write(access(100 + number), logging.DEBUG)
    assert ids(log.last(100)) == ["req_2", "req_3", "req_4"]
    assert ids(log.last(1)) == ["req_4"]
    assert log.last(0) == []


async def test_followers_get_every_line_once() -> None:
    log = AccessLog(kept_lines=10)
    log.write(access(0))
    followers = [log.follow(0), log.follow(1)]
    waiting = [asyncio.ensure_future(anext(follower)) for follower in followers]
    await asyncio.sleep(0)
    log.write(access(1))
    assert ids(list(await asyncio.gather(*waiting))) == ["req_0", "req_1"]
    log.write(access(2))
    log.write(access(3))
    assert ids([await anext(followers[0]) for _ in range(3)]) == ["req_1", "req_2", "req_3"]
    assert ids([await anext(followers[1]) for _ in range(2)]) == ["req_2", "req_3"]


async def test_the_log_can_be_read_and_followed_over_http(neuron: FakeNeuron, start: Start) -> None:
    neuron.have(MODEL)
    client = await start(neuron)
    await client.chat()
    await client.chat()
    async with client.get("/admin/log?last=1") as response:
        assert response.headers["content-type"] == "application/x-ndjson"
        (line,) = (await response.text()).splitlines()
    assert json.loads(line)["path"] == "/v1/chat/completions"
    async with client.get("/admin/log?last=0&follow=1") as response:
        await client.chat(user="later")
        while (line := (await response.content.readline()).decode()).strip() and "/admin/log" in line:
            continue
        assert json.loads(line)["path"] == "/v1/chat/completions"
    async with client.get("/admin/log?last=many") as response:
        assert response.status == 400


def test_O2_a_clients_words_are_cut_and_move_no_terminal(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "cortex_gateway.access")
    log = AccessLog()
    hostile = "\x1b[2J\x9b31m\u202e\n" + "x" * 1_000_000
    log.write(
        AccessRecord(id="r", method="GET", path=hostile, status=404, outcome="rejected", duration_ms=1, error=hostile)
    )
    short = "\x9b31m\u202eé"
    log.write(AccessRecord(id="r", method="GET", path=short, status=404, outcome="rejected", duration_ms=1))
    cut, whole = log.last(2)
    assert len(cut) < 3000 and json.loads(cut)["path"].startswith("\x1b[2J\x9b31m\u202e\nxxx")
    assert json.loads(whole)["path"] == short
    for line in (cut.decode(), whole.decode(), *caplog.messages):
        assert line.isprintable()


def test_O2_a_flood_of_refusals_is_not_a_flood_of_lines_and_hides_no_work(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "cortex_gateway.access")
    log = AccessLog(kept_lines=10_000)
    for _ in range(5000):
        log.write(AccessRecord(id="r", method="GET", path="/x", status=404, outcome="rejected", duration_ms=1))
        log.write(AccessRecord(id="w", method="POST", path="/x", status=200, outcome="ok", duration_ms=1, attempts=1))
    written = ids(log.last(10_000))
    assert written.count("w") == 5000
    assert REQUESTS_BURST <= written.count("r") < 2 * REQUESTS_BURST


def test_O2_probes_that_the_log_does_not_show_take_no_other_requests_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "cortex_gateway.access")
    log, before = AccessLog(), left_out["requests"]
    for number in range(2 * int(REQUESTS_BURST)):
        log.write(access(number), logging.DEBUG)
    log.write(access(9))
    assert ids(log.last(10)) == ["req_9"] and left_out["requests"] == before
