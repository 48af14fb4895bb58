"""A neuron as a gateway asks it: where, and what its refusals and failures say."""

from __future__ import annotations

import json
import logging

import pytest
from cortex_core.catalogue import Catalogue, ModelProfile
from cortex_gateway.fleet.neuron import describe, refusal, too_old
from cortex_gateway.fleet.snapshot import HOST, Shortage

from tests.cortex_gateway.fake_neuron import FakeNeuron
from tests.cortex_gateway.gateway_client import MODEL, Start

CHAT = "/v1/chat/completions"


async def test_F27_a_gateway_uses_the_address_it_was_given_and_asks_no_neuron_for_one(
    neuron: FakeNeuron, start: Start
) -> None:
    """Whatever a neuron believes its own name to be."""
    neuron.discovery_extra = {"hostname": "localhost", "endpoint": "http://127.0.0.1:1", "url": "http://localhost:1"}
    client = await start(neuron, catalogue=Catalogue(models=(ModelProfile(id=MODEL),)))
    assert (await client.chat())[0] == 200
    assert neuron.count(f"POST {CHAT}") == 1
    assert not [call for call in neuron.calls if "endpoint" in call]
    (node,) = json.loads(await (await client.get("/admin/fleet")).read())["nodes"]
    assert node["endpoint"] == neuron.url


async def test_F28_a_slash_at_the_end_of_an_endpoint_is_none_too_many(neuron: FakeNeuron, start: Start) -> None:
    neuron.url += "/"
    client = await start(neuron, catalogue=Catalogue(models=(ModelProfile(id=MODEL),)))
    assert (await client.chat())[0] == 200
    assert {"GET /models", "GET /discovery", "POST /models/load", f"POST {CHAT}"} <= set(neuron.calls)
    assert not [call for call in neuron.calls if "//" in call]


def test_G11_an_error_is_shown_with_all_that_caused_it() -> None:
    try:
        try:
            try:
                raise OSError(28, "no space left on device")
            except OSError as inner:
                raise ValueError("the cache cannot be written") from inner
        except ValueError as middle:
            raise RuntimeError("the model was not loaded") from middle
    except RuntimeError as outer:
        shown = describe(outer)
    parts = ["the model was not loaded", "the cache cannot be written", "no space left on device"]
    assert [shown.index(part) for part in parts] == sorted(shown.index(part) for part in parts)
    assert "\n" not in shown


async def test_G11_what_lies_behind_a_dead_connection_is_logged(
    neuron: FakeNeuron, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    neuron.have(MODEL)
    caplog.set_level(logging.WARNING, "cortex_gateway")
    client = await start(neuron)
    neuron.is_down = True
    status, document = await client.chat()
    assert status == 502 and "Errno" not in json.dumps(document)
    lines = [record.getMessage() for record in caplog.records if "node alpha" in record.getMessage()]
    assert lines and any("Disconnected" in line or "Connection" in line for line in lines)


def test_G11_an_exception_and_its_causes_are_one_line() -> None:
    try:
        try:
            raise ValueError("not enough data:\n  at all")
        except ValueError as cause:
            raise ConnectionError("") from cause
    except ConnectionError as exc:
        assert describe(exc) == "ConnectionError <- ValueError: not enough data: at all"


@pytest.mark.parametrize(
    ("body", "message", "kind"),
    [
        (b'{"error": "no such model"}', "no such model", None),
        (b'{"error": "no such model", "code": "not_found"}', "no such model", "not_found"),
        (b'{"error": {"kind": "insufficient_vram", "message": "no room"}}', "no room", "insufficient_vram"),
        (b'{"error": {"code": "busy", "cause": "in use"}}', "in use", "busy"),
        (b'{"error": {"type": "x", "detail": ["a"]}}', '{"type":"x","detail":["a"]}', "x"),
        (b'{"error": {"kind": 7, "message": "no"}}', "no", None),
        (b"[]", "[]", None),
        (b"<html>bad gateway", "<html>bad gateway", None),
        (b"", "status 502", None),
        (b"\xff" * 700, "\ufffd" * 600, None),
        (b"[" * 10_000, "[" * 600, None),
    ],
)
def test_a_refusal_of_a_neuron_of_any_age_is_understood(body: bytes, message: str, kind: str | None) -> None:
    found = refusal(502, body)
    assert (str(found), found.status, found.kind, found.retry_after, found.shortage) == (message, 502, kind, None, None)


@pytest.mark.parametrize(("header", "seconds"), [("7", 7), ("soon", None), ("-1", None), (None, None)])
def test_when_to_come_back_is_believed_in_seconds_alone(header: str | None, seconds: int | None) -> None:
    assert refusal(503, b"{}", retry_after=header).retry_after == seconds


@pytest.mark.parametrize(("status", "is_passing"), [(503, True), (507, False)])
def test_the_numbers_of_a_load_that_does_not_fit_are_read_by_device(status: int, is_passing: bool) -> None:
    devices = [
        {"required_mb": 900, "available_mb": 300, "device": 0},
        {"required_mb": 900, "available_mb": 1000, "device": 1},
        {"required_mb": 50, "available_mb": 20, "device": None},
    ]
    error = {"kind": "insufficient_vram", "message": "m", "required_mb": 900, "free_mb": 300, "devices": devices}
    found = refusal(status, json.dumps({"error": error}).encode()).shortage
    assert found == Shortage(900, 300, {0: 900, HOST: 50}, {0: 300, HOST: 20}, is_passing)


def test_an_older_neuron_is_told_what_it_cannot_read() -> None:
    assert "too old to read `dtype`, `seed` of a load" in too_old("alpha", frozenset({"load.seed", "load.dtype"}))
