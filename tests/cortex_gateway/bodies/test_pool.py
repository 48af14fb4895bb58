"""Real processes that read bodies, and what becomes of a body whose process ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest
from cortex_core.errors import ApiError
from cortex_gateway.bodies import pool as pools
from cortex_gateway.bodies import process as processes
from cortex_gateway.bodies.messages import Facts, Job, Order, Read, Result, Translate, Translated
from cortex_gateway.bodies.payload import Payload
from cortex_gateway.bodies.pool import BodyWorkers
from cortex_gateway.bodies.process import PIECE_BYTES, BodyProcess

BODY = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}).encode()
MANY_MESSAGES = (
    b'{"model":"m","max_tokens":5,"messages":['
    + b",".join([b'{"role":"user","content":"%b"}' % (b"a" * 400)] * 9_000)
    + b"]}"
)


@pytest.fixture
async def workers() -> AsyncIterator[BodyWorkers]:
    opened = BodyWorkers()
    yield opened
    await opened.close()


async def read(workers: BodyWorkers, body: bytes = BODY, principal: str | None = "a") -> Facts:
    facts, pieces = await workers.run(Read(len(body)), [body], num_bytes=len(body), principal=principal)
    assert isinstance(facts, Facts) and pieces == []
    return facts


def translation(body: bytes) -> Translate:
    return Translate(len(body), "messages", "m", "theirs", extensions=True, drops_attribution=True)


def is_alive(pid: int) -> bool:
    try:
        return "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


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


async def test_H13_a_body_goes_and_comes_in_pieces_that_the_loop_can_hand_over(
    workers: BodyWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed: list[int] = []
    real = asyncio.StreamWriter.write

    def write(self: asyncio.StreamWriter, data: bytes) -> None:
        handed.append(len(data))
        real(self, data)

    monkeypatch.setattr(asyncio.StreamWriter, "write", write)
    sizes = []
    for factor in (1, 2):
        text = "lorem ipsum " * (200_000 * factor)
        body = json.dumps({"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": text}]}).encode()
        handed.clear()
        payload = Payload([body])
        result, pieces = await workers.run(translation(body), payload.slices(), num_bytes=len(body), principal=None)
        assert isinstance(result, Translated) and sum(map(len, pieces)) == result.num_bytes
        assert json.loads(b"".join(pieces))["messages"][0]["content"] == text
        assert max(handed) <= PIECE_BYTES and max(map(len, pieces)) <= PIECE_BYTES
        sizes.append(sum(handed) + sum(map(len, pieces)))
    assert sizes[1] < 2.1 * sizes[0]


async def test_H13_what_is_wrong_with_a_body_is_said_as_on_the_loop(workers: BodyWorkers) -> None:
    for body, code in (
        (b'{"model": 5}', "invalid_type"),
        (b"{", "invalid_json"),
        (b'{"a":' + b"[" * 5_000, "invalid_json"),
    ):
        with pytest.raises(ApiError) as refused:
            await read(workers, body)
        assert (refused.value.kind, refused.value.code) == ("invalid_request", code)
    assert (await read(workers)).model == "m"
    assert len(workers.pids) == 1


async def test_H13_a_body_that_takes_too_much_processor_time_ends_its_process_alone(
    workers: BodyWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    await read(workers)
    (before,) = workers.pids
    monkeypatch.setattr(pools, "CPU_S", 0.0)
    monkeypatch.setattr(pools, "CPU_S_PER_MB", 0.005)
    with pytest.raises(ApiError) as refused:
        await workers.run(translation(MANY_MESSAGES), [MANY_MESSAGES], num_bytes=len(MANY_MESSAGES), principal="a")
    error = refused.value
    assert (error.kind, error.code, error.status) == ("request_too_large", "body_budget_exceeded", 413)
    assert "s of processor time" in error.message and error.extras["bytes"] == len(MANY_MESSAGES)
    monkeypatch.undo()
    assert (await read(workers)).model == "m"
    assert not is_alive(before)


async def test_H13_a_body_that_takes_too_much_memory_ends_its_process_alone(
    workers: BodyWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "MEMORY_BYTES", 8 * 2**20)
    with pytest.raises(ApiError) as refused:
        await workers.run(translation(MANY_MESSAGES), [MANY_MESSAGES], num_bytes=len(MANY_MESSAGES), principal="a")
    assert refused.value.code == "body_budget_exceeded" and "MiB of memory" in refused.value.message
    assert (await read(workers)).model == "m"


async def test_H13_a_process_that_does_not_answer_is_given_up(
    workers: BodyWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    await read(workers)
    (pid,) = workers.pids
    monkeypatch.setattr(pools, "WALL_FLOOR_S", 0.2)
    monkeypatch.setattr(pools, "WALL_FACTOR", 0.0)
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(ApiError) as refused:
        await read(workers)
    assert refused.value.code == "body_budget_exceeded" and not is_alive(pid)
    monkeypatch.undo()
    assert (await read(workers)).model == "m"


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


async def test_H13_a_process_finds_what_only_a_launcher_has_told_the_gateway_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As installed from an RPM: the packages are in a folder that no interpreter looks into by itself."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    process = await BodyProcess.start()
    environ = Path(f"/proc/{process.pid}/environ")
    async with asyncio.timeout(20):
        while not environ.read_bytes():  # the kernel shows it a moment after the program has been replaced
            await asyncio.sleep(0.01)
    given = environ.read_bytes().split(b"\0")
    (path,) = [value.removeprefix(b"PYTHONPATH=") for value in given if value.startswith(b"PYTHONPATH=")]
    assert path.decode().split(os.pathsep)[0] == str(tmp_path)
    await process.stop()


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


async def test_H13_a_process_ends_with_its_gateway() -> None:
    process = await BodyProcess.start()
    pid = process.pid
    process._writer.close()
    async with asyncio.timeout(20):
        while process._process.poll() is None:
            await asyncio.sleep(0.01)
    assert process._process.returncode == 0 and not is_alive(pid)
    await process.stop()
