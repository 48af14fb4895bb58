"""Groups that are alive and do nothing, or seem to: found, asked for their stacks, killed and rebuilt."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from pathlib import Path

import pytest
from neuron.daemon.supervisor.engine_group import GroupDied, GroupLoaded
from neuron.daemon.supervisor.watchdog import Watchdog

from tests.neuron.scripted_engine import Events, eventually, make_group, request
from tests.neuron.scripted_worker import HOLD, SLOW, STUCK


@pytest.fixture
def events() -> Events:
    return Events()


async def test_F12_a_group_that_holds_work_and_completes_no_step_is_rebuilt(
    tmp_path: Path, events: Events, caplog: pytest.LogCaptureFixture
) -> None:
    group = make_group(tmp_path, events, debug={"step_deadline_s": 0.3}, ping_interval_s=0.2)
    group.start()
    await events.until(GroupLoaded)
    with caplog.at_level(logging.INFO):
        async with await group.generate([request(STUCK, max_tokens=3)]) as generation:
            await eventually(lambda: group.stalled is not None)
            assert group.state == "loaded" and "no step was completed" in group.stalled
            tokens = [token async for batch in generation for _, update in batch for token in update.token_ids]
    assert tokens == [100, 101, 102], "its successor answers the request"
    died = await events.until(GroupDied)
    assert "no step was completed" in died.reason and "0.3 s are allowed" in died.reason
    assert group.stalled is None
    assert "in make_step" in caplog.text or "in receive" in caplog.text, "the stacks are in the log"
    await group.stop()


async def test_F13_a_stopped_process_without_work_is_found_too(tmp_path: Path, events: Events) -> None:
    group = make_group(tmp_path, events, ping_interval_s=0.2)
    group.start()
    await events.until(GroupLoaded)
    os.kill(group.pids[0], signal.SIGSTOP)
    died = await events.until(GroupDied)
    assert "rank 0 has not answered" in died.reason
    await events.until(GroupLoaded, 2)
    await group.stop()


async def test_a_group_that_was_only_slow_goes_on(
    tmp_path: Path, events: Events, caplog: pytest.LogCaptureFixture
) -> None:
    group = make_group(tmp_path, events, debug={"step_deadline_s": 0.3})
    group.start()
    await events.until(GroupLoaded)
    with caplog.at_level(logging.INFO):
        async with await group.generate([request(SLOW, max_tokens=3)]) as generation:
            tokens = [token async for batch in generation for _, update in batch for token in update.token_ids]
            assert tokens == [100, 101, 102]
        await eventually(lambda: "only slow" in caplog.text)
    assert group.num_restarts == 0 and group.stalled is None
    await group.stop()


async def test_an_idle_group_is_left_alone_whatever_its_deadline(tmp_path: Path, events: Events) -> None:
    group = make_group(tmp_path, events, debug={"step_deadline_s": 0.05}, ping_interval_s=0.05)
    group.start()
    await events.until(GroupLoaded)
    pinged = asyncio.Event()
    assert group._watchdog is not None
    told = group._watchdog.ponged

    def ponged(rank: int, nonce: int) -> None:
        told(rank, nonce)
        if nonce >= 10:
            pinged.set()

    group._watchdog.ponged = ponged  # type: ignore[method-assign]
    await asyncio.wait_for(pinged.wait(), 30)
    assert group.num_restarts == 0 and group.stalled is None
    await group.stop()


async def test_a_group_that_is_cancelled_out_of_its_work_is_no_longer_overdue(tmp_path: Path, events: Events) -> None:
    group = make_group(tmp_path, events, debug={"step_deadline_s": 0.5})
    group.start()
    await events.until(GroupLoaded)
    async with await group.generate([request(HOLD)]) as generation:
        await anext(generation)
    assert group._watchdog is not None and not group._in_engine
    assert group._watchdog.problem() is None
    await group.stop()


async def test_work_without_a_step_is_a_problem_and_a_step_brings_the_next_deadline() -> None:
    dog = Watchdog(
        world_size=1, step_deadline_s=0.01, holds_work=lambda: True, ping=lambda nonce: None, ping_interval_s=1000
    )
    assert "no step" in await dog.until_problem()
    dog.stepped(1000.0)
    assert dog.problem() is None


async def test_every_rank_must_answer() -> None:
    pings: list[int] = []
    dog = Watchdog(
        world_size=3, step_deadline_s=0.01, holds_work=lambda: False, ping=pings.append, ping_interval_s=0.01
    )
    watching = asyncio.create_task(dog.until_problem())
    await eventually(lambda: bool(pings))
    for rank in (0, 2):
        dog.ponged(rank, pings[0])
    assert "process of rank 1 has not answered" in await watching
    dog.ponged(1, pings[0])
    assert dog.problem() is None, "it was only slow"
