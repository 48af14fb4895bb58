"""The gateway's doors: who gets in, whatever is asked for, and what is open to a network."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from cortex_core.catalogue import Catalogue
from cortex_core.entitlements import EntitlementsSection
from cortex_core.gateway_config import GatewayConfig, GatewaySection, load_gateway_config
from cortex_core.http_access import Refused
from cortex_gateway.configuration.current import Configuration, Current
from cortex_gateway.http.asgi import Message, RawHeaders
from cortex_gateway.observability.access_log import AccessRecord
from cortex_gateway.routes.access import Access, Area, close_websocket, exposures, options_headers

PAGE = "https://page.example"


class Log:
    """Keeps its lines."""

    def __init__(self) -> None:
        self.records: list[AccessRecord] = []

    def write(self, record: AccessRecord) -> None:
        self.records.append(record)


class House:
    """A gateway's door, what it counted, and what it wrote."""

    def __init__(self, *, require_auth: bool = False, **settings: Any) -> None:
        entitlements = EntitlementsSection(require_auth=require_auth)
        config = GatewayConfig(gateway=GatewaySection(listen="127.0.0.1:1", **settings), entitlements=entitlements)
        self.current = Current(Configuration(config, Catalogue()))
        self.reasons: list[str] = []
        self.log: Any = Log()
        self.access = Access(self.current, self.log, on_refusal=self.reasons.append, clock=lambda: 5.0)

    def admit(self, area: Area = "api", **headers: str) -> Any:
        return self.access.admit(scope_of(**headers), area)


def scope_of(path: str = "/v1/models", **headers: str) -> dict[str, Any]:
    named = {"host": "localhost", **headers}
    raw: RawHeaders = [(name.replace("_", "-").encode(), value.encode()) for name, value in named.items()]
    scope: dict[str, Any] = {"type": "http", "method": "GET", "path": path, "raw_path": path.encode()}
    return {**scope, "headers": raw, "client": ("192.0.2.1", 5)}


def test_who_is_no_page_and_asks_by_a_name_of_ours_gets_in() -> None:
    assert House().admit() == ([], False)
    assert House().admit("admin") == ([], False)
    with pytest.raises(Refused):
        House().admit(host="evil.example")
    assert House(allowed_hosts=("evil.example",)).admit(host="evil.example") == ([], False)


def test_a_listed_page_gets_in_and_may_read_and_others_do_not() -> None:
    admission = House(allow_origins=(PAGE,)).admit(origin=PAGE)
    assert dict(admission.cors)[b"access-control-allow-origin"] == PAGE.encode() and not admission.needs_key
    with pytest.raises(Refused):
        House(allow_origins=(PAGE,)).admit(origin="https://other.example")


def test_where_keys_are_required_any_page_may_come_with_one() -> None:
    assert House(require_auth=True).admit(origin=PAGE).needs_key
    assert not House(require_auth=True, allow_origins=(PAGE,)).admit(origin=PAGE).needs_key


@pytest.mark.parametrize("area", ["admin", "metrics"])
def test_no_page_of_another_origin_reaches_the_admin_routes_or_the_metrics(area: Area) -> None:
    """Whatever is listed, and whatever key it has."""
    with pytest.raises(Refused) as caught:
        House(require_auth=True, allow_origins=(PAGE, "*")).admit(area, origin=PAGE)
    assert caught.value.error.code == ("admin_forbidden" if area == "admin" else "origin_not_allowed")


def test_what_is_adopted_applies_from_then_on() -> None:
    house = House()
    config = GatewayConfig(gateway=GatewaySection(listen="127.0.0.1:1", allow_origins=(PAGE,)))
    house.current.value = Configuration(config, Catalogue())
    with pytest.raises(Refused):
        house.admit(origin=PAGE)
    house.access.adopt()
    assert house.admit(origin=PAGE).cors


async def test_who_is_refused_reads_it_in_the_dialect_of_the_path_in_one_line_and_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    house, sent = House(), []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    with caplog.at_level(logging.WARNING, "cortex_gateway.routes.access"):
        for path in ("/v1/messages", "/v1/chat/completions"):
            with pytest.raises(Refused) as caught:
                house.admit(origin=PAGE)
            await house.access.refuse(caught.value, scope_of(path, origin=PAGE), receive, send)
    bodies = [json.loads(message["body"]) for message in sent if message.get("body")]
    assert [body.get("type") for body in bodies] == ["error", None]
    assert len(caplog.records) == 1 and "allow_origins" in caplog.text
    records = house.log.records
    assert [record.outcome for record in records] == ["rejected"] * 2 and len(house.reasons) == 2
    assert records[0].status == 403 and records[0].client == "192.0.2.1"


async def test_a_websocket_is_closed_before_it_is_opened() -> None:
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        sent.append(message)

    await close_websocket(receive, send)
    assert [message["type"] for message in sent] == ["websocket.close"]


def test_a_preflight_is_answered_to_a_page_that_may_ask() -> None:
    scope = scope_of(origin=PAGE, access_control_request_method="POST")
    house = House(allow_origins=(PAGE,))
    asked = dict(options_headers(scope, house.access.admit(scope, "api")))
    assert b"access-control-allow-methods" in asked and b"allow" in asked
    assert list(dict(options_headers(scope_of(), house.admit()))) == [b"allow"]


def test_O13_a_start_tells_what_is_open_to_a_network(tmp_path: Path) -> None:
    def gateway(text: str, *addresses: str) -> str:
        (tmp_path / "cortex.toml").write_text(text)
        return "\n".join(exposures(load_gateway_config(tmp_path / "cortex.toml", environ={}), *addresses))

    for address in ("127.0.0.1", "::1"):
        assert gateway("", address, address) == ""
    for address in ("0.0.0.0", "::", "192.0.2.7"):
        told = gateway("", address, address)
        assert "require_auth" in told and "metrics" in told and "admin" not in told
    assert gateway("[entitlements]\nrequire_auth = true\n", "0.0.0.0", "127.0.0.1") == ""
    keys = '[entitlements]\nrequire_auth = true\n[[entitlements.keys]]\nkey_id = "a"\nkey = "k"\nadmin = true\n'
    assert "admin keys work" in gateway(keys, "0.0.0.0", "127.0.0.1")
    proxied = '[gateway]\nallowed_hosts = ["cortex.example"]\n[entitlements]\nrequire_auth = true\n'
    assert "admin_from_loopback" in gateway(proxied, "0.0.0.0", "127.0.0.1")
    for key in ("allowed_hosts", "allow_origins"):
        assert f"gateway.{key} holds `*`" in gateway(f'[gateway]\n{key} = ["*"]\n', "127.0.0.1", "127.0.0.1")
