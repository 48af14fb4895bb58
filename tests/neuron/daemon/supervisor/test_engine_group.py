"""Engine groups against a real child process that speaks the protocol."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from cortex_core.errors import ApiError
from neuron.daemon.supervisor.engine_group import EngineGroup, GroupDied, GroupFailed, GroupLoaded, GroupLoading
from neuron.protocol import EngineStats

from tests.neuron.daemon.supervisor.harness import is_alive, tokens_of
from tests.neuron.scripted_engine import Events, eventually, make_group, mute_command, request
from tests.neuron.scripted_worker import HOLD, REFUSE, SILENT


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


def open_fds() -> set[str]:
    return {f"{fd.name} {fd.readlink()}" for fd in Path("/proc/self/fd").iterdir() if fd.exists()}


async def test_a_group_loads_generates_and_leaves_nothing_behind(tmp_path: Path, events: Events) -> None:
    before = open_fds()
    group = make_group(tmp_path, events)
    group.start()
    loaded = await events.until(GroupLoaded)
    assert loaded.loaded.architecture == "scripted"
    assert any(isinstance(event, GroupLoading) and event.progress.bytes_done == 100 for event in events.seen)
    assert await tokens_of(group, 9, max_tokens=5) == [100, 101, 102, 103, 104]
    (pid,) = group.pids
    await group.stop()
    assert not is_alive(pid)
    assert list(tmp_path.iterdir()) == []
    await eventually(lambda: open_fds() <= before)


async def test_choices_run_side_by_side_and_end_one_by_one(group: EngineGroup) -> None:
    tokens: dict[int, list[int]] = {0: [], 1: []}
    async with await group.generate([request(9, max_tokens=2), request(9, max_tokens=3)]) as generation:
        async for batch in generation:
            for choice, update in batch:
                tokens[choice] += update.token_ids
    assert tokens == {0: [100, 101], 1: [100, 101, 102]}
    assert group.num_live == 0


async def test_a_sequence_keeps_what_a_resumption_would_need(group: EngineGroup) -> None:
    async with await group.generate([request(HOLD, 7, 8)]) as generation:
        await anext(generation)
        (sequence,) = generation.sequences
        assert sequence.generate.prompt_ids == [HOLD, 7, 8]
        assert sequence.generate.sampling.seed == 0
        assert sequence.output_ids == [100]


async def test_leaving_the_context_cancels_in_the_engine(group: EngineGroup) -> None:
    async with await group.generate([request(HOLD), request(SILENT)]) as generation:
        await anext(generation)
        await eventually(lambda: group.stats.running == 2)
    await eventually(lambda: group.stats.running == 0)
    assert group.num_live == 0


async def test_ending_one_choice_leaves_the_others(group: EngineGroup) -> None:
    async with await group.generate([request(HOLD), request(9, max_tokens=3)]) as generation:
        seen: list[tuple[int, list[int]]] = []
        async for batch in generation:
            seen += [(choice, update.token_ids) for choice, update in batch]
            generation.end_choice(0)
        assert [ids for choice, ids in seen if choice == 1] == [[100], [101], [102]]
    await eventually(lambda: group.stats.running == 0)


async def test_one_step_wakes_its_reader_once(group: EngineGroup) -> None:
    async with await group.generate([request(HOLD), request(HOLD), request(HOLD)]) as generation:
        batches = [await anext(generation)]
        while sum(map(len, batches)) < 3:
            batches.append(await anext(generation))
    assert len(batches) <= 2  # the engine may have stepped before the last frame arrived


async def test_silence_becomes_heartbeats(group: EngineGroup) -> None:
    async with await group.generate([request(SILENT)], heartbeat_s=0.01) as generation:
        assert await anext(generation) == []
        assert await anext(generation) == []


async def test_a_failed_sequence_takes_no_other_with_it(group: EngineGroup) -> None:
    async with await group.generate([request(HOLD)]) as neighbour:
        await anext(neighbour)
        with pytest.raises(ApiError) as caught:
            await tokens_of(group, REFUSE)
        assert caught.value.status == 400 and caught.value.code == "invalid_schema"
        assert neighbour.num_live == 1


async def test_F10_a_killed_engine_is_noticed_and_comes_back(group: EngineGroup, events: Events) -> None:
    (pid,) = group.pids
    os.kill(pid, signal.SIGKILL)
    died = await events.until(GroupDied)
    assert died.retry_in_s == 0
    assert "SIGKILL" in died.reason or "socket" in died.reason  # closed, or reset where a frame was still unread
    await events.until(GroupLoaded, 2)
    assert group.pids != [pid] and group.num_restarts == 1
    assert await tokens_of(group, 9, max_tokens=2) == [100, 101]


async def test_requests_without_a_group_to_wait_for_are_told_to_come_back(tmp_path: Path, events: Events) -> None:
    group = make_group(tmp_path, events, debug={"load": "silent"})
    group.start()
    await events.until(GroupLoading)
    with pytest.raises(ApiError) as caught:
        await group.generate([request(9)])
    assert caught.value.code == "engine_restarting" and caught.value.retry_after >= 1
    (pid,) = group.pids
    await group.stop()
    assert not is_alive(pid)


async def test_a_group_that_keeps_dying_is_given_up(tmp_path: Path, events: Events) -> None:
    group = make_group(tmp_path, events, debug={"load": "die", "load_epochs": [1, 2, 3]}, attempts=1)
    group.start()
    await events.until(GroupLoaded)
    os.kill(group.pids[0], signal.SIGKILL)
    failed = await events.until(GroupFailed)
    assert "2 failures in a row" in failed.reason and "out of luck" in failed.reason
    assert group.state == "failed"
    await group.stop()


@pytest.mark.parametrize(
    ("load", "kind", "text", "retries"),
    [("fail", "bad_checkpoint", "a tensor is missing", 0), ("die", "died", "exited with code 3", 1)],
)
async def test_a_first_load_that_says_why_it_fails_is_not_repeated(
    tmp_path: Path, events: Events, load: str, kind: str, text: str, retries: int
) -> None:
    group = make_group(tmp_path, events, debug={"load": load})
    group.start()
    failed = await events.until(GroupFailed)
    assert failed.kind == kind and text in failed.reason and group.num_restarts == retries
    assert not any(map(is_alive, group.pids)) and list(tmp_path.iterdir()) == []
    await group.stop()


async def test_a_load_without_progress_is_ended(tmp_path: Path, events: Events) -> None:
    group = make_group(tmp_path, events, debug={"load": "silent"}, stall_timeout_s=0.3)
    group.start()
    assert (await events.until(GroupFailed)).kind == "stalled"
    assert not any(map(is_alive, group.pids))
    await group.stop()


async def test_a_process_that_never_connects_is_ended(tmp_path: Path, events: Events) -> None:
    group = make_group(tmp_path, events, command=mute_command, start_timeout_s=0.3)
    group.start()
    assert (await events.until(GroupFailed)).kind == "start_timeout"
    assert not any(map(is_alive, group.pids)) and list(tmp_path.iterdir()) == []
    await group.stop()


async def test_stopping_while_loading_kills_the_process(tmp_path: Path, events: Events) -> None:
    group = make_group(tmp_path, events, debug={"load": "silent"})
    group.start()
    await events.until(GroupLoading)
    (pid,) = group.pids
    await group.stop()
    assert not is_alive(pid) and list(tmp_path.iterdir()) == []


async def test_stopping_ends_requests_in_flight(group: EngineGroup) -> None:
    async with await group.generate([request(HOLD)]) as generation:
        await anext(generation)
        stopping = asyncio.create_task(group.stop())
        with pytest.raises(ApiError) as caught:
            await anext(generation)
        assert caught.value.code == "model_unloaded"
        await stopping
    with pytest.raises(ApiError):
        await group.generate([request(9)])


async def test_the_last_statistics_stay(group: EngineGroup) -> None:
    assert group.stats == EngineStats()
    await tokens_of(group, 9)
    assert group.stats.step > 0 and group.stats.free_pages == group.stats.total_pages
