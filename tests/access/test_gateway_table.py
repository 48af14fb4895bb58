"""Every route of the gateway, and everybody who may knock there: which are let in, and that nothing comes of the rest.

The table is `ROUTES` × `KNOCKS`; `expected` is the rule. A route without a row fails the first test.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Literal, NamedTuple

import msgspec
import pytest
import pytest_asyncio
from cortex_core.entitlements import EntitlementsSection
from cortex_core.gateway_config import CaptureSection, GatewayConfig, GatewaySection, NeuronEntry, PollSection
from cortex_core.telemetry import TelemetrySection
from cortex_gateway.server import RunningGateway, running

from tests.access.raw import WEBSOCKET, Answer, Headers, ask
from tests.cortex_gateway.fake_neuron import FakeNeuron, listening

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODEL = "alice/model"
PRIVATE = b"alice"
"""In the id of the model, in every prompt, and so in every answer that tells something."""

Kind = Literal["probe", "api", "inference", "admin", "metrics"]
Where = Literal["open", "closed"]
"""The default configuration; and one with keys, where also the loopback needs one for the admin routes."""


class Row(NamedTuple):
    """kind decides who may ask. path: where it differs from the route's own pattern."""

    kind: Kind
    body: dict[str, Any] | None = None
    path: str | None = None


CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi alice"}]}
SURFACES: dict[str, dict[str, Any]] = {
    "/chat/completions": CHAT,
    "/completions": {"model": MODEL, "prompt": "hi"},
    "/responses": {"model": MODEL, "input": "hi"},
    "/responses/input_tokens": {"model": MODEL, "input": "hi"},
    "/messages": {**CHAT, "max_tokens": 5},
    "/messages/count_tokens": CHAT,
}
ORDER = {"model": MODEL}
ROUTES: dict[tuple[str, str], Row] = {
    ("GET", "/"): Row("probe"),
    ("GET", "/health"): Row("probe"),
    ("GET", "/api/hello"): Row("probe"),
    ("GET", "/openapi.json"): Row("probe"),
    **{("POST", prefix + path): Row("inference", body) for prefix in ("/v1", "") for path, body in SURFACES.items()},
    **{("GET", f"{prefix}/models"): Row("api") for prefix in ("/v1", "")},
    **{
        ("GET", f"{prefix}/models/{{model:path}}"): Row("api", path=f"{prefix}/models/{MODEL}")
        for prefix in ("/v1", "")
    },
    ("POST", "/admin/models/load"): Row("admin", ORDER),
    ("POST", "/admin/models/unload"): Row("admin", ORDER),
    ("POST", "/admin/models/pin"): Row("admin", ORDER),
    ("POST", "/admin/models/unpin"): Row("admin", ORDER),
    ("GET", "/admin/fleet"): Row("admin", path="/admin/fleet?refresh=1"),
    ("GET", "/admin/log"): Row("admin"),
    ("GET", "/admin/captures"): Row("admin"),
    ("POST", "/admin/captures"): Row("admin", {"exchanges": 10_000}),
    ("DELETE", "/admin/captures"): Row("admin"),
    ("GET", "/admin/captures/{request_id}"): Row("admin", path="/admin/captures/CAPTURED"),
    ("POST", "/admin/reload"): Row("admin"),
    ("GET", "/metrics"): Row("metrics"),
}

ALICE: Headers = (("authorization", "Bearer alice-key"),)
BOB: Headers = (("x-api-key", "bob-key"),)
BOSS: Headers = (("x-api-key", "boss-key"),)
KEYS = [
    {"key_id": "a", "account_id": "one", "key": "alice-key", "models": ["alice/*"]},
    {"key_id": "b", "account_id": "two", "key": "bob-key", "models": ["bob/*"]},
    {"key_id": "boss", "key": "boss-key", "admin": True},
]
FOREIGN: Headers = (("origin", "https://evil.example"),)


