from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest
from cortex_core.errors import ApiError
from hypothesis import given, settings
from hypothesis import strategies as st
from neuron.lifecycle.admission import Admission, Ticket


def admission(*, in_flight: int = 1, queue: int = 2, wait_s: float = 60.0) -> Admission:
    return Admission(max_in_flight=in_flight, max_queue_depth=queue, max_wait_s=wait_s)


def closed() -> ApiError:
    return ApiError("overloaded", "closed", code="shutting_down", retry_after=15)


async def test_seats_are_given_in_order_of_arrival() -> None:
    desk = admission()
    with desk.apply() as first:
        assert first.is_seated
        second, third = desk.apply(), desk.apply()
        assert (desk.in_flight, desk.queue_depth) == (1, 2)
        assert not await second.wait(0)
    assert await second.wait(0) and not await third.wait(0)
    second.__exit__(None, None, None)
    assert await third.wait(0)
    third.__exit__(None, None, None)
    assert (desk.in_flight, desk.queue_depth) == (0, 0)


async def test_a_full_queue_sends_away_at_once() -> None:
    desk = admission(queue=0)
    with desk.apply(), pytest.raises(ApiError) as caught:
        desk.apply()
    assert caught.value.status == 429 and caught.value.code == "rate_limit_exceeded"
    assert caught.value.retry_after is not None
    assert desk.rejected_queue_full == 1


async def test_waiting_has_a_deadline() -> None:
    desk = admission(wait_s=0.0)
    with desk.apply(), desk.apply() as second:
        with pytest.raises(ApiError) as caught:
            await second.wait(60)
        assert caught.value.status == 503 and caught.value.code == "queue_timeout"
    assert desk.rejected_timeout == 1 and desk.in_flight == 0 and desk.queue_depth == 0


async def test_F16_a_client_that_leaves_the_queue_leaves_no_trace() -> None:
    desk = admission()

    async def wait_for_ever() -> None:
        with desk.apply() as ticket:
            await ticket.wait(1000)

    with desk.apply():
        waiting = asyncio.create_task(wait_for_ever())
        await asyncio.sleep(0)
        assert desk.queue_depth == 1
        waiting.cancel()
        with suppress(asyncio.CancelledError):
            await waiting
        assert desk.queue_depth == 0
    with desk.apply() as ticket:
        assert ticket.is_seated


async def test_leaving_with_a_seat_that_was_just_given_passes_it_on() -> None:
    desk = admission()
    first, second, third = desk.apply(), desk.apply(), desk.apply()
    first.__exit__(None, None, None)  # the seat is now second's, who does not know yet
    second.__exit__(None, None, None)
    assert await third.wait(0)
    third.__exit__(None, None, None)
    assert desk.in_flight == 0


async def test_F32_closing_wakes_the_queue_and_leaves_who_works() -> None:
    desk = admission()
    with desk.apply(), desk.apply() as second:
        waiting = asyncio.create_task(second.wait(1000))
        await asyncio.sleep(0)
        desk.close(closed)
        with pytest.raises(ApiError) as caught:
            await waiting
        assert caught.value.code == "shutting_down"
        with pytest.raises(ApiError):
            desk.apply()
        assert desk.in_flight == 1
    desk.open()
    with desk.apply() as ticket:
        assert ticket.is_seated


async def test_drained_waits_for_the_last() -> None:
    desk = admission(in_flight=2)
    first, second = desk.apply(), desk.apply()
    waiting = asyncio.create_task(desk.drained())
    first.__exit__(None, None, None)
    await asyncio.sleep(0)
    assert not waiting.done()
    second.__exit__(None, None, None)
    await waiting
    await desk.drained()


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["apply", "leave", "close", "open"]), st.integers(0, 30)), max_size=60))
def test_seats_and_places_are_never_lost(actions: list[tuple[str, int]]) -> None:
    async def play() -> None:
        desk = admission(in_flight=2, queue=3)
        tickets: list[Ticket] = []
        for action, number in actions:
            if action == "apply":
                with suppress(ApiError):
                    tickets.append(desk.apply())
            elif action == "leave" and tickets:
                tickets.pop(number % len(tickets)).__exit__(None, None, None)
            elif action == "close":
                desk.close(closed)
            elif action == "open":
                desk.open()
            assert desk.in_flight == sum(ticket.is_seated for ticket in tickets) <= 2
            assert desk.queue_depth <= 3
        for ticket in tickets:
            ticket.__exit__(None, None, None)
        assert desk.in_flight == 0 and desk.queue_depth == 0

    asyncio.run(play())
