from __future__ import annotations

import asyncio
from contextlib import ExitStack, suppress

import pytest
from cortex_core.errors import ApiError
from neuron.daemon.admission.admission import Admission, AdmissionLimits, Ticket
from neuron.daemon.admission.capacity import KVCapacity, KVNeed

ONE = KVNeed(minimum=1, expected=1)


def desk(
    *,
    in_flight: int = 1,
    queue: int = 2,
    wait_s: float = 60.0,
    kv_wait_s: float = 60.0,
    pages: int | None = None,
    **more: int,
) -> Admission:
    admission = Admission(
        AdmissionLimits(
            max_in_flight=in_flight, max_queue_depth=queue, max_wait_s=wait_s, kv_max_wait_s=kv_wait_s, **more
        )
    )
    if pages is not None:
        admission.set_capacity(KVCapacity(num_pages=pages, page_size=16, bytes_per_token=2**16))
    return admission


def come(admission: Admission, principal: str | None = "a", need: KVNeed = ONE) -> Ticket:
    ticket = admission.apply(principal)
    ticket.request(need)
    return ticket


def leave(*tickets: Ticket) -> None:
    for ticket in tickets:
        ticket.__exit__(None, None, None)


def pages(number: int) -> KVNeed:
    return KVNeed(minimum=number, expected=number)


def closed() -> ApiError:
    return ApiError("overloaded", "closed", code="shutting_down", retry_after=15)


def is_empty(admission: Admission) -> bool:
    return not (
        admission.in_flight
        or admission.anon_in_flight
        or admission.queue_depth
        or admission.reserved_pages
        or admission.num_principals
    )


# ---------------------------------------------------------------- seats, places, deadlines


async def test_seats_are_given_in_order_of_arrival() -> None:
    admission = desk()
    first, second, third = come(admission), come(admission), come(admission)
    assert (admission.in_flight, admission.queue_depth) == (1, 2)
    assert first.is_seated and not await second.wait(0)
    leave(first)
    assert await second.wait(0) and not await third.wait(0)
    leave(second)
    assert await third.wait(0)
    leave(third)
    assert is_empty(admission)


async def test_a_full_queue_sends_away_at_once() -> None:
    admission = desk(queue=0)
    with come(admission), pytest.raises(ApiError) as caught:
        admission.apply("a")
    assert caught.value.status == 429 and caught.value.code == "rate_limit_exceeded"
    assert caught.value.retry_after == 2
    assert admission.rejected["queue_full"] == 1 and is_empty(admission)


async def test_waiting_has_a_deadline() -> None:
    admission = desk(wait_s=0.0)
    with come(admission), come(admission) as second:
        with pytest.raises(ApiError) as caught:
            await second.wait(60)
        assert caught.value.status == 503 and caught.value.code == "queue_timeout"
        assert admission.queue_depth == 0
    assert admission.rejected["wait_timeout"] == 1 and is_empty(admission)


async def test_F16_a_client_that_leaves_the_queue_leaves_no_trace() -> None:
    admission = desk()

    async def wait_for_ever() -> None:
        with come(admission) as ticket:
            await ticket.wait(1000)

    with come(admission):
        waiting = asyncio.create_task(wait_for_ever())
        await asyncio.sleep(0)
        assert admission.queue_depth == 1
        waiting.cancel()
        with suppress(asyncio.CancelledError):
            await waiting
        assert admission.queue_depth == 0
    with come(admission) as ticket:
        assert ticket.is_seated


async def test_leaving_with_a_seat_that_was_just_given_passes_it_on() -> None:
    admission = desk()
    first, second, third = come(admission), come(admission), come(admission)
    leave(first)  # the seat is now second's, who does not know yet
    leave(second)
    assert await third.wait(0)
    leave(third)
    assert is_empty(admission)


async def test_a_request_that_is_still_being_prepared_is_passed_by_others() -> None:
    admission = desk()
    preparing = admission.apply("a")
    ready = come(admission, "a")
    assert ready.is_seated and admission.queue_depth == 1
    leave(ready)
    preparing.request(ONE)
    assert preparing.is_seated
    leave(preparing)
    assert is_empty(admission)


