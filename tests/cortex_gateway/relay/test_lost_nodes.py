"""Nodes that do not answer: known once for all their requests, and whatever can go elsewhere goes there at once."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from cortex_core.hop import ChoiceTokens, StreamHead, stream_comment, tokens_comment

from tests.cortex_gateway.fake_neuron import OPENAI_END, FakeNeuron, Handler, listening
from tests.cortex_gateway.fake_openai import MODEL as FOREIGN
from tests.cortex_gateway.fake_openai import FakeOpenAI
from tests.cortex_gateway.fake_openai import listening as openai_listening
from tests.cortex_gateway.gateway_client import MODEL, Client, Start, until

BODY = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "stream": True}
IMPATIENT = {"stream_silence_s": 1.0, "ping_interval_s": 0.05, "stream_hold_s": 0.1}
POLLS = {"interval_s": 0.2, "timeout_s": 0.2}
HEAD = stream_comment(StreamHead("chatcmpl-1", 5, (7,)))


class Stopped:
    """A neuron whose process is stopped, as by SIGSTOP: connections stand, and nothing is answered any more, polls
    neither. Streams have written a token before."""

    def __init__(self, neuron: FakeNeuron, *, is_deaf_to_polls: bool = True) -> None:
        self.neuron = neuron
        self.is_deaf_to_polls = is_deaf_to_polls
        neuron.have(MODEL)
        neuron.answer = self._answer

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        if b'"stream": true' in self.neuron.requests[-1][2]:
            response = await FakeNeuron.begin_stream(request)
            await response.write(HEAD + b"data: 1\n\n" + tokens_comment([ChoiceTokens(0, [1])]))
        await asyncio.Event().wait()
        raise AssertionError

    def stop(self) -> None:
        self.neuron.models_hang = self.is_deaf_to_polls


def going_on(neuron: FakeNeuron) -> Handler:
    async def answer(request: web.Request) -> web.StreamResponse:
        if b'"stream": true' not in neuron.requests[-1][2]:
            return web.json_response({"choices": []})
        response = await FakeNeuron.begin_stream(request)
        await response.write(HEAD + b"data: 2\n\n" + tokens_comment([ChoiceTokens(0, [2])]) + OPENAI_END)
        await response.write_eof()
        return response

    neuron.have(MODEL)
    return answer


async def streamed(client: Client) -> tuple[int, bytes]:
    async with client.post("/v1/chat/completions", BODY) as response:
        return response.status, await response.read()


async def under_way(count: int, *neurons: FakeNeuron) -> None:
    async with asyncio.timeout(10):
        while sum(neuron.num_running for neuron in neurons) < count:
            await asyncio.sleep(0.01)


@asynccontextmanager
async def unreachable() -> AsyncIterator[str]:
    """An address where no connection comes about: a full backlog, as of a host that takes no more SYNs."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        filling = []
        for _ in range(4):
            one = socket.socket()
            one.setblocking(False)
            one.connect_ex(listener.getsockname())
            filling.append(one)
        await asyncio.sleep(0.05)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            for one in filling:
                one.close()


async def test_H4_all_streams_of_a_stopped_node_go_on_at_once_after_one_look(
    neuron: FakeNeuron, second: FakeNeuron, start: Start
) -> None:
    stopped = Stopped(neuron)
    client = await start(neuron, second, gateway=IMPATIENT, poll=POLLS)
    streams = [asyncio.ensure_future(streamed(client)) for _ in range(20)]
    await under_way(20, neuron)
    second.answer = going_on(second)
    calls_before = neuron.count("GET /models")
    stopped.stop()
    answers = await asyncio.gather(*streams)
    assert all(status == 200 and OPENAI_END in data for status, data in answers)
    assert all(data.count(b"data: 1\n") == 1 and data.count(b"data: 2\n") == 1 for _, data in answers)
    assert len(second.requests) == 20
    # One look for each stream would be twenty: the polls of a node in doubt are all there are.
    assert neuron.count("GET /models") - calls_before < 12


async def test_U16_H5_unstreamed_requests_of_a_stopped_node_are_asked_elsewhere_once(
    neuron: FakeNeuron, second: FakeNeuron, start: Start
) -> None:
    stopped = Stopped(neuron)
    client = await start(neuron, second, gateway=IMPATIENT, poll=POLLS)
    requests = [asyncio.ensure_future(client.chat()) for _ in range(8)]
    await under_way(8, neuron)
    second.answer = going_on(second)
    stopped.stop()
    assert [status for status, _ in await asyncio.gather(*requests)] == [200] * 8
    assert len(second.requests) == 8
    assert client.started.gateway.fleet.snapshot.nodes["alpha"].health == "unhealthy"
    assert not dict(client.started.gateway.fleet.breakers.items())


