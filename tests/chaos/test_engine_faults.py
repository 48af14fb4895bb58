"""What happens to an engine, and what its clients notice: a pause, or an error that names its cause."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.harness import CHAT, CONFIG, MESSAGES, MODEL, PATHS, Neuron, Undisturbed, eventually, running
from tests.chaos.streams import GREEDY, SEEDED, SHORT, Streams, ask_for, assert_same, crowd

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(900), pytest.mark.slow]


# ---------------------------------------------------------------------- the process dies


@pytest.mark.parametrize(
    ("path", "request_", "stream"),
    [
        pytest.param(CHAT, GREEDY, True, marks=pytest.mark.full),
        (CHAT, SEEDED, True),
        pytest.param(CHAT, GREEDY, False, marks=pytest.mark.full),
        pytest.param(MESSAGES, GREEDY, True, marks=pytest.mark.full),
        (MESSAGES, GREEDY, False),
    ],
    ids=["chat-stream", "chat-seeded", "chat-whole", "messages-stream", "messages-whole"],
)
async def test_an_answer_outlives_the_engine_that_began_it(
    neuron: Neuron, undisturbed: Undisturbed, path: str, stream: bool, request_: dict[str, Any]
) -> None:
    expected = await undisturbed.answers(neuron, [request_])
    await neuron.load(MODEL, {"lever": "kill", "step": 30, "epochs": [0]})
    answer = await neuron.ask(request_, path=path, stream=stream)
    assert_same([answer], expected)
    assert await neuron.metric("neuron_engine_restarts", model=MODEL) == 1
    if stream:
        assert answer.num_pings >= 1, "the client was left without a sign of life"


async def test_a_killed_engine_loses_none_of_its_streams(neuron: Neuron, undisturbed: Undisturbed) -> None:
    requests = crowd(8)
    expected = await undisturbed.answers(neuron, requests)
    await neuron.load()
    streams = Streams(neuron, requests)
    await streams.have_begun()
    neuron.kill_rank(0)
    assert_same(await streams.answers(), expected)
    assert (await neuron.model())["status"] == "loaded"


async def test_an_engine_killed_in_a_prefill_loses_nobody(neuron: Neuron, undisturbed: Undisturbed) -> None:
    expected = await undisturbed.answers(neuron, [GREEDY])
    await neuron.load(MODEL, {"lever": "kill", "step": 1, "epochs": [0]})
    assert_same([await neuron.ask(GREEDY)], expected)


@pytest.mark.full
async def test_an_engine_killed_twice_in_a_row_loses_nobody(neuron: Neuron, undisturbed: Undisturbed) -> None:
    requests = crowd(4)
    expected = await undisturbed.answers(neuron, requests)
    await neuron.load(MODEL, {"lever": "kill", "step": 1, "epochs": [1]})
    streams = Streams(neuron, requests)
    await streams.have_begun()
    neuron.kill_rank(0)
    assert_same(await streams.answers(), expected)
    assert await neuron.metric("neuron_engine_restarts", model=MODEL) == 2


async def test_an_engine_killed_while_it_loads_is_loaded_all_the_same(neuron: Neuron) -> None:
    await neuron.load(MODEL, {"lever": "fail_load", "how": "kill", "epochs": [0]})
    assert "42" in (await neuron.ask(SHORT)).text


@pytest.mark.full
async def test_an_engine_killed_while_it_is_rebuilt_is_rebuilt_again(neuron: Neuron, undisturbed: Undisturbed) -> None:
    expected = await undisturbed.answers(neuron, [GREEDY])
    kill_in_rebuild = {"lever": "fail_load", "how": "kill", "phase": "warm_up", "epochs": [1]}
    await neuron.load(MODEL, {"lever": "kill", "step": 30, "epochs": [0]}, kill_in_rebuild)
    assert_same([await neuron.ask(GREEDY)], expected)
    assert await neuron.metric("neuron_engine_restarts", model=MODEL) == 2


async def test_a_request_that_kills_its_engine_fails_alone(neuron: Neuron, undisturbed: Undisturbed) -> None:
    requests = crowd(4)
    expected = await undisturbed.answers(neuron, requests)
    deadly = ask_for("ß", max_tokens=5)
    status, plain = await neuron.call("POST", "/models/load", {"model_id": MODEL})
    assert status == 200, plain
    ids = [(await neuron.call("POST", "/tokenize", {"model": MODEL, "prompt": text}))[1]["tokens"] for text in "ßa"]
    (token, *_) = [token for token in ids[0] if token not in ids[1]]
    await neuron.unload()
    await neuron.load(MODEL, {"lever": "kill", "token": token})
    streams = Streams(neuron, requests)
    await streams.have_begun()
    killer = await neuron.ask(deadly)
    assert killer.error is not None and killer.error["code"] == "request_kills_engine", killer
    assert_same(await streams.answers(), expected)
    assert (await neuron.model())["status"] == "loaded"
    assert "42" in (await neuron.ask(SHORT)).text


async def test_a_client_that_leaves_while_its_engine_is_rebuilt_is_forgotten(neuron: Neuron) -> None:
    slow_rebuild = {"lever": "slow_disk", "seconds_per_mb": 0.5, "epochs": [1]}
    await neuron.load(MODEL, {"lever": "kill", "step": 30, "epochs": [0]}, slow_rebuild)
    asking = [
        asyncio.create_task(neuron.ask(GREEDY, path=path, stream=stream)) for path in PATHS for stream in (False, True)
    ]
    await eventually(lambda: _is(neuron, "recovering"))
    for task in asking:
        task.cancel()
    await eventually(lambda: _has_seats_free(neuron))
    await eventually(lambda: _is(neuron, "loaded"))
    assert await neuron.metric("neuron_engine_running", model=MODEL) == 0, "it computes what nobody waits for"


async def _is(neuron: Neuron, status: str) -> bool:
    return (await neuron.model())["status"] == status


async def _has_seats_free(neuron: Neuron) -> bool:
    return (await neuron.health())["in_flight"] == 0


# ---------------------------------------------------------------------- the process lives, and does not work


@pytest.mark.parametrize(
    "how", [pytest.param("stopped by a signal", marks=pytest.mark.full), "waiting for ever in a step"]
)
async def test_F12_an_engine_that_hangs_is_killed_and_its_streams_go_on(
    neuron: Neuron, undisturbed: Undisturbed, how: str
) -> None:
    requests = crowd(4)
    expected = await undisturbed.answers(neuron, requests)
    is_stopped = how == "stopped by a signal"
    await neuron.load(MODEL, *([] if is_stopped else [{"lever": "hang", "step": 40, "epochs": [0]}]))
    seen = len(neuron.log)
    streams = Streams(neuron, requests)
    if is_stopped:
        await streams.have_begun()
        neuron.stop_rank(0)
    assert_same(await streams.answers(), expected)
    log = neuron.log[seen:]
    assert "seems stuck" in log
    assert is_stopped or "no step was completed for" in log
    assert is_stopped or "_hang" in log, "the stacks of its threads are in the log"
    assert await neuron.metric("neuron_engine_restarts", model=MODEL) == 1


# ---------------------------------------------------------------------- a step fails


async def test_nan_logits_end_one_request_with_what_they_looked_like(neuron: Neuron, undisturbed: Undisturbed) -> None:
    requests = crowd(4)
    expected = await undisturbed.answers(neuron, requests)
    await neuron.load(MODEL, {"lever": "poison", "step": 40, "row": 2})
    answers = await Streams(neuron, requests).answers()
    failed = [index for index, answer in enumerate(answers) if answer.error is not None]
    assert len(failed) == 1, answers
    (index,) = failed
    error = answers[index].error
    assert error is not None and "invalid numbers" in error["message"]
    vocab_size = 1024 if "1024 NaN" in error["message"] else None
    assert vocab_size or " NaN, 0 +inf, 0 -inf of " in error["message"]
    if "code" in error:
        assert error["code"] == "unhealthy_logits" and error["logits"]["nan"] > 0
        assert error["logits"]["finite_mean"] is None
    rest = [number for number in range(4) if number != index]
    assert_same([answers[number] for number in rest], [expected[number] for number in rest])
    assert expected[index].text.startswith(answers[index].text), "nothing after the bad logits was sent"
    assert await neuron.metric("neuron_engine_restarts", model=MODEL) == 0
    # Nothing of what it computed is found again, and the page it computed in is clean.
    again = await neuron.ask(requests[index])
    assert_same([again], [expected[index]])


async def test_F7_a_step_without_memory_loses_nobody(neuron: Neuron, undisturbed: Undisturbed) -> None:
    requests = crowd(4)
    expected = await undisturbed.answers(neuron, requests)
    await neuron.load(MODEL, {"lever": "out_of_memory", "step": 20, "times": 7})
    assert_same(await Streams(neuron, requests).answers(), expected)
    assert await neuron.metric("neuron_engine_restarts", model=MODEL) == 0


async def test_a_lost_device_is_rebuilt_and_loses_nobody(neuron: Neuron, undisturbed: Undisturbed) -> None:
    requests = crowd(4)
    expected = await undisturbed.answers(neuron, requests)
    await neuron.load(MODEL, {"lever": "device_fault", "step": 40, "epochs": [0]})
    assert_same(await Streams(neuron, requests).answers(), expected)
    assert await neuron.metric("neuron_engine_restarts", model=MODEL) == 1


# ---------------------------------------------------------------------- it does not come back


async def test_where_no_engine_comes_back_the_model_says_why_and_a_later_load_starts_afresh(tmp_path: Path) -> None:
    config = CONFIG.replace("[engine]\n", "[engine]\nrecovery_attempts = 1\n")
    async with running(tmp_path, config=config) as neuron:
        before = await neuron.belongings()
        refuse = {"lever": "fail_load", "epochs": [1, 2]}
        await neuron.load(MODEL, {"lever": "kill", "step": 30, "epochs": [0]}, refuse)
        streamed, whole = await asyncio.gather(
            neuron.ask(GREEDY, path=CHAT), neuron.ask(GREEDY, path=MESSAGES, stream=False)
        )
        assert streamed.error is not None and streamed.error["code"] == "engine_restarting"
        assert whole.status == 529 and whole.error is not None and "could not be rebuilt" in whole.error["message"]
        ended = streamed.error["ended_engine"]
        assert ended and whole.error["details"]["ended_engine"] == ended, "both were in the one that ended"
        model = await neuron.model()
        assert model["status"] == "failed" and "debug lever" in model["error"], model
        refused = await neuron.ask(SHORT)
        assert refused.status == 503 and refused.error is not None and refused.error["code"] == "model_failed"
        await neuron.load()
        assert "42" in (await neuron.ask(SHORT)).text
        await neuron.unload()
        await neuron.leaves_nothing_behind(before)