async def test_F32_closing_wakes_the_queue_and_leaves_who_works() -> None:
    admission = desk(queue=3)
    working, waiting, preparing = come(admission), come(admission), admission.apply("b")
    asking = asyncio.create_task(waiting.wait(1000))
    await asyncio.sleep(0)
    admission.close(closed)
    with pytest.raises(ApiError) as caught:
        await asking
    assert caught.value.code == "shutting_down"
    with pytest.raises(ApiError) as caught:
        preparing.request(ONE)
    assert caught.value.code == "shutting_down"
    with pytest.raises(ApiError):
        admission.apply("a")
    assert (admission.in_flight, admission.queue_depth) == (1, 0)
    leave(working, waiting, preparing)
    admission.open()
    with come(admission) as ticket:
        assert ticket.is_seated
    assert is_empty(admission)


async def test_drained_waits_for_the_last() -> None:
    admission = desk(in_flight=2)
    first, second = come(admission), come(admission)
    waiting = asyncio.create_task(admission.drained())
    leave(first)
    await asyncio.sleep(0)
    assert not waiting.done()
    leave(second)
    await waiting
    await admission.drained()


# ---------------------------------------------------------------- KV pages


async def test_F17_a_request_waits_for_pages_although_seats_are_free() -> None:
    admission = desk(in_flight=8, queue=8, pages=10)
    first, second = come(admission, need=pages(6)), come(admission, need=pages(6))
    assert first.is_seated and not await second.wait(0)
    assert (admission.in_flight, admission.reserved_pages, admission.available_pages) == (1, 6, 4)
    leave(first)
    assert await second.wait(0) and admission.reserved_pages == 6
    leave(second)
    assert is_empty(admission)


async def test_F18_nobody_holds_pages_while_waiting_for_a_seat() -> None:
    admission = desk(in_flight=1, pages=10)
    first, second = come(admission, need=pages(2)), come(admission, need=pages(2))
    assert not second.is_seated and admission.reserved_pages == 2
    leave(first, second)


async def test_who_waits_for_pages_is_not_overtaken_by_smaller_requests() -> None:
    admission = desk(in_flight=8, queue=8, pages=10)
    first, big, small = (come(admission, need=pages(number)) for number in (6, 8, 1))
    assert first.is_seated and not big.is_seated and not small.is_seated
    leave(first)
    assert big.is_seated and small.is_seated and admission.reserved_pages == 9
    leave(big, small)
    assert is_empty(admission)


async def test_a_prompt_that_can_never_fit_is_refused_with_the_numbers() -> None:
    admission = desk(pages=10)
    with pytest.raises(ApiError) as caught, admission.apply("a") as ticket:
        ticket.request(pages(11))
    error = caught.value
    assert (error.status, error.code, error.retry_after) == (413, "prompt_too_long_for_vram", None)
    assert error.extras == {"required_mb": 11, "budget_mb": 10}
    assert admission.rejected["kv_unservable"] == 1 and is_empty(admission)


async def test_choices_that_do_not_fit_together_get_the_whole_cache_in_turn() -> None:
    admission = desk(in_flight=2, pages=10)
    with come(admission, need=KVNeed(minimum=3, expected=30)) as ticket:
        assert ticket.is_seated and admission.reserved_pages == 10


async def test_waiting_for_pages_has_a_longer_deadline_and_its_own_reason() -> None:
    admission = desk(in_flight=8, wait_s=0.0, kv_wait_s=60.0, pages=10)
    first, second = come(admission, need=pages(6)), come(admission, need=pages(6))
    assert not await second.wait(0)  # late for a seat, not for pages
    leave(first, second)
    admission = desk(in_flight=8, wait_s=0.0, kv_wait_s=0.0, pages=10)
    first, second = come(admission, need=pages(6)), come(admission, need=pages(6))
    with pytest.raises(ApiError) as caught:
        await second.wait(60)
    error = caught.value
    assert error.status == 503 and error.code == "kv_cache_timeout" and error.retry_after
    assert error.extras == {"required_mb": 6, "free_mb": 4}
    assert admission.rejected["kv_timeout"] == 1
    leave(first, second)
    assert is_empty(admission)


