"""Keys and limits through a real gateway, on real sockets, in both dialects."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from cortex_core.catalogue import Catalogue, ModelProfile
from cortex_core.fleet import ModelCost
from cortex_gateway.identity.credentials import hash_text, new_key
from cortex_gateway.identity.sqlite_store import SqliteStore
from cortex_gateway.identity.store import StoreError

from tests.cortex_gateway.fake_neuron import OPENAI_EVENTS, FakeNeuron
from tests.cortex_gateway.gateway_client import MODEL, Client, Start
from tests.cortex_gateway.identity.harness import CHAT, MESSAGES, SECRET, ask, bearer

CATALOGUE = Catalogue(models=(ModelProfile(id=MODEL, cost=ModelCost(input=1.0, output=10.0)),), aliases={"fast": MODEL})
LIMIT = {"context": 200, "output": 50}


def key(secret: str = SECRET, key_id: str = "ci", **limits: Any) -> dict[str, Any]:
    return {"key_id": key_id, "account_id": "acme", "hash": hash_text(secret), **limits}


async def settled(client: Client) -> None:
    """Every request has ended and what it used is in the store."""
    gateway = client.started.gateway
    async with asyncio.timeout(20):
        await gateway.relay.wait_idle()
        await gateway.identity.bookkeeper.written()
    assert gateway.identity.bookkeeper.num_live == 0


async def booked(path: Path) -> dict[str, int]:
    store = SqliteStore(path)
    await store.open()
    found: dict[str, int] = {}
    for used in await store.usage():
        found[used.budget] = found.get(used.budget, 0) + used.amount
    await store.close()
    return found


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {SECRET}"},
        {"authorization": f"bEARER   {SECRET} "},
        {"x-api-key": SECRET},
        {"authorization": "Bearer wrong", "x-api-key": SECRET},
        {"authorization": f"Bearer {SECRET}", "x-api-key": "placeholder"},
        {"authorization": f"Bearer {SECRET}", "anthropic-version": "2026-10-21"},
        {"x-api-key": SECRET, "anthropic-version": "2023-06-01"},
    ],
)
@pytest.mark.parametrize("path", [CHAT, MESSAGES])
async def test_a_key_is_accepted_in_every_form_that_clients_use(
    neuron: FakeNeuron, start: Start, path: str, headers: dict[str, str]
) -> None:
    neuron.have(MODEL)
    client = await start(neuron, entitlements={"require_auth": True, "keys": [key()]})
    assert (await ask(client, headers, path=path))[0] == 200
    async with client.get("/v1/models", headers=headers) as response:
        assert response.status == 200


@pytest.mark.parametrize(
    "headers", [{}, {"authorization": "Bearer wrong"}, {"x-api-key": "wrong"}, {"authorization": SECRET}]
)
async def test_without_a_valid_key_it_is_a_401_in_the_words_of_the_dialect(
    neuron: FakeNeuron, start: Start, headers: dict[str, str]
) -> None:
    neuron.have(MODEL)
    client = await start(neuron, entitlements={"require_auth": True, "keys": [key()]})
    status, document, _ = await ask(client, headers)
    assert status == 401
    assert document["error"]["type"] == "invalid_request_error" and document["error"]["code"] == "invalid_api_key"
    assert document["error"].keys() >= {"message", "type", "param", "code"}
    status, document, answered = await ask(client, headers, path=MESSAGES)
    assert status == 401
    assert document["type"] == "error" and document["error"]["type"] == "authentication_error"
    assert document["request_id"] == answered["request-id"]
    for path in ("/v1/models", f"/v1/models/{MODEL}"):
        async with client.get(path, headers=headers) as response:
            assert response.status == 401
    assert not neuron.requests
    for path in ("/", "/health", "/api/hello"):
        async with client.get(path, headers=headers) as response:
            assert response.status == 200, "probes never need a key"
    async with client.session.options(client.url + CHAT) as response:
        assert response.status == 204


async def test_a_401_comes_before_the_body_is_read(neuron: FakeNeuron, start: Start) -> None:
    """Whoever has no key cannot make a gateway hold 32 MB."""
    client = await start(neuron, entitlements={"require_auth": True, "keys": [key()]})
    host, port = client.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/messages HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\nonly this")
    async with asyncio.timeout(20):
        assert (await reader.readline()).startswith(b"HTTP/1.1 401")
    writer.close()


async def test_G5_placeholder_keys_are_ignored_while_no_key_is_required(neuron: FakeNeuron, start: Start) -> None:
    neuron.have(MODEL)
    for entitlements in ({}, {"keys": [key(requests_per_minute=1)]}):
        client = await start(neuron, entitlements=entitlements)
        for headers in ({"authorization": "Bearer none"}, {"x-api-key": "sk-placeholder"}, {}):
            status, _, answered = await ask(client, headers)
            assert status == 200 and "x-ratelimit-limit-requests" not in answered
    assert not any("x-helexa-account-id" in headers for _, headers, _ in neuron.requests)


async def test_the_principal_travels_to_the_neuron_and_cannot_be_forged(neuron: FakeNeuron, start: Start) -> None:
    neuron.have(MODEL)
    client = await start(neuron, entitlements={"keys": [key()]})
    forged = {"x-helexa-account-id": "root", "x-helexa-key-id": "root", "x-cortex-principal": "root"}
    await ask(client, {**bearer(), **forged})
    await ask(client, forged)
    (_, known, _), (_, anonymous, _) = neuron.requests
    assert (known["x-helexa-account-id"], known["x-helexa-key-id"]) == ("acme", "ci")
    assert "x-cortex-principal" not in known
    assert not {"authorization", "x-api-key"} & known.keys()
    assert not any(name.startswith("x-helexa-") or name == "x-cortex-principal" for name in anonymous)


async def test_a_key_may_use_the_models_it_names_and_sees_no_others(neuron: FakeNeuron, start: Start) -> None:
    neuron.have(MODEL)
    neuron.have("other/model")
    keys = [key(models=["org/*"]), key("by-alias", "alias", models=["fast"]), key("nothing", "none", models=[])]
    client = await start(neuron, catalogue=CATALOGUE, entitlements={"keys": keys})
    assert (await ask(client, bearer()))[0] == 200
    assert (await ask(client, bearer(), model="fast"))[0] == 200, "its target is allowed"
    status, document, _ = await ask(client, bearer(), model="other/model")
    assert (status, document["error"]["code"], document["error"]["type"]) == (
        403,
        "model_not_allowed",
        "permission_error",
    )
    status, document, _ = await ask(client, bearer(), model="other/model", path=MESSAGES)
    assert (status, document["error"]["type"]) == (403, "permission_error")
    assert (await ask(client, bearer("by-alias"), model="fast"))[0] == 200
    assert (await ask(client, bearer("by-alias"), model=MODEL))[0] == 403, "the alias was allowed, not its target"
    assert (await ask(client, bearer("nothing")))[0] == 403
    for secret, visible in ((SECRET, {MODEL, "fast"}), ("by-alias", {"fast"}), ("nothing", set())):
        async with client.get("/v1/models", headers=bearer(secret)) as response:
            assert {entry["id"] for entry in json.loads(await response.read())["data"]} == visible
    async with client.get("/v1/models/other/model", headers=bearer()) as response:
        assert response.status == 404


async def test_requests_per_minute_are_counted_and_told(neuron: FakeNeuron, start: Start) -> None:
    neuron.have(MODEL)
    client = await start(neuron, entitlements={"keys": [key(requests_per_minute=2)]})
    _, _, first = await ask(client, bearer())
    assert (first["x-ratelimit-limit-requests"], first["x-ratelimit-remaining-requests"]) == ("2", "1")
    assert re.fullmatch(r"(1m)?[\d.]+s", first["x-ratelimit-reset-requests"])
    _, _, second = await ask(client, bearer(), path=MESSAGES)
    assert second["anthropic-ratelimit-requests-remaining"] == "0"
    reset = datetime.fromisoformat(second["anthropic-ratelimit-requests-reset"])
    assert 0 < reset.timestamp() - client.started.gateway.identity.clock.wall_ms() / 1000 <= 63
    for path, kind in ((CHAT, "rate_limit_error"), (MESSAGES, "rate_limit_error")):
        status, document, answered = await ask(client, bearer(), path=path)
        assert (status, document["error"]["type"]) == (429, kind)
        assert 1 <= int(answered["retry-after"]) <= 62
        assert answered.keys() >= {"x-request-id", "request-id"}
    assert document["error"]["details"]["error_code"] == "rate_limit_exceeded"
    assert len(neuron.requests) == 2
    assert await client.metric("cortex_key_refusals_total", account="acme", key="ci", reason="requests") == 2
    assert (await ask(client))[0] == 200, "others are not concerned"


async def test_concurrency_is_bounded_and_returns(neuron: FakeNeuron, start: Start) -> None:
    neuron.have(MODEL)
    neuron.answer_gate.clear()
    client = await start(neuron, entitlements={"keys": [key(max_concurrent_requests=1)]})
    running = asyncio.ensure_future(ask(client, bearer()))
    await neuron.request_arrived.wait()
    status, document, answered = await ask(client, bearer())
    assert (status, document["error"]["code"], answered["retry-after"]) == (429, "rate_limit_exceeded", "1")
    neuron.answer_gate.set()
    assert (await running)[0] == 200
    await settled(client)
    assert (await ask(client, bearer()))[0] == 200


async def test_tokens_per_minute_are_reserved_and_settled_by_real_use(neuron: FakeNeuron, start: Start) -> None:
    neuron.have(MODEL)
    neuron.answer_gate.clear()
    client = await start(neuron, entitlements={"keys": [key(tokens_per_minute=100)]})
    running = asyncio.ensure_future(ask(client, bearer(), max_tokens=60))
    await neuron.request_arrived.wait()
    status, document, answered = await ask(client, bearer(), max_tokens=60)
    assert status == 429 and document["error"]["unit"] == "tokens" and document["error"]["reserved"] > 60
    assert int(answered["x-ratelimit-remaining-tokens"]) < 40
    neuron.answer_gate.set()
    await running
    await settled(client)
    _, _, answered = await ask(client, bearer(), path="/v1/messages/count_tokens")
    assert answered["anthropic-ratelimit-tokens-remaining"] == "82", "11 + 7 were used, counting tokens uses none"
    assert (await ask(client, bearer(), max_tokens=50))[0] == 200


async def test_a_request_larger_than_the_minute_goes_when_nothing_else_does(neuron: FakeNeuron, start: Start) -> None:
    neuron.have(MODEL)
    client = await start(neuron, entitlements={"keys": [key(tokens_per_minute=100)]})
    assert (await ask(client, bearer(), max_tokens=128_000))[0] == 200
    await settled(client)
    assert (await ask(client, bearer(), max_tokens=128_000))[0] == 429


@asynccontextmanager
async def budgeted(
    start: Start, path: Path, *budgets: dict[str, Any], neurons: list[FakeNeuron], **fields: Any
) -> AsyncIterator[Client]:
    entitlements = {"store": f"sqlite:{path}", "keys": [key(budgets=list(budgets))], **fields}
    client = await start(*neurons, catalogue=CATALOGUE, entitlements=entitlements)
    yield client
    await settled(client)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, MESSAGES])
async def test_a_budget_is_settled_by_what_the_answer_really_used(
    neuron: FakeNeuron, start: Start, tmp_path: Path, path: str, stream: bool
) -> None:
    neuron.have(MODEL, limit=LIMIT)
    store = tmp_path / "cortex.db"
    budgets = [{"tokens": 1000}, {"cost_usd": 0.01, "window": {"kind": "fixed", "seconds": 3600}}]
    async with budgeted(start, store, *budgets, neurons=[neuron]) as client:
        body = {"model": MODEL, "messages": [], "stream": stream, "max_tokens": 20}
        async with client.post(path, body, headers=bearer()) as response:
            assert response.status == 200
            await response.read()
        await settled(client)
        for name, count in (("prompt_", 11), ("completion_", 7), ("", 18)):
            assert await client.metric(f"cortex_spend_{name}tokens_total", account="acme", key="ci") == count
    # 8 prompt tokens at 1 USD, 3 cached at the same, 7 at 10 USD per million.
    assert await booked(store) == {"tokens/balance": 18, "cost/fixed/3600": 81_000}


async def test_a_cap_is_never_overshot_by_requests_that_race(neuron: FakeNeuron, start: Start, tmp_path: Path) -> None:
    """Each may use 200 tokens (the window) and uses 18: of 40 at once only 5 may start, and 1000 is never passed."""
    neuron.have(MODEL, limit=LIMIT)
    neuron.answer_gate.clear()
    store = tmp_path / "cortex.db"
    async with budgeted(start, store, {"tokens": 1000}, neurons=[neuron]) as client:
        asking = [asyncio.ensure_future(ask(client, bearer(), max_tokens=500)) for _ in range(40)]
        refused = 0
        for done in asyncio.as_completed(asking):
            status, document, answered = await done
            if status == 429:
                refused += 1
                assert (document["error"]["used"], document["error"]["limit"]) == (0, 1000)
                assert answered["retry-after"] == "1", "what is reserved may settle at any moment"
            if refused == 35:
                break
        async with asyncio.timeout(20):
            while neuron.num_running < 5:
                await asyncio.sleep(0.01)
        neuron.answer_gate.set()
        for each in asking:
            await each
        await settled(client)
        assert await booked(store) == {"tokens/balance": 90}, "5 were let through, and no more"
        statuses = [(await ask(client, bearer(), max_tokens=500))[0] for _ in range(60)]
        await settled(client)
        # A request may start while 200 are free: 90 + 18 × n ≤ 800.
        assert statuses == [200] * statuses.count(200) + [429] * statuses.count(429)
        assert await booked(store) == {"tokens/balance": 90 + 18 * statuses.count(200)}
        assert 800 < 90 + 18 * statuses.count(200) <= 1000


async def test_a_spent_balance_is_insufficient_quota_and_not_worth_a_retry(
    neuron: FakeNeuron, start: Start, tmp_path: Path
) -> None:
    neuron.have(MODEL, limit=LIMIT)
    async with budgeted(start, tmp_path / "cortex.db", {"tokens": 210}, neurons=[neuron]) as client:
        assert (await ask(client, bearer()))[0] == 200
        await settled(client)
        status, document, answered = await ask(client, bearer(), max_tokens=500)
        assert (status, document["error"]["type"], document["error"]["code"]) == (
            429,
            "insufficient_quota",
            "insufficient_quota",
        )
        assert "retry-after" not in answered and answered["x-should-retry"] == "false"
        status, document, answered = await ask(client, bearer(), path=MESSAGES, max_tokens=500)
        assert (status, document["error"]["type"]) == (429, "rate_limit_error")
        assert answered["x-should-retry"] == "false"


async def test_a_spent_window_says_when_it_starts_anew(neuron: FakeNeuron, start: Start, tmp_path: Path) -> None:
    neuron.have(MODEL, limit=LIMIT)
    window = {"kind": "rolling", "seconds": 600}
    async with budgeted(start, tmp_path / "cortex.db", {"tokens": 210, "window": window}, neurons=[neuron]) as client:
        assert (await ask(client, bearer()))[0] == 200
        await settled(client)
        status, document, answered = await ask(client, bearer(), max_tokens=500)
        assert (status, document["error"]["code"]) == (429, "rate_limit_exceeded")
        assert 590 <= int(answered["retry-after"]) <= 611


async def test_a_budget_survives_the_gateway_and_is_shared_by_two(
    neuron: FakeNeuron, start: Start, tmp_path: Path
) -> None:
    neuron.have(MODEL, limit=LIMIT)
    store = tmp_path / "cortex.db"
    async with (
        budgeted(start, store, {"tokens": 400}, neurons=[neuron]) as first,
        budgeted(start, store, {"tokens": 400}, neurons=[neuron]) as second,
    ):
        neuron.answer_gate.clear()
        asking = [asyncio.ensure_future(ask(client, bearer(), max_tokens=500)) for client in (first, second) * 3]
        statuses = []
        for done in asyncio.as_completed(asking):
            statuses.append((await done)[0])
            if statuses.count(429) == 4:
                neuron.answer_gate.set()
        assert sorted(statuses) == [200, 200, 429, 429, 429, 429]
    async with budgeted(start, store, {"tokens": 235}, neurons=[neuron]) as third:
        assert (await ask(third, bearer(), max_tokens=500))[0] == 429, "36 are spent, 200 may be needed"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_hangs_up_pays_for_what_was_generated(
    neuron: FakeNeuron, start: Start, tmp_path: Path, stream: bool
) -> None:
    neuron.have(MODEL, limit=LIMIT)
    neuron.answer_gate.clear()
    store = tmp_path / "cortex.db"
    async with budgeted(start, store, {"tokens": 1000}, neurons=[neuron]) as client:
        body = {"model": MODEL, "messages": [], "stream": stream, "max_tokens": 150}
        asking = asyncio.ensure_future(_hang_up(client, body, stream))
        await neuron.request_arrived.wait()
        if not stream:
            asking.cancel()
        await asyncio.wait({asking})
        await neuron.request_aborted.wait()
        await settled(client)
    prompt = len(json.dumps(body)) // 4 + 1
    (used,) = (await booked(store)).values()
    if stream:
        assert used == prompt + len(OPENAI_EVENTS)
    else:
        assert prompt < used <= prompt + 150


async def _hang_up(client: Client, body: dict[str, Any], stream: bool) -> None:
    async with client.post(CHAT, body, headers=bearer()) as response:
        await response.content.readexactly(sum(map(len, OPENAI_EVENTS)) if stream else 10**9)
        response.close()


async def test_what_a_neuron_refuses_or_fails_costs_nothing(neuron: FakeNeuron, start: Start, tmp_path: Path) -> None:
    neuron.have(MODEL, limit=LIMIT)
    store = tmp_path / "cortex.db"

    async def refuse(request: web.Request) -> web.StreamResponse:
        return web.json_response({"error": {"message": "no", "type": "x", "code": "y", "param": None}}, status=400)

    async def fail(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async with budgeted(start, store, {"tokens": 1000}, neurons=[neuron]) as client:
        neuron.answer = refuse
        assert (await ask(client, bearer()))[0] == 400
        neuron.answer = fail
        assert (await ask(client, bearer()))[0] == 502
        assert (await ask(client, bearer(), model="nobody"))[0] == 404
        neuron.answer = None
        assert (await ask(client, bearer(), path="/v1/messages/count_tokens"))[0] == 200
        await settled(client)
    assert await booked(store) == {}


async def test_a_client_gone_while_its_reservation_is_made_leaves_none(
    neuron: FakeNeuron, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    neuron.have(MODEL, limit=LIMIT)
    store = tmp_path / "cortex.db"
    begun, may_go_on = asyncio.Event(), asyncio.Event()
    reserve = SqliteStore.reserve

    async def slow(self: SqliteStore, *arguments: Any) -> Any:
        begun.set()
        await may_go_on.wait()
        return await reserve(self, *arguments)

    async with budgeted(start, store, {"tokens": 200}, neurons=[neuron]) as client:
        monkeypatch.setattr(SqliteStore, "reserve", slow)
        asking = asyncio.ensure_future(ask(client, bearer(), max_tokens=500))
        await begun.wait()
        asking.cancel()
        async with asyncio.timeout(20):
            await client.started.gateway.relay.wait_idle()
        may_go_on.set()
        monkeypatch.undo()
        assert not neuron.requests
        async with asyncio.timeout(20):
            while client.started.gateway.identity.bookkeeper.num_live:
                await asyncio.sleep(0)
                await client.started.gateway.identity.bookkeeper.written()
        assert (await ask(client, bearer(), max_tokens=500))[0] == 200


async def test_without_its_store_nothing_is_spent_and_a_retry_is_advised(
    neuron: FakeNeuron, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fail closed: what cannot be checked is not allowed, and says that it is not the client's fault."""
    neuron.have(MODEL, limit=LIMIT)

    async def fail(self: SqliteStore, *arguments: Any) -> Any:
        raise StoreError("disk I/O error")

    async with budgeted(start, tmp_path / "cortex.db", {"tokens": 400}, neurons=[neuron], require_auth=True) as client:
        with monkeypatch.context() as broken:
            broken.setattr(SqliteStore, "reserve", fail)
            status, document, answered = await ask(client, bearer())
            assert (status, document["error"]["code"], answered["retry-after"]) == (503, "service_unavailable", "5")
            assert (await ask(client, bearer(), path=MESSAGES))[0] == 529
            broken.setattr(SqliteStore, "version", fail)
            async with asyncio.timeout(30):
                while (await ask(client, bearer("a-new-key")))[0] != 503:
                    await asyncio.sleep(0.05)  # until it has looked again
        assert not neuron.requests
        assert (await ask(client, bearer()))[0] == 200


