"""Every route of the neuron, and everybody who may knock there: which are let in, and that nothing comes of the rest.

The table is `ROUTES` × `KNOCKS`, once for a neuron that trusts its network and once for one with the secret of its
fleet; `expected` is the rule. A route without a row fails the first test.
"""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
import pytest_asyncio
from cortex_core.fleet import ModelSpec
from neuron.daemon.api.app import NeuronApp

from tests.access.raw import WEBSOCKET, Answer, Headers, ask
from tests.neuron.daemon.api.harness import RunningNeuron, make_checkpoint, run_neuron

pytestmark = pytest.mark.asyncio(loop_scope="module")

SECRET, OTHER_SECRET = "the-secret-of-this-fleet", "the-secret-of-another-one"
"""What a neuron says of itself and its models, and nothing but that, holds the name of its checkpoint."""

Kind = Literal["probe", "shared", "own"]
"""probe: needs no secret. shared: may be opened to pages by `allow_origins`. own: for gateways and programs."""
Where = Literal["trusting", "secret"]


class Row(NamedTuple):
    """MODEL in a path or a body stands for the id of the model that is loaded."""

    kind: Kind
    body: dict[str, Any] | None = None
    path: str | None = None


CHAT = {"model": "MODEL", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
SURFACES: dict[str, dict[str, Any]] = {
    "/chat/completions": CHAT,
    "/completions": {"model": "MODEL", "prompt": "hi", "max_tokens": 2},
    "/responses": {"model": "MODEL", "input": "hi", "max_output_tokens": 2},
    "/responses/input_tokens": {"model": "MODEL", "input": "hi"},
    "/messages": CHAT,
    "/messages/count_tokens": CHAT,
    "/tokenize": {"model": "MODEL", "prompt": "hi"},
    "/detokenize": {"model": "MODEL", "tokens": [5]},
}
OF_A_MODEL = {"model_id": "MODEL"}
ROUTES: dict[tuple[str, str], Row] = {
    **{("POST", f"/v1{path}"): Row("shared", body) for path, body in SURFACES.items()},
    **{("POST", path): Row("own", body) for path, body in SURFACES.items()},
    ("GET", "/"): Row("probe"),
    ("GET", "/discovery"): Row("own"),
    ("GET", "/health"): Row("own"),
    ("GET", "/version"): Row("own"),
    ("GET", "/metrics"): Row("own"),
    ("GET", "/openapi.json"): Row("own"),
    ("GET", "/models"): Row("own"),
    ("POST", "/models/load"): Row("own", OF_A_MODEL),
    ("POST", "/models/unload"): Row("own", OF_A_MODEL),
    ("POST", "/models/pin"): Row("own", {**OF_A_MODEL, "pinned": True}),
    ("GET", "/models/{model_id:path}/endpoint"): Row("own", path="/models/MODEL/endpoint"),
    ("GET", "/models/{model_id:path}/capabilities"): Row("own", path="/models/MODEL/capabilities"),
    ("GET", "/models/{model_id:path}/progress"): Row("own", path="/models/MODEL/progress"),
    ("GET", "/models/{model_id:path}"): Row("own", path="/models/MODEL"),
    ("GET", "/v1/models"): Row("shared"),
    ("GET", "/v1/models/{model_id:path}"): Row("shared", path="/v1/models/MODEL"),
}
LISTED = "https://app.example"
FOREIGN: Headers = (("origin", "https://evil.example"),)
PROOF: Headers = (("x-cortex-secret", f"{OTHER_SECRET}, {SECRET}"),)
WRONG: Headers = (("x-cortex-secret", OTHER_SECRET),)


class Knock(NamedTuple):
    """page: whose browser asks; None is a program, or a page of the neuron itself."""

    headers: Headers = ()
    page: Literal["listed", "foreign"] | None = None
    host: str = ""
    is_rebound: bool = False
    is_websocket: bool = False


KNOCKS: dict[str, Knock] = {
    "no key": Knock(),
    "wrong key": Knock((("authorization", "Bearer wrong"),)),
    "other account": Knock((("x-cortex-principal", "other"), ("x-helexa-account-id", "other"))),
    "foreign origin": Knock(FOREIGN, "foreign"),
    "foreign origin, simple body": Knock((*FOREIGN, ("content-type", "text/plain")), "foreign"),
    "listed origin": Knock((("origin", LISTED),), "listed"),
    "listed origin, cross-site": Knock((("origin", LISTED), ("sec-fetch-site", "cross-site")), "listed"),
    "null origin": Knock((("origin", "null"),), "foreign"),
    "other loopback port": Knock((("origin", "http://localhost:3000"),), "foreign"),
    "other loopback name": Knock((("origin", "http://localhost:PORT"),), "foreign"),
    "origin that is none": Knock((("origin", "evil"),), "foreign"),
    "two origins": Knock((("origin", "http://127.0.0.1:PORT"), *FOREIGN), "foreign"),
    "cross-site": Knock((("sec-fetch-site", "cross-site"),), "foreign"),
    "same-site": Knock((("sec-fetch-site", "same-site"),), "foreign"),
    "own page": Knock((("origin", "http://127.0.0.1:PORT"), ("sec-fetch-site", "same-origin"))),
    "bookmark": Knock((("sec-fetch-site", "none"),)),
    "rebound name": Knock(host="evil.example:PORT", is_rebound=True),
    "rebound name, own page": Knock((("origin", "http://evil.example"),), host="evil.example", is_rebound=True),
    "name that looks local": Knock(host="localhost.evil.example:PORT", is_rebound=True),
    "name that looks like an address": Knock(host="127.0.0.1.evil.example", is_rebound=True),
    "forwarded name": Knock((("x-forwarded-host", "localhost"),), host="evil.example", is_rebound=True),
    "no secret": Knock(),
    "empty secret": Knock((("x-cortex-secret", ""),)),
    "wrong secret": Knock(WRONG),
    "right secret": Knock(PROOF),
    "right secret, foreign origin": Knock((*PROOF, *FOREIGN), "foreign"),
    "right secret, listed origin": Knock((*PROOF, ("origin", LISTED)), "listed"),
    "right secret, rebound name": Knock(PROOF, host="evil.example", is_rebound=True),
    "WebSocket": Knock(WEBSOCKET, is_websocket=True),
    "WebSocket, foreign origin": Knock((*WEBSOCKET, *FOREIGN), "foreign", is_websocket=True),
    "WebSocket, right secret": Knock((*WEBSOCKET, *PROOF), is_websocket=True),
}
PASSES = 0
"""The route's own answer. Keys are verified by gateways: a neuron lets in whoever reaches it, or its fleet."""


def expected(where: Where, row: Row, knock: Knock) -> int:
    """The rule: a status, or `PASSES`."""
    if knock.is_websocket:
        return 403
    if knock.is_rebound:
        return 421
    if knock.page is not None and not (knock.page == "listed" and row.kind == "shared"):
        return 403
    is_proven = any(header in knock.headers for header in PROOF)
    return 401 if where == "secret" and not is_proven and row.kind != "probe" else PASSES


class House:
    def __init__(self, where: Where, neuron: RunningNeuron) -> None:
        self.where = where
        self.neuron = neuron
        self.private = Path(neuron.model).name.encode()

    async def knock(self, place: tuple[str, str], knock: Knock) -> Answer:
        method, pattern = place
        row, port, model = ROUTES[place], self.neuron.url.rpartition(":")[2], self.neuron.model
        path = (row.path or pattern).replace("MODEL", model)
        headers = [(name, value.replace("PORT", port)) for name, value in knock.headers]
        host = knock.host.replace("PORT", port)
        if knock.is_websocket:
            return await ask(self.neuron.url, "GET", path, host=host, headers=headers)
        body = {name: model if value == "MODEL" else value for name, value in (row.body or {}).items()} or None
        return await ask(self.neuron.url, method, path, body, host=host, headers=headers)

    async def state(self) -> tuple[Any, ...]:
        """What nobody may change who is not let in."""
        services = self.neuron.daemon.services
        models = [(model.id, model.state.phase, model.is_pinned) for model in services.manager.all()]
        text = services.metrics.render().decode()
        return models, re.findall(r"^neuron_(?:requests|prompt_tokens)_total\S* \S+$", text, re.M)

    async def put_back(self) -> None:
        await self.neuron.daemon.services.manager.load(ModelSpec(self.neuron.model))
        self.neuron.served.is_pinned = False


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["trusting", "secret"])
async def house(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    folder = tmp_path_factory.mktemp("doors")
    (folder / "secret").write_text(SECRET + "\n")
    own = {"secret": f"file:{folder / 'secret'}"} if request.param == "secret" else {}
    checkpoint = make_checkpoint(folder / "checkpoint-of-alice")
    async with run_neuron(checkpoint, allow_origins=(LISTED,), **own) as neuron:
        yield House(request.param, neuron)


async def test_H6_O12_O13_every_route_of_the_neuron_has_a_row(house: House) -> None:
    routes = NeuronApp(house.neuron.daemon.services).routes
    assert {(method, route.path) for route in routes for method in route.methods or () if method != "HEAD"} == set(
        ROUTES
    )


@pytest.mark.parametrize("name", KNOCKS)
async def test_H6_O12_O13_who_may_ask_the_neuron_what(house: House, name: str) -> None:
    knock = KNOCKS[name]
    found, wanted = {}, {}
    for place, row in ROUTES.items():
        wanted[place] = expected(house.where, row, knock)
        before = await house.state()
        answer = await house.knock(place, knock)
        found[place] = answer.status
        if wanted[place] == PASSES:
            assert answer.status == 200, (place, answer)
            found[place] = PASSES
            has_cors = answer.headers.get("access-control-allow-origin") == LISTED
            assert has_cors == (knock.page == "listed"), place
            if place[0] == "POST" and "/models/" in place[1]:
                await house.put_back()
            continue
        assert await house.state() == before, place
        assert house.private not in answer.body, (place, answer)
        assert not [header for header in answer.headers if header.startswith("access-control-")], (place, answer)
    assert found == wanted


async def test_H6_a_page_that_is_listed_gets_a_preflight_and_no_other_one(house: House) -> None:
    asked = (
        ("access-control-request-method", "POST"),
        ("access-control-request-headers", "content-type, x-cortex-hop"),
    )
    for path, origin, status in (
        ("/v1/chat/completions", LISTED, 204),
        ("/v1/chat/completions", "https://evil.example", 403),
        ("/models/unload", LISTED, 403),
    ):
        answer = await ask(house.neuron.url, "OPTIONS", path, headers=(*asked, ("origin", origin)))
        assert answer.status == status
        allowed = {name: value for name, value in answer.headers.items() if name.startswith("access-control-allow-")}
        assert allowed.get("access-control-allow-headers") == ("content-type" if status == 204 else None)
        assert allowed.get("access-control-allow-origin") == (LISTED if status == 204 else None)


async def test_O12_the_case_of_the_catalogue(house: House) -> None:
    """`curl -H 'Origin: http://evil.example' -H 'content-type: text/plain' -d … NEURON/models/unload`."""
    body = b'{"model_id": "%b"}' % house.neuron.model.encode()
    headers = (("origin", "http://evil.example"), ("content-type", "text/plain"))
    answer = await ask(house.neuron.url, "POST", "/models/unload", body, headers=headers)
    assert (answer.status, answer.code) == (403, "origin_not_allowed")
    assert house.neuron.served.state.phase == "loaded"


async def test_H6_an_older_gateway_may_pass_on_what_its_clients_browser_said(house: House) -> None:
    """It sends a header that no page can send without a preflight, which is refused; and only on what it relays."""
    body = {**CHAT, "model": house.neuron.model}
    headers = (*FOREIGN, ("sec-fetch-site", "cross-site"), ("x-cortex-hop", "1"), *PROOF)
    answer = await ask(house.neuron.url, "POST", "/v1/chat/completions", body, headers=headers)
    assert answer.status == 200
    for path in ("/models", "/health", "/metrics"):
        assert (await ask(house.neuron.url, "GET", path, headers=headers)).status == 403


async def test_H6_refusals_are_counted_and_logged_with_the_line_to_add_and_not_by_the_thousand(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    house.neuron.daemon.services.access._sparing._began = float("-inf")  # a minute later
    before = house.neuron.daemon.services.metrics.access_refused.labels("host")._value.get()
    for index in range(200):
        answer = await ask(house.neuron.url, "GET", "/models", host="models.lan" if index % 2 else f"n{index}.example")
        assert (answer.status, answer.code) == (421, "host_not_allowed")
    assert house.neuron.daemon.services.metrics.access_refused.labels("host")._value.get() == before + 200
    lines = [record.getMessage() for record in caplog.records if record.name == "neuron.daemon.api.access"]
    assert any('put into [server]: allowed_hosts = ["models.lan"]' in line for line in lines)
    assert len(lines) <= 10
