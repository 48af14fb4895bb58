"""The same for a model divided among two processes: whatever befalls one of them, both are rebuilt."""

from __future__ import annotations

import pytest

from tests.chaos.harness import MODEL, Neuron, Undisturbed
from tests.chaos.streams import Streams, assert_same, crowd

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(900), pytest.mark.slow]

TWO = {"tensor_parallel": 2}


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.full)])
async def test_32_streams_outlive_a_killed_rank(neuron: Neuron, undisturbed: Undisturbed, rank: int) -> None:
    requests = crowd(32)
    expected = await undisturbed.answers(neuron, requests, **TWO)
    await neuron.load(MODEL, **TWO)
    before = neuron.engine_pids()
    assert sorted(before) == [0, 1]
    streams = Streams(neuron, requests)
    await streams.have_begun()
    neuron.kill_rank(rank)
    assert_same(await streams.answers(), expected)
    after = neuron.engine_pids()
    assert sorted(after) == [0, 1] and not set(after.values()) & set(before.values()), "both ranks are new"
    assert await neuron.metric("neuron_engine_restarts", model=MODEL) == 1


@pytest.mark.full
async def test_F12_a_rank_stopped_in_a_collective_costs_a_pause(neuron: Neuron, undisturbed: Undisturbed) -> None:
    requests = crowd(4)
    expected = await undisturbed.answers(neuron, requests, **TWO)
    await neuron.load(MODEL, **TWO)
    seen = len(neuron.log)
    streams = Streams(neuron, requests)
    await streams.have_begun()
    neuron.stop_rank(1)
    assert_same(await streams.answers(), expected)
    log = neuron.log[seen:]
    assert "seems stuck" in log
    assert "rank 0] " in log and "all_reduce" in log, "where the other rank waited is in the log"


async def test_F12_a_rank_that_hangs_before_a_collective_is_named_by_its_stack(
    neuron: Neuron, undisturbed: Undisturbed
) -> None:
    requests = crowd(4)
    expected = await undisturbed.answers(neuron, requests, **TWO)
    await neuron.load(MODEL, {"lever": "hang", "rank": 1, "step": 40, "epochs": [0]}, **TWO)
    seen = len(neuron.log)
    assert_same(await Streams(neuron, requests).answers(), expected)
    log = neuron.log[seen:]
    assert any("rank 1] " in line and "_hang" in line for line in log.splitlines())


@pytest.mark.full
async def test_a_rank_killed_while_the_group_loads_is_loaded_all_the_same(neuron: Neuron) -> None:
    await neuron.load(MODEL, {"lever": "fail_load", "how": "kill", "rank": 1, "epochs": [0]}, **TWO)
    assert sorted(neuron.engine_pids()) == [0, 1]


@pytest.mark.full
async def test_nan_logits_of_a_divided_model_end_one_request(neuron: Neuron, undisturbed: Undisturbed) -> None:
    requests = crowd(4)
    expected = await undisturbed.answers(neuron, requests, **TWO)
    await neuron.load(MODEL, {"lever": "poison", "step": 40, "row": 1}, **TWO)
    answers = await Streams(neuron, requests).answers()
    (failed,) = [index for index, answer in enumerate(answers) if answer.error is not None]
    assert await neuron.metric("neuron_engine_restarts", model=MODEL) == 0
    again = await neuron.ask(requests[failed])
    answers[failed] = again
    assert_same(answers, expected)