class Knock(NamedTuple):
    """page: whose browser asks: None is a program, or a page of the gateway itself. is_rebound: by a name that is not
    the gateway's."""

    headers: Headers = ()
    page: Literal["foreign"] | None = None
    host: str = ""
    is_rebound: bool = False
    is_websocket: bool = False


KNOCKS: dict[str, Knock] = {
    "no key": Knock(),
    "wrong key": Knock((("authorization", "Bearer wrong"),)),
    "own key": Knock(ALICE),
    "other account": Knock(BOB),
    "admin key": Knock(BOSS),
    "foreign origin": Knock(FOREIGN, "foreign"),
    "foreign origin, simple body": Knock((*FOREIGN, ("content-type", "text/plain")), "foreign"),
    "foreign origin, own key": Knock((*FOREIGN, *ALICE), "foreign"),
    "foreign origin, other account": Knock((*FOREIGN, *BOB), "foreign"),
    "foreign origin, admin key": Knock((*FOREIGN, *BOSS), "foreign"),
    "null origin": Knock((("origin", "null"),), "foreign"),
    "null origin, admin key": Knock((("origin", "null"), *BOSS), "foreign"),
    "other loopback port": Knock((("origin", "http://localhost:3000"),), "foreign"),
    "other loopback port, admin key": Knock((("origin", "http://localhost:3000"), *BOSS), "foreign"),
    "other loopback name": Knock((("origin", "http://localhost:PORT"),), "foreign"),
    "origin that is none": Knock((("origin", "evil"),), "foreign"),
    "two origins": Knock((("origin", "http://127.0.0.1:PORT"), *FOREIGN), "foreign"),
    "cross-site": Knock((("sec-fetch-site", "cross-site"),), "foreign"),
    "same-site": Knock((("sec-fetch-site", "same-site"), ("origin", "http://127.0.0.1:PORT")), "foreign"),
    "own page": Knock((("origin", "http://127.0.0.1:PORT"), ("sec-fetch-site", "same-origin"))),
    "own page, admin key": Knock((("origin", "http://127.0.0.1:PORT"), *BOSS)),
    "bookmark": Knock((("sec-fetch-site", "none"),)),
    "rebound name": Knock(host="evil.example:PORT", is_rebound=True),
    "rebound name, own page": Knock(
        (("origin", "http://evil.example:PORT"),), host="evil.example:PORT", is_rebound=True
    ),
    "rebound name, admin key": Knock(BOSS, host="evil.example", is_rebound=True),
    "name that looks local": Knock(host="localhost.evil.example:PORT", is_rebound=True),
    "name that looks like an address": Knock(host="127.0.0.1.evil.example", is_rebound=True),
    "forwarded name": Knock((("x-forwarded-host", "localhost"),), host="evil.example", is_rebound=True),
    "WebSocket": Knock(WEBSOCKET, is_websocket=True),
    "WebSocket, foreign origin": Knock((*WEBSOCKET, *FOREIGN), "foreign", is_websocket=True),
    "WebSocket, rebound name": Knock(WEBSOCKET, host="evil.example", is_rebound=True, is_websocket=True),
    "WebSocket, admin key": Knock((*WEBSOCKET, *BOSS), is_websocket=True),
}
REFUSED_AT_THE_DOOR = ("host_not_allowed", "origin_not_allowed", "admin_forbidden")
PASSES = 0
"""Any answer that is the route's own."""


def key_of(knock: Knock) -> str:
    given = {value.rpartition(" ")[2] for name, value in knock.headers if name in ("authorization", "x-api-key")}
    return given.pop() if given else ""


def expected(where: Where, row: Row, knock: Knock) -> int:
    """The rule: a status, or `PASSES`."""
    if knock.is_websocket:
        return 403
    if knock.is_rebound:
        return 421
    key = key_of(knock)
    is_shared = row.kind in ("probe", "api", "inference")
    if knock.page is not None and not (is_shared and where == "closed"):
        return 403
    if row.kind == "metrics":
        return PASSES
    if row.kind == "admin":
        if where == "open" or key == "boss-key":
            return PASSES
        return 403
    if (
        where == "closed"
        and (row.kind != "probe" or knock.page is not None)
        and key not in {"alice-key", "bob-key", "boss-key"}
    ):
        return 401
    if row.kind == "inference" and key == "bob-key":
        return 403  # the model is not his
    if "/models/" in (row.path or "") and key == "bob-key":
        return 404
    return PASSES


