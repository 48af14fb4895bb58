"""A worker as the daemon sees it: killed, left, or given what kills it."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

from neuron.daemon.text_workers.settings import TextSettings

from tests.neuron.daemon.text_workers.checkpoints import LOOPS, PLAIN
from tests.neuron.daemon.text_workers.harness import prepare, refusal, served
from tests.neuron.scripted_engine import eventually


async def test_a_worker_killed_from_outside_costs_no_request(tmp_path: Path) -> None:
    async with served(tmp_path, template=LOOPS + PLAIN, settings=TextSettings(max_workers=2, cpu_s=30)) as text:
        await eventually(lambda: len(text.pool.pids) == 2)
        looping = asyncio.ensure_future(refusal(prepare(text, "LOOP")))
        await eventually(lambda: any(_is_busy(pid) for pid in text.pool.pids[1:]))
        await prepare(text, "hello")
        for pid in text.pool.pids[1:]:  # one of them is at the loop, which may be tried once more
            os.kill(pid, signal.SIGKILL)
        await eventually(lambda: text.ends == ["died"])  # type: ignore[attr-defined]
        await prepare(text, "hello")
        assert not looping.done()
        looping.cancel()


async def test_a_request_that_ends_every_worker_is_refused(tmp_path: Path) -> None:
    async with served(tmp_path, template=LOOPS + PLAIN, settings=TextSettings(max_workers=2, cpu_s=30)) as text:
        looping = asyncio.ensure_future(refusal(prepare(text, "LOOP")))
        for ends in (1, 2):
            await eventually(lambda: any(_is_busy(pid) for pid in text.pool.pids[1:]))
            for pid in text.pool.pids[1:]:
                os.kill(pid, signal.SIGKILL)
            await eventually(lambda ends=ends: text.ends.count("died") == ends)  # type: ignore[attr-defined,misc]
        assert (await looping).code == "text_worker_died"


def _is_busy(pid: int) -> bool:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return int(fields[11]) >= 5  # hundredths of a second in user mode


async def test_a_client_that_leaves_takes_its_work_along(tmp_path: Path) -> None:
    async with served(tmp_path, template=LOOPS + PLAIN, settings=TextSettings(max_workers=2, cpu_s=30)) as text:
        looping = asyncio.ensure_future(prepare(text, "LOOP"))
        await prepare(text, "hello")
        looping.cancel()
        await eventually(lambda: text.ends == ["abandoned"])  # type: ignore[attr-defined]
        await prepare(text, "hello")
