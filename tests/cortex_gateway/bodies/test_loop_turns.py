"""Work that takes some milliseconds is done once in a round of the loop, whoever else is ready."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from cortex_gateway.bodies import payload
from cortex_gateway.bodies.loop_turns import ROUND_BYTES, LoopTurns
from cortex_gateway.surfaces import envelope

from tests.cortex_gateway.fake_neuron import FakeNeuron
from tests.cortex_gateway.gateway_client import MODEL, Start


def rounds() -> Callable[[], int]:
    """Counts the rounds of this loop from now on."""
    loop, count = asyncio.get_running_loop(), 0

    def tick() -> None:
        nonlocal count
        count += 1
        loop.call_soon(tick)

    tick()
    return lambda: count


async def turns_of(sizes: list[int]) -> tuple[list[int], Counter[int]]:
    """In which order so many bytes each had their turn, and how many bytes of them each round had."""
    turns, now = LoopTurns(), rounds()
    order: list[int] = []
    per_round: Counter[int] = Counter()

    async def work(number: int, num_bytes: int) -> None:
        await turns.next(num_bytes)
        order.append(number)
        per_round[now()] += num_bytes

    await asyncio.gather(*(work(number, num_bytes) for number, num_bytes in enumerate(sizes)))
    return order, per_round


async def test_H13_a_large_body_has_a_round_to_itself_in_the_order_of_asking() -> None:
    order, per_round = await turns_of([ROUND_BYTES + 1] * 30)
    assert order == list(range(30)) and len(per_round) == 30


async def test_H13_smaller_ones_share_a_round_as_long_as_there_is_room() -> None:
    sizes = [ROUND_BYTES // 4] * 10 + [ROUND_BYTES] + [1000] * 50 + [ROUND_BYTES // 2 + 1] * 4
    order, per_round = await turns_of(sizes)
    assert order == list(range(len(sizes)))
    assert max(per_round.values()) <= ROUND_BYTES and len(per_round) <= 9


async def test_H13_whoever_finds_room_awaits_nothing() -> None:
    turns = LoopTurns()
    first, second = turns.next(ROUND_BYTES // 2), turns.next(ROUND_BYTES // 2)
    for turn in (first, second):
        with pytest.raises(StopIteration):
            turn.send(None)


async def test_H13_who_does_not_wait_any_more_holds_nobody_up() -> None:
    turns = LoopTurns()
    tasks = [asyncio.create_task(turns.next(ROUND_BYTES)) for _ in range(6)]
    await asyncio.sleep(0)
    for task in tasks[1:4]:
        task.cancel()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(each) for each in found].count(asyncio.CancelledError) == 3
    await turns.next(ROUND_BYTES)


async def test_H13_bodies_that_are_ready_at_once_are_read_one_in_a_round(
    neuron: FakeNeuron, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    neuron.have(MODEL)
    client = await start(neuron)
    now = rounds()
    read_in: list[int] = []
    real: Any = envelope._decoder

    class Decoder:
        def decode(self, body: bytes) -> Any:
            read_in.append(now())
            return real.decode(body)

    monkeypatch.setattr(envelope, "_decoder", Decoder())
    messages = [{"role": "user", "content": "a"}] * 20_000
    data = json.dumps({"model": MODEL, "messages": messages}).encode()
    assert payload.MAX_QUICK_BYTES < len(data) < payload.MAX_INLINE_BYTES

    async def ask() -> int:
        async with client.post("/v1/chat/completions", data) as response:
            return int(response.status)

    assert await asyncio.gather(*(ask() for _ in range(12))) == [200] * 12
    assert len(read_in) == 12 and len(set(read_in)) == 12
    assert {sent for _, _, sent in neuron.requests} == {data}