async def test_U16_new_requests_to_a_node_that_was_just_stopped_are_answered(
    neuron: FakeNeuron, second: FakeNeuron, start: Start
) -> None:
    stopped = Stopped(neuron)
    second.answer = going_on(second)
    client = await start(neuron, second, gateway=IMPATIENT, poll=POLLS)
    stopped.stop()
    answers = await asyncio.gather(*(client.chat() for _ in range(8)), *(streamed(client) for _ in range(8)))
    assert [status for status, _ in answers] == [200] * 16
    assert neuron.requests  # some of them were given to it


async def test_U16_where_there_is_no_other_node_requests_are_held_until_it_is_back(
    neuron: FakeNeuron, start: Start
) -> None:
    stopped = Stopped(neuron)
    client = await start(neuron, gateway=IMPATIENT, poll=POLLS)
    requests = [asyncio.ensure_future(client.chat()) for _ in range(3)]
    stream = asyncio.ensure_future(streamed(client))
    await under_way(4, neuron)
    stopped.stop()
    await until(lambda: client.started.gateway.fleet.snapshot.nodes["alpha"].health == "unhealthy", client)
    assert not any(each.done() for each in (*requests, stream))
    neuron.answer = going_on(neuron)
    neuron.models_hang = False
    assert [status for status, _ in await asyncio.gather(*requests)] == [200] * 3
    assert (await stream)[1].count(b"data: 2\n") == 1


async def test_H5_a_node_that_answers_its_polls_keeps_its_long_unstreamed_answers(
    neuron: FakeNeuron, second: FakeNeuron, start: Start
) -> None:
    """A long answer that is not streamed is silent by nature."""
    neuron.have(MODEL)
    neuron.answer_gate.clear()
    client = await start(neuron, second, gateway={**IMPATIENT, "stream_silence_s": 0.3}, poll=POLLS)
    request = asyncio.ensure_future(client.chat())
    await under_way(1, neuron)
    second.answer = going_on(second)
    await client.started.gateway._poller.refresh_all()
    for _ in range(8):  # as many polls as there would be silences
        neuron.polled.clear()
        await asyncio.wait_for(neuron.polled.wait(), 5)
    neuron.answer_gate.set()
    assert (await request)[0] == 200
    assert not second.requests


async def test_H5_a_node_that_was_idle_keeps_its_long_unstreamed_answers_too(
    neuron: FakeNeuron, second: FakeNeuron, start: Start
) -> None:
    """Its next poll was due long after a silence would be over."""
    neuron.have(MODEL)
    neuron.answer_gate.clear()
    client = await start(neuron, second, gateway=IMPATIENT, poll={"interval_s": 3600.0})
    request = asyncio.ensure_future(client.chat())
    await under_way(1, neuron)
    second.answer = going_on(second)
    await client.started.gateway._poller.refresh("beta")
    for _ in range(6):  # as many polls as there are in two silences
        neuron.polled.clear()
        await asyncio.wait_for(neuron.polled.wait(), 5)
        assert not second.requests
    neuron.answer_gate.set()
    assert (await request)[0] == 200
    assert not second.requests


@pytest.mark.parametrize("has_begun", [False, True])
async def test_U16_a_stream_without_a_ping_goes_elsewhere_once_it_has_begun(
    neuron: FakeNeuron, second: FakeNeuron, start: Start, has_begun: bool
) -> None:
    """A neuron that answers its polls may still be reading a long body; one that has begun to answer pings."""
    go_on = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        if has_begun:
            await response.prepare(request)
            await asyncio.Event().wait()
        await go_on.wait()
        await response.prepare(request)
        await response.write(HEAD + b"data: 1\n\n" + tokens_comment([ChoiceTokens(0, [1])]) + OPENAI_END)
        return response

    neuron.have(MODEL)
    neuron.answer = answer
    client = await start(
        neuron, second, gateway={**IMPATIENT, "stream_silence_s": 0.3 if has_begun else 1.0}, poll=POLLS
    )
    stream = asyncio.ensure_future(streamed(client))
    await under_way(1, neuron)
    second.answer = going_on(second)
    await client.started.gateway._poller.refresh("beta")
    if not has_begun:
        for _ in range(6):  # as many polls as there would be silences
            neuron.polled.clear()
            await asyncio.wait_for(neuron.polled.wait(), 5)
        assert not second.requests
        go_on.set()
    assert OPENAI_END in (await stream)[1]
    assert len(second.requests) == has_begun


