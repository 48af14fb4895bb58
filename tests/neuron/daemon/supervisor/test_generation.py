"""One request's sequences as an iterator: updates, wake-ups, heartbeats, failures and cancellation."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from cortex_core.errors import ApiError
from neuron.daemon.supervisor.generation import Generation, LiveSequence
from neuron.protocol import Generate, SamplingParams, SequenceUpdate

RESUMED = Generate(0, [1, 2], SamplingParams(), max_tokens=9, output_ids=(3,))


class Request:
    """A generation with so many choices, and the sequences that it has let go."""

    def __init__(self, num_choices: int = 1, **settings: Any) -> None:
        self.forgotten: list[LiveSequence] = []
        self.generation = Generation(self.forgotten.append, **settings)
        self.sequences = [
            LiveSequence(
                number, number, Generate(0, [1, 2], SamplingParams(), max_tokens=9, output_ids=(3,)), self.generation
            )
            for number in range(num_choices)
        ]
        for sequence in self.sequences:
            self.generation.add(sequence)

    def push(self, choice: int, *tokens: int, **more: Any) -> None:
        self.generation.push(self.sequences[choice], SequenceUpdate(choice, list(tokens), **more))


async def test_all_updates_since_the_last_look_come_at_once_and_it_ends_with_the_last_choice() -> None:
    request = Request(2)
    request.push(0, 4)
    request.push(1, 5, finish="stop")
    request.push(0, 6, finish="length")
    batches = [[(choice, update.token_ids) for choice, update in batch] async for batch in request.generation]
    assert batches == [[(0, [4]), (1, [5]), (0, [6])]]
    assert request.generation.num_live == 0 and request.forgotten == []


async def test_a_reader_that_waits_is_woken_by_an_update() -> None:
    request = Request()
    reading = asyncio.ensure_future(anext(request.generation))
    await asyncio.sleep(0)
    assert not reading.done()
    request.push(0, 4)
    assert [choice for choice, _ in await reading] == [0]


async def test_a_silence_is_an_empty_batch() -> None:
    assert await anext(Request(heartbeat_s=0.001).generation) == []


async def test_leaving_cancels_what_still_runs() -> None:
    request = Request(3)
    async with request.generation:
        request.push(0, 4, finish="stop")
        request.generation.end_choice(2)
    assert [sequence.number for sequence in request.forgotten] == [2, 1]
    assert request.generation.num_live == 0


async def test_a_failure_comes_after_the_updates_before_it_and_ends_the_other_choices() -> None:
    request = Request(2)
    request.push(0, 4)
    request.generation.fail(ApiError("internal", "first"), failed=request.sequences[0])
    request.generation.fail(ApiError("internal", "second"))
    assert [choice for choice, _ in await anext(request.generation)] == [0]
    with pytest.raises(ApiError, match="first"):
        await anext(request.generation)
    assert request.forgotten == request.sequences[1:]


async def test_a_submission_goes_on_where_the_last_engine_stopped() -> None:
    request = Request()
    request.push(0, 4, 5)
    again = request.sequences[0].submission(77)
    assert (again.request_id, again.output_ids) == (77, (3, 4, 5))


async def test_a_client_is_told_once_how_many_tokens_were_cached() -> None:
    sequence = Request().sequences[0]
    first = sequence.without_repetition(SequenceUpdate(1, [4], cached_tokens=16))
    again = sequence.without_repetition(SequenceUpdate(1, [5], cached_tokens=32))
    assert (first.cached_tokens, again.cached_tokens) == (16, None) and again.token_ids == [5]