async def test_admin_routes_answer_admin_keys_and_the_loopback(neuron: FakeNeuron, start: Start) -> None:
    neuron.have(MODEL)
    keys = [key(), key("boss", "boss", admin=True)]
    proxied = {"x-forwarded-for": "203.0.113.9"}
    for from_loopback, require_auth in ((True, True), (True, False), (False, False), (False, True)):
        section = {"admin_from_loopback": from_loopback, "require_auth": require_auth, "keys": keys}
        client = await start(neuron, entitlements=section)
        for headers, allowed in (
            ({}, from_loopback),
            (bearer(), from_loopback),
            (proxied, False),
            ({**bearer(), **proxied}, False),
            ({**bearer("boss"), **proxied}, True),
            ({"x-api-key": "boss", "origin": "https://page.example"}, False),
            ({"x-api-key": "boss", "origin": client.url}, True),
            ({"origin": "https://page.example"}, False),
        ):
            async with client.get("/admin/fleet", headers=headers) as response:
                document = json.loads(await response.read())
                assert response.status == (200 if allowed else 403), (headers, document)
                assert allowed or document["error"]["code"] == "admin_forbidden"


async def test_no_secret_appears_in_logs_metrics_or_answers(
    neuron: FakeNeuron, start: Start, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    neuron.have(MODEL, limit=LIMIT)
    caplog.set_level(logging.DEBUG)
    plain, wrong = "plain-" + new_key(), "wrong-" + new_key()
    keys = [
        key(requests_per_minute=2, budgets=[{"tokens": 500}]),
        {"account_id": "legacy", "key": plain, "hard_cap": 100, "window": {"kind": "rolling", "seconds": 60}},
    ]
    client = await start(
        neuron, entitlements={"require_auth": True, "store": f"sqlite:{tmp_path}/cortex.db", "keys": keys}
    )
    seen: list[str] = []
    for headers in (bearer(), bearer(), bearer(), bearer(plain), {"x-api-key": wrong}):
        for fields in ({}, {"model": "nobody"}, {"max_tokens": 1000, "path": MESSAGES}):
            seen += [str(await ask(client, headers, **fields))]
    async with client.session.get(client.started.metrics_url + "/metrics") as response:
        seen.append(await response.text())
    await settled(client)
    everything = "\n".join([*seen, caplog.text])
    assert "legacy" in everything and '"key":"ci"' in everything and 'key="ci"' in everything
    for secret in (SECRET, plain, wrong, hash_text(SECRET), hash_text(plain)):
        assert secret not in everything


def salt_of(neuron: FakeNeuron) -> str | None:
    return neuron.requests[-1][1].get("x-cortex-cache-salt")


TWO_ACCOUNTS = [
    key("sk-one-one", "one"),
    key("sk-two-two", "two"),
    key("sk-other-other", "other") | {"account_id": "b"},
]


async def test_H10_each_account_has_prefixes_of_its_own_and_its_keys_share_them(
    neuron: FakeNeuron, start: Start
) -> None:
    neuron.have(MODEL)
    client = await start(neuron, entitlements={"keys": TWO_ACCOUNTS})
    salts = []
    for secret in ("sk-one-one", "sk-two-two", "sk-other-other"):
        assert (await ask(client, bearer(secret) | {"x-cortex-cache-salt": "chosen by a client"}))[0] == 200
        salts.append(salt_of(neuron))
    assert salts[0] == salts[1] != salts[2] and None not in salts
    assert "acme" not in str(salts[0]), "a digest: it goes into what other hosts keep"
    assert (await ask(client, {"x-cortex-cache-salt": str(salts[0])}))[0] == 200
    assert salt_of(neuron) is None


async def test_H10_accounts_may_share_their_prefixes(neuron: FakeNeuron, start: Start) -> None:
    neuron.have(MODEL)
    client = await start(neuron, entitlements={"keys": TWO_ACCOUNTS, "share_prefixes": True})
    assert (await ask(client, bearer("sk-one-one")))[0] == 200
    assert salt_of(neuron) is None


async def test_H10_an_account_is_not_led_where_another_ones_prompt_is_known(
    neuron: FakeNeuron, second: FakeNeuron, start: Start
) -> None:
    for each in (neuron, second):
        each.have(MODEL)
    client = await start(neuron, second, entitlements={"keys": TWO_ACCOUNTS})
    prompt = [{"role": "user", "content": "secret " * 2000}]

    async def route(secret: str) -> str:
        return (await ask(client, bearer(secret), messages=prompt))[2]["x-cortex-route"]

    assert [await route("sk-one-one") for _ in range(2)] == ["loaded", "prefix"]
    assert [await route("sk-other-other") for _ in range(2)] == ["loaded", "prefix"]
    assert await route("sk-two-two") == "prefix"


PRIORITIES = [
    key("sk-usual", "usual"),
    key("sk-batch", "batch") | {"priority": "low"},
    key("sk-ours", "ours") | {"priority": "high"},
]


@pytest.mark.parametrize(
    ("secret", "asked", "sent"),
    [
        ("sk-usual", None, None),
        ("sk-usual", "high", None),
        ("sk-usual", "low", "low"),
        ("sk-batch", None, "low"),
        ("sk-batch", "high", "low"),
        ("sk-ours", None, None),
        ("sk-ours", "high", "high"),
        ("sk-ours", "low", "low"),
        (None, "high", None),
        (None, "highest", None),
    ],
)
async def test_a_requests_priority_is_at_most_that_of_its_key(
    neuron: FakeNeuron, start: Start, secret: str | None, asked: str | None, sent: str | None
) -> None:
    neuron.have(MODEL)
    client = await start(neuron, entitlements={"keys": PRIORITIES})
    headers = ({} if asked is None else {"x-cortex-priority": asked}) | (bearer(secret) if secret else {})
    assert (await ask(client, headers))[0] == 200
    assert neuron.requests[-1][1].get("x-cortex-priority") == sent


async def test_a_priority_that_is_none_is_refused_with_the_words_there_are(neuron: FakeNeuron, start: Start) -> None:
    neuron.have(MODEL)
    client = await start(neuron, entitlements={"keys": PRIORITIES})
    status, body, _ = await ask(client, bearer("sk-ours") | {"x-cortex-priority": "highest"})
    assert (status, body["error"]["param"]) == (400, "x-cortex-priority")
    assert "low, normal, high" in body["error"]["message"] and not neuron.requests