class House:
    """A gateway of either kind over one neuron, which notes what it is asked."""

    def __init__(self, where: Where, neuron: FakeNeuron, started: RunningGateway) -> None:
        self.where = where
        self.neuron = neuron
        self.started = started
        self.captured = ""

    async def knock(self, place: tuple[str, str], knock: Knock) -> Answer:
        method, pattern = place
        row = ROUTES[place]
        url = self.started.metrics_url if row.kind == "metrics" else self.started.url
        port = url.rpartition(":")[2]
        path = (row.path or pattern).replace("CAPTURED", self.captured)
        headers = [(name, value.replace("PORT", port)) for name, value in knock.headers]
        host = knock.host.replace("PORT", port)
        if knock.is_websocket:
            return await ask(url, "GET", path, host=host, headers=headers)
        return await ask(url, method, path, row.body, host=host, headers=headers)

    def state(self) -> tuple[Any, ...]:
        """What nobody may change who is not let in."""
        neuron, gateway = self.neuron, self.started.gateway
        orders = [call for call in neuron.calls if call.startswith("POST ")]
        captures = gateway.captures
        is_kept = captures.find(self.captured) is not None
        return orders, len(neuron.requests), dict(neuron.models), captures.override, is_kept


@asynccontextmanager
async def open_house(where: Where) -> AsyncIterator[House]:
    async with AsyncExitStack() as stack:
        neuron = await stack.enter_async_context(listening(FakeNeuron("alpha")))
        neuron.have(MODEL)
        closed = {"require_auth": True, "admin_from_loopback": False, "keys": KEYS}
        # On an open gateway keys are known and not required, as after `cortex keys create`.
        config = GatewayConfig(
            gateway=GatewaySection(listen="127.0.0.1:0", metrics_listen="127.0.0.1:0"),
            poll=PollSection(interval_s=60.0),
            entitlements=msgspec.convert(closed if where == "closed" else {"keys": KEYS}, EntitlementsSection),
            capture=CaptureSection(exchanges=10_000),
            telemetry=TelemetrySection(traces=False),
            neurons=(NeuronEntry(name="alpha", endpoint=neuron.url),),
        )
        started = await stack.enter_async_context(running(config, grace_s=0))
        house = House(where, neuron, started)
        while started.gateway.fleet.snapshot.nodes["alpha"].health == "unknown":
            await started.gateway.fleet.changed()
        answer = await ask(started.url, "POST", "/v1/chat/completions", CHAT, headers=ALICE)
        assert answer.status == 200, answer
        house.captured = answer.headers["x-request-id"]
        yield house


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["open", "closed"])
async def house(request: pytest.FixtureRequest) -> AsyncIterator[House]:
    async with open_house(request.param) as opened:
        yield opened


async def test_H6_O14_every_route_of_the_gateway_has_a_row(house: House) -> None:
    gateway = house.started.gateway
    served = {("POST", path) for path in gateway._inference} | {("GET", "/metrics")}
    for route in gateway._control.routes:
        served |= {(method, route.path) for method in route.methods or () if method != "HEAD"}
    assert served == set(ROUTES)


