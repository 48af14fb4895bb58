"""A process that reads bodies, from within: its bounds and its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from cortex_core.errors import ApiError
from cortex_gateway.bodies import pool as pools
from cortex_gateway.bodies import process as processes
from cortex_gateway.bodies.pool import BodyWorkers
from cortex_gateway.bodies.process import BodyProcess

from tests.cortex_gateway.bodies.harness import is_alive, read, translation


@pytest.fixture
async def workers() -> AsyncIterator[BodyWorkers]:
    opened = BodyWorkers()
    yield opened
    await opened.close()


MANY_MESSAGES = (
    b'{"model":"m","max_tokens":5,"messages":['
    + b",".join([b'{"role":"user","content":"%b"}' % (b"a" * 400)] * 9_000)
    + b"]}"
)


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


async def test_H13_a_process_ends_with_its_gateway() -> None:
    process = await BodyProcess.start()
    pid = process.pid
    process._writer.close()
    async with asyncio.timeout(20):
        while process._process.poll() is None:
            await asyncio.sleep(0.01)
    assert process._process.returncode == 0 and not is_alive(pid)
    await process.stop()