async def test_an_answer_that_outgrows_its_reservation_keeps_newcomers_out() -> None:
    admission = desk(in_flight=8, queue=8, pages=40)
    first = come(admission, need=KVNeed(minimum=1, expected=5, output_tokens=64))
    first.generated(64)
    assert admission.reserved_pages == 5
    first.generated(65)
    assert admission.reserved_pages == 5 + 16  # 256 tokens more
    second = come(admission, need=pages(20))
    assert not second.is_seated
    first.generated(100_000)  # the engine gave what was there, and sets others back
    assert admission.available_pages == 0
    leave(first)
    assert second.is_seated and admission.reserved_pages == 20
    first.generated(200_000)  # it is gone: this means nothing any more
    leave(second)
    assert is_empty(admission)


async def test_prompts_that_share_pages_leave_room_for_others() -> None:
    admission = desk(in_flight=8, queue=8, pages=10)
    free: list[int | None] = [10]
    admission.free_pages = lambda: free[0]
    need = KVNeed(minimum=6, expected=7, output_tokens=16)
    first, second, third = (come(admission, need=need) for _ in range(3))
    assert first.is_seated and not second.is_seated  # of a prompt that is not computed nobody knows what it shares
    free[0] = 3
    first.generated(1)
    assert not second.is_seated  # three are free, one or two of them for the first one's output
    free[0] = 9
    leave(first)
    assert second.is_seated and not third.is_seated
    free[0] = 10  # what it computed was all shared with others that hold it
    second.generated(1)
    assert third.is_seated and admission.reserved_pages == 14
    free[0] = None
    fourth = come(admission, need=pages(1))
    assert not fourth.is_seated
    leave(second)
    assert fourth.is_seated
    leave(third, fourth)
    assert is_empty(admission) and admission._unseen_pages == 0


async def test_a_rebuilt_engine_with_a_smaller_cache_sends_away_what_no_longer_fits() -> None:
    admission = desk(in_flight=1, queue=8, pages=10)
    first, big, small = (come(admission, need=pages(number)) for number in (1, 8, 2))
    admission.set_capacity(KVCapacity(num_pages=5, page_size=16, bytes_per_token=2**16))
    with pytest.raises(ApiError) as caught:
        await big.wait(0)
    assert caught.value.code == "prompt_too_long_for_vram"
    leave(first)
    assert small.is_seated
    leave(big, small)
    assert is_empty(admission)


# ---------------------------------------------------------------- fair shares


async def test_the_next_seat_goes_to_who_has_the_fewest() -> None:
    admission = desk(in_flight=3, queue=20)
    greedy = [come(admission, "greedy") for _ in range(10)]
    modest = come(admission, "modest")
    assert not modest.is_seated
    leave(greedy[0])
    assert modest.is_seated and not greedy[3].is_seated
    second = come(admission, "modest")
    leave(greedy[1])
    # One each at work, and the modest one had the last turn.
    assert greedy[3].is_seated and not second.is_seated
    leave(*greedy, modest, second)
    assert is_empty(admission)


async def test_a_newcomer_takes_the_last_place_of_the_longest_queue() -> None:
    admission = desk(in_flight=1, queue=3)
    greedy = [come(admission, "greedy") for _ in range(4)]
    modest = come(admission, "modest")
    with pytest.raises(ApiError) as caught:
        await greedy[3].wait(0)
    assert caught.value.status == 429 and caught.value.retry_after
    assert admission.rejected["per_principal"] == 1 and admission.queue_depth == 3
    with pytest.raises(ApiError):
        admission.apply("greedy")
    with pytest.raises(ApiError):
        admission.apply("modest")  # then it would have as many as the other
    assert admission.rejected["queue_full"] == 2
    leave(*greedy, modest)
    assert is_empty(admission)


