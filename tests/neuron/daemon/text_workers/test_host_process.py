"""The host as the daemon sees it: started anew, and nothing left of it."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

from tests.neuron.daemon.text_workers.checkpoints import LOOPS, PLAIN
from tests.neuron.daemon.text_workers.harness import prepare, refusal, served
from tests.neuron.scripted_engine import eventually


def is_alive(pid: int) -> bool:
    """Whether it runs; a zombie that nobody has reaped yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def num_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


async def test_the_host_is_started_anew_and_nobody_is_lost(tmp_path: Path) -> None:
    async with served(tmp_path) as text:
        await prepare(text, "hello")
        host, *workers = text.pool.pids
        os.kill(host, signal.SIGKILL)
        await eventually(lambda: text.pool.unavailable is not None)
        await prepare(text, "hello")
        assert text.pool.unavailable is None and text.pool.pids[0] != host
        assert not any(is_alive(pid) for pid in (host, *workers))


async def test_nothing_is_left_behind(tmp_path: Path) -> None:
    before = num_descriptors()
    async with served(tmp_path, template=LOOPS + PLAIN) as text:
        looping = asyncio.ensure_future(refusal(prepare(text, "LOOP")))
        await prepare(text, "hello")
        pids = text.pool.pids
    assert (await looping).code == "model_unloading"
    await eventually(lambda: not any(is_alive(pid) for pid in pids))
    await eventually(lambda: num_descriptors() <= before)
