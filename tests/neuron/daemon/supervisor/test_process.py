"""An engine's process: its output, and how it ended."""

from __future__ import annotations

import asyncio
import io
import logging
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from neuron.daemon.supervisor.engine_group import EngineGroup, GroupLoaded
from neuron.daemon.supervisor.process import EngineProcess

from tests.neuron.daemon.supervisor.harness import is_alive, tokens_of
from tests.neuron.scripted_engine import Events, eventually, make_group, request
from tests.neuron.scripted_worker import DIE, FAULT, NOISE, TALK


@pytest.fixture
def events() -> Events:
    return Events()


@pytest.fixture
async def group(tmp_path: Path, events: Events) -> AsyncIterator[EngineGroup]:
    group = make_group(tmp_path, events)
    group.start()
    await events.until(GroupLoaded)
    yield group
    await group.stop()


@pytest.mark.parametrize("script", [DIE, FAULT, NOISE])
async def test_every_way_to_end_is_a_restart(group: EngineGroup, events: Events, script: int) -> None:
    (pid,) = group.pids
    async with await group.generate([request(script)]):
        await events.until(GroupLoaded, 2)
    assert not is_alive(pid)
    await eventually(lambda: group.num_live == 0)


async def test_what_the_engine_says_is_logged(group: EngineGroup, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="neuron.engine"):
        await tokens_of(group, TALK)
        await eventually(lambda: "the engine says hello" in caplog.text)
    assert "[test/model rank 0]" in caplog.text


class Child:
    """A process as `subprocess` has it, which ends when it is told to."""

    def __init__(self, output: bytes, code: int) -> None:
        self.pid = 2**22 + 1
        self.stdout = io.BytesIO(output)
        self._code = code
        self.may_end = threading.Event()

    def wait(self) -> int:
        self.may_end.wait()
        return self._code


async def ended(output: bytes, code: int) -> EngineProcess:
    child: Any = Child(output, code)
    process = EngineProcess(child, label="org/name rank 0")
    assert process.describe_exit() == "is still running"
    child.may_end.set()
    assert await process.wait() == code == await process.wait()
    return process


@pytest.mark.parametrize(
    ("output", "code", "words"),
    [
        (b"", 0, "exited with code 0"),
        (b"one\nlast words \n\n \n", 3, "exited with code 3 (last output: last words)"),
        (b"", -9, "was killed by SIGKILL"),
        (b"no memory\n", -11, "was killed by SIGSEGV (last output: no memory)"),
        (b"", -250, "was killed by 250"),
        (b"\xff\xfe broken", 1, "exited with code 1 (last output: \ufffd\ufffd broken)"),
    ],
)
async def test_how_a_process_ended_is_said_with_its_last_words(output: bytes, code: int, words: str) -> None:
    assert (await ended(output, code)).describe_exit() == words


async def test_of_what_it_said_the_end_is_kept_and_long_lines_are_cut() -> None:
    process = await ended(b"".join(b"line %d\n" % number for number in range(100)) + b"x" * 50_000, 1)
    assert process.tail[0] == "line 64" and len(process.tail) == 40
    assert sum(len(line) for line in process.tail if line.startswith("x")) == 50_000
    assert len(process.describe_exit()) < 400


async def test_one_that_waits_no_longer_takes_nobody_along() -> None:
    child: Any = Child(b"", 0)
    process = EngineProcess(child, label="m")
    first, second = asyncio.create_task(process.wait()), asyncio.create_task(process.wait())
    await asyncio.sleep(0)
    first.cancel()
    child.may_end.set()
    assert await second == 0