async def test_with_one_seat_principals_take_turns() -> None:
    admission = desk(in_flight=1, queue=20)
    greedy = [come(admission, "greedy") for _ in range(8)]
    modest = come(admission, "modest")
    leave(greedy[0])
    assert greedy[1].is_seated  # as long without a turn as the other, and here before
    leave(greedy[1])
    assert modest.is_seated
    another = come(admission, "modest")
    leave(modest)
    assert greedy[2].is_seated
    leave(greedy[2])
    assert another.is_seated
    leave(another, *greedy[3:])
    assert is_empty(admission)


async def test_a_principal_has_a_ceiling_where_one_is_configured() -> None:
    admission = desk(in_flight=8, max_per_principal=2)
    mine = [come(admission, "a"), come(admission, "a")]
    with pytest.raises(ApiError) as caught:
        admission.apply("a")
    assert caught.value.status == 429 and admission.rejected["per_principal"] == 1
    with come(admission, "b") as other:
        assert other.is_seated
    leave(*mine)
    assert is_empty(admission)


# ---------------------------------------------------------------- requests without identity


async def test_F21_requests_without_identity_leave_a_seat_and_a_place_to_others() -> None:
    admission = desk(in_flight=4, queue=4)
    with ExitStack() as stack:
        anonymous = [stack.enter_context(come(admission, None)) for _ in range(7)]
        assert admission.anon_in_flight == 3 and sum(ticket.is_seated for ticket in anonymous) == 3
        with pytest.raises(ApiError) as caught:
            admission.apply(None)
        assert caught.value.status == 429 and admission.rejected["anon_yield"] == 1
        identified = stack.enter_context(come(admission, "a"))
        assert identified.is_seated
    assert is_empty(admission)


async def test_identified_requests_go_first() -> None:
    admission = desk(in_flight=2, queue=8)
    first, second = come(admission, "a"), come(admission, "a")
    anonymous = come(admission, None)
    third, fourth = come(admission, "a"), come(admission, "a")
    leave(first)
    assert third.is_seated and not anonymous.is_seated
    leave(second)
    assert fourth.is_seated and not anonymous.is_seated
    leave(third)
    assert anonymous.is_seated
    leave(anonymous, fourth)
    assert is_empty(admission)


async def test_the_only_seat_serves_requests_without_identity_too() -> None:
    admission = desk(in_flight=1, queue=0)
    with come(admission, None) as ticket:
        assert ticket.is_seated


async def test_no_seats_without_identity_is_a_refusal_that_says_why() -> None:
    admission = desk(in_flight=4, anon_max_in_flight=0)
    with pytest.raises(ApiError) as caught:
        admission.apply(None)
    assert caught.value.status == 401 and "API key" in caught.value.message
    with come(admission, "a") as ticket:
        assert ticket.is_seated


async def test_seats_are_shared_by_priority_and_nobody_starves() -> None:
    """Three principals that ask for more than there is, all the time: of 28 seats, high has 16, normal 8, low 4."""
    admission = desk(in_flight=28, queue=300)
    waiting = {}
    for name, priority in (("low", -1), ("normal", 0), ("high", 1)):
        tickets = [admission.apply(name, priority) for _ in range(40)]
        waiting[name] = tickets
    blocker = [come(admission, "other") for _ in range(28)]
    for tickets in waiting.values():
        for ticket in tickets:
            ticket.request(ONE)
    leave(*blocker)
    assert {name: sum(ticket.is_seated for ticket in tickets) for name, tickets in waiting.items()} == {
        "low": 4,
        "normal": 8,
        "high": 16,
    }


async def test_of_ones_own_requests_the_one_with_priority_is_first() -> None:
    admission = desk(in_flight=1, queue=10)
    working = come(admission, "a")
    tickets = {}
    for priority in (-1, 0, 1, 0):
        ticket = admission.apply("a", priority)
        ticket.request(ONE)
        tickets.setdefault(priority, []).append(ticket)
    order = []
    current = working
    for _ in range(4):
        leave(current)
        (current,) = [
            ticket for same in tickets.values() for ticket in same if ticket.is_seated and ticket not in order
        ]
        order.append(current)
    assert order == [*tickets[1], *tickets[0], *tickets[-1]]
