"""A request under which two processes end is refused; nobody else's is."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from aiohttp import web
from cortex_core.dialects.errors import DialectName, error_body
from cortex_core.errors import ApiError
from cortex_core.hop import StreamHead, stream_comment, tokens_comment, unfinished_comment
from cortex_gateway.relay import blame
from cortex_gateway.relay.errors import ended_engine

from tests.cortex_gateway.fake_neuron import FakeNeuron, listening
from tests.cortex_gateway.gateway_client import MODEL, Client, Start

INSTANCES = itertools.count()
HEAD = stream_comment(StreamHead("chatcmpl-1", 5, (7,)))
WHOLE = {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}


class Mortal:
    """A neuron whose process ends where a word occurs in a request, with all that it has under way, and is back soon as
    another process. `gate`: other requests are answered once it is set."""

    def __init__(self, neuron: FakeNeuron, *, is_old: bool = False, opens_streams: bytes = b"") -> None:
        self.neuron = neuron
        self.num_ends = 0
        self.before_end: Callable[[], None] = lambda: None
        self.gate = asyncio.Event()
        self.gate.set()
        self.opens_streams = opens_streams
        self.is_old = is_old
        self._at_work: dict[int, web.Request] = {}
        neuron.have(MODEL)
        neuron.answer = self._answer
        self._begin(uptime_s=50)

    def _begin(self, *, uptime_s: int) -> None:
        self.neuron.health_extra = {"uptime_secs": uptime_s}
        if not self.is_old:  # an uptime says nothing of a process that is as young as the last one was
            self.neuron.health_extra |= {"uptime_secs": 0, "instance": f"i{next(INSTANCES)}"}

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = self.neuron.requests[-1][2]
        self._at_work[id(request)] = request
        try:
            response: web.StreamResponse | None = None
            if self.opens_streams and b'"stream": true' in body:  # maybe behind what is to be gone on with
                response = await FakeNeuron.begin_stream(request)
                await response.write(HEAD + self.opens_streams)
            if b"poison" in body:
                self.end()
                return response or web.Response()
            await self.gate.wait()
            return web.json_response(WHOLE)
        finally:
            del self._at_work[id(request)]

    def end(self) -> None:
        self.num_ends += 1
        self.before_end()
        for request in list(self._at_work.values()):
            if request.transport is not None:
                request.transport.abort()
        self.neuron.is_down = True
        asyncio.get_running_loop().call_later(0.15, self._come_back)

    def _come_back(self) -> None:
        self.neuron.is_down = False
        self._begin(uptime_s=0)


def asked(word: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": word}], **fields}


def num_requests(*neurons: FakeNeuron) -> int:
    return sum(len(neuron.requests) for neuron in neurons)


async def nothing_is_held_against(client: Client) -> None:
    assert not dict(client.started.gateway.fleet.breakers.items())
    async with client.get("/admin/fleet?refresh=1") as response:
        nodes = json.loads(await response.read())["nodes"]
    assert {node["health"] for node in nodes} == {"healthy"}
    for _ in range(4):
        assert (await client.chat(**asked("fine")))[0] == 200


@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.parametrize("stream", [False, True])
async def test_H2_two_ends_without_a_byte_blame_the_request(
    neuron: FakeNeuron, second: FakeNeuron, start: Start, stream: bool, is_old: bool
) -> None:
    mortals = [Mortal(each, is_old=is_old) for each in (neuron, second)]
    client = await start(neuron, second)
    for _ in range(2):  # a client asks again by itself: no third process ends
        status, document = await client.chat(**asked("poison", stream=stream))
        assert (status, document["error"]["code"]) == (400, "request_kills_engine")
        assert document["error"]["deaths"] == 2
        assert [each.num_ends for each in mortals] == [1, 1]
    assert await client.metric("cortex_rejected_requests_total", code="request_kills_engine") == 2
    for stage in ("died", "again"):
        assert await client.metric("cortex_blamed_requests_total", model=MODEL, stage=stage) == 1
    await nothing_is_held_against(client)


PING = b": ping\n\n"
OPENING = b'data: {"id":"chatcmpl-1","choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'
KEPT_WAITING = {
    "a ping": PING,
    "an opening": OPENING + tokens_comment([]),
    "an opening and pings": OPENING + tokens_comment([]) + PING + tokens_comment([]) + PING + tokens_comment([]),
}


@pytest.mark.parametrize("opening", KEPT_WAITING)
async def test_H2_what_keeps_a_stream_waiting_is_no_answer(
    neuron: FakeNeuron, second: FakeNeuron, start: Start, opening: str
) -> None:
    """A stream that has begun, with nothing in it yet, would be taken elsewhere eight times."""
    mortals = [Mortal(each, opens_streams=KEPT_WAITING[opening]) for each in (neuron, second)]
    client = await start(neuron, second, gateway={"stream_hold_s": 0.0, "ping_interval_s": 0.05})
    body = {"model": MODEL, **asked("poison", stream=True)}
    async with client.post("/v1/chat/completions", body) as response:
        events = await response.read()
    assert b'"code":"request_kills_engine"' in events and b"[DONE]" not in events
    assert sum(each.num_ends for each in mortals) == 2
    await nothing_is_held_against(client)


async def test_H2_whoever_was_there_at_both_ends_is_answered(
    neuron: FakeNeuron, second: FakeNeuron, start: Start
) -> None:
    mortals = [Mortal(each) for each in (neuron, second)]
    for each in mortals:
        each.gate.clear()
    client = await start(neuron, second)
    innocent = [asyncio.ensure_future(client.chat(**asked(f"innocent {number:02}"))) for number in range(6)]
    async with asyncio.timeout(20):
        while num_requests(neuron, second) < 6:
            await asyncio.sleep(0.01)
    status, document = await client.chat(**asked("poison"))
    assert (status, document["error"]["code"]) == (400, "request_kills_engine")
    assert sum(each.num_ends for each in mortals) == 2
    for each in mortals:
        each.gate.set()
    assert [status for status, _ in await asyncio.gather(*innocent)] == [200] * 6
    assert sum(each.num_ends for each in mortals) == 2
    await nothing_is_held_against(client)


async def test_H5_a_killed_neuron_costs_its_unstreamed_requests_one_wait_and_not_one_for_each(
    neuron: FakeNeuron, second: FakeNeuron, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Turns that never end: whoever had to wait for one is asked all the same."""
    monkeypatch.setattr(blame, "SHORTEST_TURN_S", 3600.0)
    monkeypatch.setattr(blame, "LONGEST_WAIT_S", 0.2)
    mortals = [Mortal(each) for each in (neuron, second)]
    for each in mortals:
        each.gate.clear()
    client = await start(neuron, second)
    asking = [asyncio.ensure_future(client.chat(**asked(f"innocent {number:02}"))) for number in range(20)]
    async with asyncio.timeout(20):
        while num_requests(neuron, second) < 20:
            await asyncio.sleep(0.01)
    num_ended = len(neuron.requests)
    assert num_ended > 4, "more than there are nodes to have a turn on"
    mortals[0].end()
    async with asyncio.timeout(20):
        while num_requests(neuron, second) < 20 + num_ended:
            await asyncio.sleep(0.01)
    for each in mortals:
        each.gate.set()
    assert [status for status, _ in await asyncio.gather(*asking)] == [200] * 20
    await nothing_is_held_against(client)


