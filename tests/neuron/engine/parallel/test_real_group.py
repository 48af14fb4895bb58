"""Groups of real rank processes, through the worker protocol."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest
from neuron.daemon.supervisor.errors import EngineLoadError
from neuron.protocol import Ping, SamplingParams

from tests.neuron.engine.checkpoints import write_qwen3
from tests.neuron.engine.parallel.real_group import DEADLINE_S, RealGroup

pytestmark = [pytest.mark.timeout(400), pytest.mark.slow]

PROMPTS = [[5, 9, 2], list(range(40, 150)), [7] * 9]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen3(tmp_path_factory.mktemp("tiny"))


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


async def test_two_ranks_overlap_their_steps_and_answer_as_one_does(tmp_path: Path, checkpoint: Path) -> None:
    sampling = SamplingParams(temperature=0.8, seed=7, frequency_penalty=0.5)
    async with RealGroup(tmp_path, checkpoint, ranks=1, overlap=False) as alone:
        expected = [await alone.answer(*PROMPTS), await alone.answer(*PROMPTS, sampling=sampling)]
    async with RealGroup(tmp_path, checkpoint, ranks=2, overlap=True) as group:
        assert [await group.answer(*PROMPTS), await group.answer(*PROMPTS, sampling=sampling)] == expected


async def test_two_ranks_serve_from_load_to_shutdown_as_one_does(tmp_path: Path, checkpoint: Path) -> None:
    async with RealGroup(tmp_path, checkpoint, ranks=1) as alone:
        expected = await alone.answer(*PROMPTS)
    async with RealGroup(tmp_path, checkpoint, ranks=2) as group:
        # Sums over ranks: all weights but the norms are divided, and the KV cache is.
        assert alone.loaded.weight_bytes < group.loaded.weight_bytes < 1.05 * alone.loaded.weight_bytes
        assert group.loaded.kv_bytes_per_token == alone.loaded.kv_bytes_per_token
        assert group.loaded.cache_groups == alone.loaded.cache_groups
        assert sum(each.bytes_per_token for each in group.loaded.cache_groups) == group.loaded.kv_bytes_per_token
        assert group.loaded.num_pages == alone.loaded.num_pages
        done = [(progress.bytes_done, progress.bytes_total) for progress in group.progress if progress.bytes_total]
        assert done[-1][0] == done[-1][1] > alone.progress[-1].bytes_total
        assert await group.answer(*PROMPTS) == expected

        before = [cpu_ticks(pid) for pid in group.process_group.pids]
        await asyncio.sleep(1.0)  # a span in which an idle group does nothing
        used = [cpu_ticks(pid) - ticks for pid, ticks in zip(group.process_group.pids, before, strict=True)]
        assert max(used) < 10, "hundredths of a second: the end of the last step, and nothing that spins or polls"
        assert await group.answer(*PROMPTS) == expected, "an idle group has no timeout running"

        for channel in group.process_group.channels:
            channel.send(Ping(3))
        await group.until(lambda: len(group.pongs) == 2)
        assert sorted(group.pongs) == [(0, 3), (1, 3)]

        await group.process_group.stop()
        assert group.process_group.exit_codes == [0, 0], group.process_group.describe_exits()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("victim", [0, 1])
async def test_a_killed_rank_ends_the_group_and_the_other_rank(tmp_path: Path, checkpoint: Path, victim: int) -> None:
    async with RealGroup(tmp_path, checkpoint, ranks=2) as group:
        number = group.send([5, 9, 2], max_tokens=400)
        await group.until(lambda: len(group.tokens(number)) > 3)
        pids = group.process_group.pids
        os.kill(pids[victim], signal.SIGKILL)
        async with asyncio.timeout(DEADLINE_S):
            await asyncio.shield(group.process_group.ended)
            # Nobody kills the other: it loses its peer, in a read or in a collective, and leaves by itself.
            while None in group.process_group.exit_codes:
                await asyncio.sleep(0.01)
        codes = group.process_group.exit_codes
        assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 3, group.process_group.describe_exits()
    assert list(tmp_path.iterdir()) == []


async def test_a_rank_that_cannot_load_fails_the_load_of_the_group(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(EngineLoadError) as caught:
        async with RealGroup(tmp_path, checkpoint, ranks=3):
            pass
    assert caught.value.kind == "unsupported_parallelism"
    assert "number of attention heads (4) does not divide by the tensor parallel size 3" in caught.value.message
    assert list(tmp_path.iterdir()) == []