async def test_H5_a_request_that_a_deaf_node_never_read_goes_elsewhere_though_others_are_written(
    neuron: FakeNeuron, second: FakeNeuron, start: Start
) -> None:
    """Its answers still come, what it is sent does not: its polls are missed, and it is not lost."""
    writes_on = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        if b'"stream": true' not in neuron.requests[-1][2]:
            await asyncio.Event().wait()
        response = await FakeNeuron.begin_stream(request)
        token = 10
        while not writes_on.is_set():
            await response.write(HEAD * (token == 10) + b"data: 1\n\n" + tokens_comment([ChoiceTokens(0, [token])]))
            token += 1
            await asyncio.sleep(0.05)
        await response.write(OPENAI_END)
        return response

    neuron.have(MODEL)
    neuron.answer = answer
    client = await start(neuron, second, gateway=IMPATIENT, poll=POLLS)
    stream = asyncio.ensure_future(streamed(client))
    await under_way(1, neuron)
    request = asyncio.ensure_future(client.chat())
    await under_way(2, neuron)
    second.answer = going_on(second)
    neuron.models_hang = True
    await client.started.gateway._poller.refresh("beta")
    assert (await request)[0] == 200
    assert len(second.requests) == 1 and not stream.done()
    writes_on.set()
    assert (await stream)[0] == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_H5_a_connect_failure_is_asked_elsewhere_once(second: FakeNeuron, start: Start, stream: bool) -> None:
    gone = FakeNeuron("alpha")
    async with listening(gone):
        gone.have(MODEL)
        client = await start(gone, second, poll={"interval_s": 3600.0})
    second.answer = going_on(second)
    await client.started.gateway._poller.refresh("beta")
    answers = await asyncio.gather(*(streamed(client) if stream else client.chat() for _ in range(12)))
    assert {status for status, _ in answers} == {200}


async def test_H5_a_host_that_takes_no_connection_costs_one_connect_timeout(second: FakeNeuron, start: Start) -> None:
    alpha = FakeNeuron("alpha")
    async with listening(alpha), unreachable() as nowhere:
        alpha.have(MODEL)
        second.answer = going_on(second)
        client = await start(alpha, second, poll={"interval_s": 3600.0}, gateway={"upstream_connect_timeout_s": 0.2})
        node = client.started.gateway._neurons["alpha"]
        node._base, node._urls = nowhere, {}
        statuses = [(await client.chat())[0] for _ in range(6)]
        assert statuses == [200] * 6


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("status", [429, 500, 502, 503, 529])
async def test_U12_what_one_server_refuses_another_is_asked(start: Start, status: int) -> None:
    async with openai_listening(FakeOpenAI("one")) as one, openai_listening(FakeOpenAI("two")) as two:
        one.refusal = status, {"error": {"message": "no"}}, {}
        client = await start(one, two)
        for number in range(8):
            body = {"model": FOREIGN, "messages": [{"role": "user", "content": str(number)}]}
            headers = {"x-session-id": "one session"}
            async with client.post("/v1/chat/completions", body, headers=headers) as response:
                assert response.status == 200, await response.text()
        assert len(two.requests) == 8


async def test_U12_a_429_keeps_the_server_out_for_as_long_as_it_says(start: Start) -> None:
    async with openai_listening(FakeOpenAI("one")) as one, openai_listening(FakeOpenAI("two")) as two:
        one.refusal = 429, {"error": {"message": "slow down"}}, {"retry-after": "600"}
        client = await start(one, two)
        for _ in range(10):
            assert (await client.chat(model=FOREIGN))[0] == 200
        assert len(one.requests) <= 1 and len(two.requests) == 10


async def test_U12_where_all_refuse_the_refusal_is_passed_on_after_two(start: Start) -> None:
    async with openai_listening(FakeOpenAI("one")) as one, openai_listening(FakeOpenAI("two")) as two:
        for server in (one, two):
            server.refusal = 429, {"error": {"message": "slow down", "code": "rate_limited"}}, {"retry-after": "7"}
        client = await start(one, two)
        async with client.post("/v1/chat/completions", {**BODY, "model": FOREIGN, "stream": False}) as response:
            assert response.status == 429 and response.headers["retry-after"] == "7"
        assert len(one.requests) == len(two.requests) == 1


async def test_U12_a_lone_server_that_rests_is_asked_all_the_same(openai_server: FakeOpenAI, start: Start) -> None:
    openai_server.refusal = 429, {"error": {"message": "slow down"}}, {"retry-after": "600"}
    client = await start(openai_server)
    assert [(await client.chat(model=FOREIGN))[0] for _ in range(3)] == [429] * 3


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422])
async def test_U12_what_is_wrong_with_the_request_is_asked_nobody_else(start: Start, status: int) -> None:
    async with openai_listening(FakeOpenAI("one")) as one, openai_listening(FakeOpenAI("two")) as two:
        for server in (one, two):
            server.refusal = status, {"error": {"message": "no"}}, {}
        client = await start(one, two)
        await client.chat(model=FOREIGN)
        assert len(one.requests) + len(two.requests) == 1