async def test_H2_the_same_request_many_times_at_once_ends_no_more(
    neuron: FakeNeuron, second: FakeNeuron, start: Start
) -> None:
    mortals = [Mortal(each) for each in (neuron, second)]
    client = await start(neuron, second)
    answers = await asyncio.gather(*(client.chat(**asked("poison")) for _ in range(12)))
    assert {(status, document["error"]["code"]) for status, document in answers} == {(400, "request_kills_engine")}
    # Both had some of them before anything was known.
    assert sum(each.num_ends for each in mortals) <= 3


async def test_H2_a_client_that_comes_again_to_the_only_neuron_is_known(neuron: FakeNeuron, start: Start) -> None:
    """Each of its requests ends one process, and finds nobody else to ask."""
    mortal = Mortal(neuron)
    client = await start(neuron)
    codes = []
    for _ in range(4):
        _, document = await client.chat(**asked("poison"))
        codes.append(document["error"]["code"])
    assert mortal.num_ends == 2 and codes[-2:] == ["request_kills_engine"] * 2
    await nothing_is_held_against(client)


async def test_H2_where_nothing_listens_the_process_has_ended_and_the_node_is_asked_no_more(start: Start) -> None:
    gone = FakeNeuron("gone")
    async with listening(gone):
        gone.have(MODEL)
        client = await start(gone)

        async def hang(request: web.Request) -> web.StreamResponse:
            await asyncio.Event().wait()
            raise AssertionError("nobody is here any more")

        gone.answer = hang
        asking = asyncio.ensure_future(client.chat(**asked("anything")))
        await gone.request_arrived.wait()
    status, document = await asking
    assert (status, document["error"]["code"]) == (503, "service_unavailable")
    assert client.started.gateway.fleet.snapshot.nodes["gone"].health == "unhealthy"


