"""Work that takes some milliseconds is done once in a round of the loop, whoever else is ready."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from cortex_gateway.bodies import payload
from cortex_gateway.bodies.loop_turns import LoopTurns
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


async def test_H13_there_is_one_turn_in_a_round_in_the_order_of_asking() -> None:
    turns, now = LoopTurns(), rounds()
    taken: list[tuple[int, int]] = []

    async def work(number: int) -> None:
        await turns.next()
        taken.append((number, now()))

    tasks = [asyncio.create_task(work(number)) for number in range(30)]
    await asyncio.gather(*tasks)
    assert [number for number, _ in taken] == list(range(30))
    assert len({when for _, when in taken}) == 30


async def test_H13_who_does_not_wait_any_more_holds_nobody_up() -> None:
    turns = LoopTurns()
    tasks = [asyncio.create_task(turns.next()) for _ in range(6)]
    await asyncio.sleep(0)
    for task in tasks[1:4]:
        task.cancel()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(each) for each in found].count(asyncio.CancelledError) == 3
    await turns.next()


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
