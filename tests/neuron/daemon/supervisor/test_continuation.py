"""Requests that outlive their engine, against a real child process that speaks the protocol."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cortex_core.errors import ApiError
from neuron.daemon.supervisor.engine_group import EngineGroup, GroupDied, GroupFailed, GroupLoaded, GroupLoading
from neuron.daemon.supervisor.generation import Generation
from neuron.protocol import Generate, SamplingParams, SequenceUpdate

from tests.neuron.scripted_engine import Events, eventually, make_group, request, scripted_with
from tests.neuron.scripted_worker import DIE, HOLD, SILENT

LONG = 3000


@pytest.fixture
def events() -> Events:
    return Events()


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    fifo = tmp_path / "gate"
    os.mkfifo(fifo)
    return fifo


async def open_gate(gate: Path) -> None:
    await asyncio.to_thread(gate.write_text, "go")


@pytest.fixture
async def group(tmp_path: Path, events: Events) -> AsyncIterator[EngineGroup]:
    group = make_group(tmp_path, events)
    group.start()
    await events.until(GroupLoaded)
    yield group
    await group.stop()


@pytest.fixture
async def gated(tmp_path: Path, gate: Path, events: Events) -> AsyncIterator[EngineGroup]:
    """A group whose every load waits until the gate is opened; it has been once."""
    group = make_group(tmp_path, events, command=scripted_with("--gate", str(gate)))
    group.start()
    await open_gate(gate)
    await events.until(GroupLoaded)
    yield group
    await group.stop()


class Reader:
    """Reads a generation to its end; what it has got by then can be asked at any time."""

    def __init__(self, generation: Generation) -> None:
        self.updates: dict[int, list[SequenceUpdate]] = {}
        self.error: ApiError | None = None
        self._generation = generation
        self._more = asyncio.Event()
        self._task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        try:
            async with self._generation:
                async for batch in self._generation:
                    for choice, update in batch:
                        self.updates.setdefault(choice, []).append(update)
                    self._more.set()
        except ApiError as exc:
            self.error = exc

    def tokens(self, choice: int = 0) -> list[int]:
        return [token for update in self.updates.get(choice, []) for token in update.token_ids]

    async def until_tokens(self, number: int) -> None:
        while len(self.tokens()) < number:
            self._more.clear()
            await self._more.wait()

    async def done(self) -> None:
        async with asyncio.timeout(60):
            await self._task

    def assert_whole(self, max_tokens: int, choice: int = 0) -> None:
        assert self.error is None
        assert self.tokens(choice) == list(range(100, 100 + max_tokens)), "a token is missing or there twice"
        finishes = [update.finish for update in self.updates[choice] if update.finish is not None]
        assert finishes == ["length"]


async def read(group: EngineGroup, *requests: Generate) -> Reader:
    return Reader(await group.generate(requests))


async def kill_once_loaded(group: EngineGroup, events: Events, number: int) -> None:
    """SIGKILL the engine of the `number`-th load."""
    await events.until(GroupLoaded, number)
    os.kill(group.pids[0], signal.SIGKILL)
    await events.until(GroupDied, number)


async def test_what_was_in_flight_goes_on_where_it_was(group: EngineGroup, events: Events) -> None:
    readers = [await read(group, request(9, max_tokens=LONG), request(9, max_tokens=LONG + 7)) for _ in range(4)]
    await readers[0].until_tokens(20)
    await kill_once_loaded(group, events, 1)
    assert all(len(reader.tokens()) < LONG for reader in readers), "the kill came too late to mean anything"
    for reader in readers:
        await reader.done()
        reader.assert_whole(LONG)
        reader.assert_whole(LONG + 7, choice=1)
    assert group.num_live == 0 and group.num_restarts == 1


async def test_what_was_told_once_is_not_told_again(group: EngineGroup, events: Events) -> None:
    asked = msgspec.structs.replace(
        request(9, max_tokens=LONG), sampling=SamplingParams(logprobs=1), prompt_logprobs=True
    )
    reader = await read(group, asked)
    await reader.until_tokens(20)
    await kill_once_loaded(group, events, 1)
    await reader.done()
    reader.assert_whole(LONG)
    updates = reader.updates[0]
    assert [update.cached_tokens for update in updates if update.cached_tokens is not None] == [0]
    assert len([update for update in updates if update.prompt_logprobs is not None]) == 1
    assert sum(len(update.logprobs or ()) for update in updates) == LONG


async def test_what_comes_while_there_is_no_engine_waits_for_it(gated: EngineGroup, gate: Path, events: Events) -> None:
    os.kill(gated.pids[0], signal.SIGKILL)
    await events.until(GroupDied)
    reader = await read(gated, request(9, max_tokens=5))
    await events.until(GroupLoading, 3)  # the successor is connected, and still not an engine
    assert gated.num_live == 1 and not reader.updates
    await open_gate(gate)
    await reader.done()
    reader.assert_whole(5)


async def test_a_waiting_request_hears_heartbeats(gated: EngineGroup, gate: Path, events: Events) -> None:
    async with await gated.generate([request(SILENT)], heartbeat_s=0.01) as generation:
        os.kill(gated.pids[0], signal.SIGKILL)
        await events.until(GroupDied)
        assert await anext(generation) == []
        assert await anext(generation) == []


async def test_a_client_that_leaves_during_recovery_is_forgotten(
    gated: EngineGroup, gate: Path, events: Events
) -> None:
    async with await gated.generate([request(HOLD)]) as before:
        await anext(before)
        os.kill(gated.pids[0], signal.SIGKILL)
        await events.until(GroupDied)
        async with await gated.generate([request(9)]):
            assert gated.num_live == 2
    assert gated.num_live == 0
    await open_gate(gate)
    await events.until(GroupLoaded, 2)
    reader = await read(gated, request(9, max_tokens=3))
    await reader.done()
    assert gated.stats.running == 0, "the engine was given what nobody waits for"


async def test_an_engine_killed_twice_in_a_row_loses_nobody(group: EngineGroup, events: Events) -> None:
    readers = [await read(group, request(9, max_tokens=LONG)) for _ in range(5)]
    await readers[0].until_tokens(20)
    await kill_once_loaded(group, events, 1)
    await kill_once_loaded(group, events, 2)
    for reader in readers:
        await reader.done()
        reader.assert_whole(LONG)
    assert group.num_live == 0


async def test_a_request_that_kills_its_engine_fails_alone(group: EngineGroup, events: Events) -> None:
    before = await read(group, request(9, max_tokens=LONG))
    await before.until_tokens(20)
    killer = await read(group, request(DIE))
    after = await read(group, request(9, max_tokens=LONG))
    await killer.done()
    assert killer.error is not None
    assert (killer.error.code, killer.error.status, killer.error.is_retryable) == ("request_kills_engine", 400, False)
    for reader in (before, after):
        await reader.done()
        reader.assert_whole(LONG)
    assert group.state == "loaded"


async def test_two_requests_that_kill_their_engine_are_both_found(group: EngineGroup, events: Events) -> None:
    innocent = await read(group, request(9, max_tokens=LONG))
    await innocent.until_tokens(20)
    killers = [await read(group, request(DIE)) for _ in range(2)]
    for killer in killers:
        await killer.done()
        assert killer.error is not None and killer.error.code == "request_kills_engine"
    await innocent.done()
    innocent.assert_whole(LONG)


async def test_F6_where_no_engine_comes_back_requests_end_retryably(tmp_path: Path, events: Events) -> None:
    debug: dict[str, Any] = {"load": "die", "load_epochs": [1, 2]}
    group = make_group(tmp_path, events, debug=debug, attempts=1)
    group.start()
    await events.until(GroupLoaded)
    reader = await read(group, request(HOLD))
    await reader.until_tokens(1)
    os.kill(group.pids[0], signal.SIGKILL)
    await events.until(GroupFailed)
    await reader.done()
    assert reader.error is not None
    assert (reader.error.code, reader.error.status, reader.error.is_retryable) == ("engine_restarting", 503, True)
    assert "out of luck" in reader.error.message
    assert reader.error.extras["ended_engine"].endswith("-0"), "a gateway is told which engine it was in at its end"
    with pytest.raises(ApiError):
        await group.generate([request(9)])
    await group.stop()


async def test_stopping_ends_requests_that_wait_for_an_engine(gated: EngineGroup, gate: Path, events: Events) -> None:
    os.kill(gated.pids[0], signal.SIGKILL)
    await events.until(GroupDied)
    reader = await read(gated, request(9))
    await gated.stop()
    await reader.done()
    assert reader.error is not None and reader.error.code == "model_unloaded"
    await eventually(lambda: gated.num_live == 0)