async def test_H2_a_connection_that_was_cut_blames_nobody(neuron: FakeNeuron, second: FakeNeuron, start: Start) -> None:
    for each in (neuron, second):
        each.have(MODEL)
        each.health_extra = {"uptime_secs": 50, "instance": each.name}

        async def cut(request: web.Request) -> web.StreamResponse:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()

        each.answer = cut
    client = await start(neuron, second)
    for _ in range(3):
        status, document = await client.chat(**asked("poison"))
        assert (status, document["error"]["code"]) == (502, "upstream_connection_error")
    assert num_requests(neuron, second) == 6
    for each in (neuron, second):
        each.answer = None
    assert (await client.chat(**asked("poison")))[0] == 200


async def test_H2_one_end_is_asked_elsewhere(neuron: FakeNeuron, second: FakeNeuron, start: Start) -> None:
    mortal = Mortal(neuron)
    second.have(MODEL)
    client = await start(neuron, second)
    for _ in range(4):
        assert (await client.chat(**asked("poison")))[0] == 200
    assert mortal.num_ends >= 1


@pytest.mark.parametrize("code", ["request_kills_engine", "engine_fault"])
@pytest.mark.parametrize("stream", [False, True])
async def test_H2_what_a_neuron_blames_is_refused_by_all_and_not_held_against_the_neuron(
    neuron: FakeNeuron, second: FakeNeuron, start: Start, code: str, stream: bool
) -> None:
    """`engine_fault` is what older neurons call it, and their 500 would open a breaker."""
    text = b'{"error":{"message":"it ends engines","type":"x","param":null,"code":"%s"}}' % code.encode()

    async def blames(request: web.Request) -> web.StreamResponse:
        if stream:
            response = await FakeNeuron.begin_stream(request)
            await response.write(b"data: " + text + b"\n\n")
            await response.write_eof()
            return response
        status = 400 if code == "request_kills_engine" else 500
        return web.Response(body=text, status=status, content_type="application/json")

    for each in (neuron, second):
        each.have(MODEL)
        each.answer = blames
    client = await start(neuron, second, breaker={"failures": 1})
    body = {"model": MODEL, **asked("poison", stream=stream)}
    async with client.post("/v1/chat/completions", body) as response:
        assert code.encode() in await response.read()
    async with client.post("/v1/chat/completions", body) as response:
        assert response.status == 400 and b"request_kills_engine" in await response.read()
    assert num_requests(neuron, second) == 1
    assert await client.metric("cortex_blamed_requests_total", model=MODEL, stage="engine") == 1
    for each in (neuron, second):
        each.answer = None
    await nothing_is_held_against(client)


def loses_engines(neuron: FakeNeuron, names: Iterator[str] | None, *, opens_streams: bool = False) -> None:
    """Its engines end under "poison" and do not come back; the neuron lives, and says so if it has names for them."""

    async def answer(request: web.Request) -> web.StreamResponse:
        body = neuron.requests[-1][2]
        if b"poison" not in body:
            return web.json_response(WHOLE)
        name = None if names is None else next(names)
        extras = {} if name is None else {"ended_engine": name}
        error = engine_restarting(**extras)
        if opens_streams:
            response = await FakeNeuron.begin_stream(request)
            await response.write(HEAD + b": ping\n\n" + tokens_comment([]))
            await response.write(unfinished_comment(name) + b"data: " + error + b"\n\n")
            await response.write_eof()
            return response
        return web.Response(body=error, status=503, content_type="application/json", headers={"retry-after": "1"})

    neuron.have(MODEL)
    neuron.answer = answer


def engine_restarting(**extras: str) -> bytes:
    error = {"message": "gone", "type": "server_error", "param": None, "code": "engine_restarting", **extras}
    return json.dumps({"error": error}, separators=(",", ":")).encode()


def names_of_engines() -> Iterator[str]:
    return (f"a1-{number}" for number in itertools.count())


