"""A process that reads bodies, from the gateway's side."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from cortex_core.errors import ApiError
from cortex_gateway.bodies import pool as pools
from cortex_gateway.bodies.messages import Translated
from cortex_gateway.bodies.payload import Payload
from cortex_gateway.bodies.pool import BodyWorkers
from cortex_gateway.bodies.process import PIECE_BYTES, BodyProcess

from tests.cortex_gateway.bodies.harness import is_alive, read, translation


@pytest.fixture
async def workers() -> AsyncIterator[BodyWorkers]:
    opened = BodyWorkers()
    yield opened
    await opened.close()


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