@pytest.mark.parametrize("name", KNOCKS)
async def test_H6_O14_who_may_ask_the_gateway_what(house: House, name: str) -> None:
    knock = KNOCKS[name]
    found, wanted = {}, {}
    for place, row in ROUTES.items():
        wanted[place] = expected(house.where, row, knock)
        if wanted[place] == PASSES and place == ("DELETE", "/admin/captures"):
            continue  # lets the other rows have something to find; it is tried in a house of its own
        before = house.state()
        answer = await house.knock(place, knock)
        found[place] = answer.status
        if wanted[place] == PASSES:
            assert answer.status < 500, (place, answer)
            found[place] = PASSES if answer.status not in (401, 403, 421) else answer.status
            if place == ("POST", "/admin/models/unload"):
                house.neuron.have(MODEL)
                await house.started.gateway._poller.refresh("alpha")
            continue
        assert house.state() == before, place
        told = answer.body.replace(b"/" + MODEL.encode(), b"")  # a path that does not lead anywhere, repeated
        assert PRIVATE not in told or answer.code in ("model_not_allowed", "model_not_found"), (place, answer)
        if answer.code in REFUSED_AT_THE_DOOR:
            assert not any(header.startswith("access-control-") for header in answer.headers), (place, answer)
    wanted = {place: status for place, status in wanted.items() if place in found}
    assert found == wanted


async def test_H6_O14_who_passes_can_clear_the_captures() -> None:
    async with open_house("open") as house:
        before = house.state()
        assert before[-1]
        for name, knock in KNOCKS.items():
            if expected("open", ROUTES["DELETE", "/admin/captures"], knock) != PASSES:
                await house.knock(("DELETE", "/admin/captures"), knock)
                assert house.state() == before, name
        assert (await house.knock(("DELETE", "/admin/captures"), Knock())).status == 200
        assert not house.state()[-1]


async def test_H6_a_page_with_a_key_of_its_own_reads_its_answer_where_keys_are_required() -> None:
    async with open_house("closed") as house:
        path = "/v1/chat/completions"
        asked = (
            *FOREIGN,
            ("access-control-request-method", "POST"),
            ("access-control-request-headers", "authorization,content-type"),
        )
        preflight = await ask(house.started.url, "OPTIONS", path, headers=asked)
        assert preflight.status == 204
        assert preflight.headers["access-control-allow-origin"] == "https://evil.example"
        assert preflight.headers["access-control-allow-headers"] == "authorization, content-type"
        with_key = await ask(house.started.url, "POST", path, CHAT, headers=(*FOREIGN, *ALICE))
        without = await ask(house.started.url, "POST", path, CHAT, headers=FOREIGN)
        assert (with_key.status, without.status, without.code) == (200, 401, "invalid_api_key")
        for answer in (with_key, without):
            assert answer.headers["access-control-allow-origin"] == "https://evil.example"
            assert answer.headers["vary"] == "origin"
            assert "access-control-allow-credentials" not in answer.headers
        # Never the admin routes, whatever it holds.
        preflight = await ask(house.started.url, "OPTIONS", "/admin/fleet", headers=(*asked, *BOSS))
        assert preflight.status == 403
        assert not [name for name in preflight.headers if name.startswith("access-control-")]


@pytest.mark.parametrize("where", ["open", "closed"])
async def test_H6_a_refusal_is_said_in_the_dialect_of_the_route_and_logged_and_counted(where: Where) -> None:
    async with open_house(where) as house:
        gateway = house.started.gateway
        chat = await ask(house.started.url, "POST", "/v1/chat/completions", CHAT, host="evil.example")
        messages = await ask(house.started.url, "POST", "/v1/messages", CHAT, host="evil.example")
        admin = await ask(house.started.url, "GET", "/admin/fleet", headers=FOREIGN)
        assert (chat.status, chat.code, messages.code, admin.code) == (
            421,
            "host_not_allowed",
            "host_not_allowed",
            "admin_forbidden",
        )
        assert b'"type":"error"' in messages.body and b'"type":"error"' not in chat.body
        assert chat.headers["x-request-id"].startswith("req_")
        lines = b"\n".join(gateway.access_log.last(3)).decode()
        assert re.findall(r'"status":(\d+)', lines) == ["421", "421", "403"]
        assert chat.headers["x-request-id"] in lines
        metrics = (await ask(house.started.metrics_url, "GET", "/metrics")).body.decode()
        assert 'cortex_access_refused_total{reason="host"} 2.0' in metrics
        assert 'cortex_access_refused_total{reason="origin"} 1.0' in metrics