@pytest.mark.parametrize(("stream", "opens_streams"), [(False, False), (True, False), (True, True)])
async def test_H2_two_engines_that_end_under_living_neurons_blame_the_request(
    neuron: FakeNeuron, second: FakeNeuron, start: Start, stream: bool, opens_streams: bool
) -> None:
    names = names_of_engines()
    for each in (neuron, second):
        loses_engines(each, names, opens_streams=opens_streams)
    client = await start(neuron, second)
    body = {"model": MODEL, **asked("poison", stream=stream)}
    for _ in range(2):
        async with client.post("/v1/chat/completions", body) as response:
            assert b'"code":"request_kills_engine"' in await response.read()
    assert next(names) == "a1-2", "two engines, and no third when the client asks again"
    assert await client.metric("cortex_blamed_requests_total", model=MODEL, stage="died") == 1
    await nothing_is_held_against(client)


@pytest.mark.parametrize("dialect", ["openai", "anthropic"])
def test_H2_the_name_of_an_engine_is_found_in_errors_of_both_dialects_and_not_in_words_about_it(
    dialect: DialectName,
) -> None:
    error = ApiError("overloaded", 'it says "ended_engine":"b2-0"', code="engine_restarting")
    assert ended_engine(error_body(error, dialect, "req_1")) is None
    error.extras["ended_engine"] = "a1-0"
    assert ended_engine(error_body(error, dialect, "req_1")) == "a1-0"
    assert ended_engine(unfinished_comment("a1-0")) == "a1-0" and ended_engine(unfinished_comment(None)) is None


async def test_H2_an_engine_and_a_daemon_make_two(neuron: FakeNeuron, second: FakeNeuron, start: Start) -> None:
    mortal = Mortal(neuron)
    names = names_of_engines()
    loses_engines(second, names)
    client = await start(neuron, second)
    status, document = await client.chat(**asked("poison"))
    assert (status, document["error"]["code"], document["error"]["deaths"]) == (400, "request_kills_engine", 2)
    assert (mortal.num_ends, next(names)) == (1, "a1-1")


@pytest.mark.parametrize("name", [None, "a1-0"])
async def test_H2_an_engine_that_ended_once_or_has_no_name_blames_nobody(
    neuron: FakeNeuron, start: Start, name: str | None
) -> None:
    """Older neurons do not say whether the request was in the engine."""
    loses_engines(neuron, None if name is None else itertools.repeat(name))
    client = await start(neuron)
    for _ in range(3):
        status, document = await client.chat(**asked("poison"))
        assert (status, document["error"]["code"]) == (503, "engine_restarting")


async def test_H2_a_node_that_is_being_stopped_blames_nobody(
    neuron: FakeNeuron, second: FakeNeuron, start: Start
) -> None:
    """A restart of one after the other: each drains, and cuts what is not done in time."""
    mortals = [Mortal(each) for each in (neuron, second)]
    client = await start(neuron, second)
    fleet = client.started.gateway.fleet
    for mortal in mortals:

        def stop(mortal: Mortal = mortal) -> None:
            node = fleet.snapshot.nodes[mortal.neuron.name]
            fleet.snapshot = msgspec.structs.replace(
                fleet.snapshot,
                nodes={**fleet.snapshot.nodes, node.name: msgspec.structs.replace(node, is_draining=True)},
            )

        mortal.before_end = stop
    for num_ends in (2, 4):
        status, document = await client.chat(**asked("poison"))
        assert (status, document["error"]["code"]) == (502, "upstream_connection_error")
        assert sum(mortal.num_ends for mortal in mortals) == num_ends
        async with asyncio.timeout(20):
            while any(mortal.neuron.is_down for mortal in mortals):
                await asyncio.sleep(0.01)
        async with client.get("/admin/fleet?refresh=1") as response:
            assert response.status == 200


@pytest.mark.parametrize(
    "last",
    [
        {"choices": [{"delta": {"content": 'the "code":"request_kills_engine" of an error'}}]},
        {"response": {"metadata": {"code": "request_kills_engine"}}},
    ],
)
async def test_H2_an_answer_that_only_speaks_of_it_blames_nobody(
    neuron: FakeNeuron, start: Start, last: dict[str, Any]
) -> None:
    async def speaks(request: web.Request) -> web.StreamResponse:
        response = await FakeNeuron.begin_stream(request)
        await response.write(b"data: " + json.dumps(last, separators=(",", ":")).encode() + b"\n\n")
        await response.write_eof()
        return response

    neuron.have(MODEL)
    neuron.answer = speaks
    client = await start(neuron)
    for _ in range(2):
        async with client.post("/v1/chat/completions", {"model": MODEL, **asked("x", stream=True)}) as response:
            assert response.status == 200 and b"request_kills_engine" in await response.read()
