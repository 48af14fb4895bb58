"""Real processes that read bodies, and what becomes of a body whose process ends."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest
from cortex_core.errors import ApiError
from cortex_gateway.bodies import pool as pools
from cortex_gateway.bodies import process as processes
from cortex_gateway.bodies.messages import Facts, Job, Order, Read, Result
from cortex_gateway.bodies.pool import BodyWorkers
from cortex_gateway.bodies.process import BodyProcess

from tests.cortex_gateway.bodies.harness import BODY, is_alive, read, translation


@pytest.fixture
async def workers() -> AsyncIterator[BodyWorkers]:
    opened = BodyWorkers()
    yield opened
    await opened.close()


async def test_H13_a_process_is_started_once_used_again_and_ended_at_last() -> None:
    workers = BodyWorkers()
    assert workers.pids == []
    assert [(await read(workers)).model for _ in range(3)] == ["m", "m", "m"]
    (pid,) = workers.pids
    environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    names = {name.partition(b"=")[0].decode() for name in environ if name}
    assert names <= {*processes.PASSED_ON, "PYTHONPATH", "LC_CTYPE"}
    await workers.close()
    assert not is_alive(pid) and workers.pids == []
    with pytest.raises(ApiError):
        await read(workers)


async def test_H13_a_process_that_somebody_kills_costs_a_second_try_and_no_answer(workers: BodyWorkers) -> None:
    await read(workers)
    (pid,) = workers.pids
    os.kill(pid, signal.SIGSTOP)
    asking = asyncio.ensure_future(read(workers))
    await asyncio.sleep(0)
    os.kill(pid, signal.SIGKILL)
    assert (await asking).model == "m"
    assert workers.pids != [pid]


async def test_H13_a_body_that_ends_two_processes_is_to_blame(
    workers: BodyWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_started = 0
    real = BodyProcess.run

    async def run(self: BodyProcess, order: Order, pieces: list[bytes], *, wall_s: float) -> tuple[Result, list[bytes]]:
        nonlocal num_started
        num_started += 1
        os.kill(self.pid, signal.SIGKILL)
        return await real(self, order, pieces, wall_s=wall_s)

    monkeypatch.setattr(BodyProcess, "run", run)
    with pytest.raises(ApiError) as refused:
        await read(workers)
    assert (refused.value.code, num_started) == ("body_worker_died", 2)
    monkeypatch.undo()
    assert (await read(workers)).model == "m"


async def test_H13_a_client_that_leaves_takes_its_work_along(workers: BodyWorkers) -> None:
    await read(workers)
    (pid,) = workers.pids
    os.kill(pid, signal.SIGSTOP)  # it would never end by itself
    asking = asyncio.ensure_future(read(workers))
    for _ in range(20):
        await asyncio.sleep(0)
    asking.cancel()
    with suppress(asyncio.CancelledError):
        await asking
    assert (await read(workers)).model == "m"
    assert pid not in workers.pids and not is_alive(pid)


class Held(BodyWorkers):
    """Whose jobs run until a test lets them go."""

    def __init__(self) -> None:
        super().__init__()
        self.running: list[tuple[str, asyncio.Event]] = []

    async def _run_once(self, job: Job, pieces: list[bytes], num_bytes: int) -> tuple[Result, list[bytes]]:
        event = asyncio.Event()
        self.running.append((pieces[0].decode(), event))
        await event.wait()
        return Facts("m", None, None, None, b"", None), []

    @property
    def names(self) -> set[str]:
        return {name for name, _ in self.running}

    async def finish(self, wanted: str) -> set[str]:
        """Who runs once this one has ended."""
        (found,) = [each for each in self.running if each[0] == wanted]
        self.running.remove(found)
        found[1].set()
        for _ in range(20):
            await asyncio.sleep(0)
        return self.names


async def test_H13_principals_take_turns_and_translations_leave_room_for_what_passes() -> None:
    workers = Held()
    asked: list[asyncio.Future[object]] = []

    async def ask(name: str, principal: str, *, is_long: bool = False) -> None:
        job: Job = translation(BODY) if is_long else Read(1)
        asked.append(asyncio.ensure_future(workers.run(job, [name.encode()], num_bytes=1, principal=principal)))
        for _ in range(20):
            await asyncio.sleep(0)

    for number in range(3):
        await ask(f"long {number}", "greedy", is_long=True)
    assert workers.names == {"long 0"}
    for number in range(3):
        await ask(f"short {number}", "greedy")
    await ask("modest", "modest")
    assert workers.names == {"long 0", "short 0"}
    assert await workers.finish("short 0") == {"long 0", "short 1"}
    assert await workers.finish("short 1") == {"long 0", "modest"}
    assert await workers.finish("modest") == {"long 0", "short 2"}
    assert await workers.finish("short 2") == {"long 0"}
    assert await workers.finish("long 0") == {"long 1"}
    assert await workers.finish("long 1") == {"long 2"}
    assert await workers.finish("long 2") == set()
    await asyncio.gather(*asked)
    await workers.close()


async def test_H13_whose_turn_does_not_come_is_refused_and_leaves_none_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "MAX_WAIT_S", 0.05)
    workers = Held()
    busy = [
        asyncio.ensure_future(workers.run(Read(1), [b"x"], num_bytes=1, principal="a"))
        for _ in range(pools.MAX_PROCESSES)
    ]
    await asyncio.sleep(0)
    assert len(workers.running) == len(busy)
    with pytest.raises(ApiError) as refused:
        await workers.run(Read(1), [b"x"], num_bytes=1, principal="b")
    assert (refused.value.code, refused.value.retry_after) == ("body_queue_timeout", 5)
    for _, event in workers.running:
        event.set()
    workers.running.clear()
    await asyncio.gather(*busy)
    asking = asyncio.ensure_future(workers.run(Read(1), [b"x"], num_bytes=1, principal="b"))
    while not workers.running:
        await asyncio.sleep(0)
    workers.running[0][1].set()
    await asking
    await workers.close()


async def test_H13_a_process_that_has_nothing_to_do_is_ended(
    workers: BodyWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "IDLE_S", 0.05)
    await read(workers)
    (pid,) = workers.pids
    async with asyncio.timeout(20):
        while workers.pids or is_alive(pid):
            await asyncio.sleep(0.01)
    assert (await read(workers)).model == "m"
