"""Windows: never more than the cap in any span of the promised length, whatever the order of events."""

from __future__ import annotations

from cortex_core.entitlements import Window
from cortex_gateway.identity.windows import Meter, Slots, shortfall
from hypothesis import given
from hypothesis import strategies as st

KINDS = st.sampled_from(["balance", "fixed", "rolling"])
WINDOWS = st.builds(Window, kind=KINDS, seconds=st.integers(1, 200_000))
MINUTE = Window(kind="rolling", seconds=60)


@given(WINDOWS, st.integers(0, 2**42), st.integers(0, 2**42))
def test_use_is_counted_for_the_length_of_the_window_and_hardly_longer(window: Window, then: int, later: int) -> None:
    slots = Slots.of(window)
    slot = slots.at(then)
    is_counted = slot >= slots.oldest(then + later)
    if window.kind == "balance":
        assert is_counted
    elif window.kind == "fixed":
        assert is_counted == (then // (window.seconds * 1000) == (then + later) // (window.seconds * 1000))
    elif later < window.seconds * 1000:
        assert is_counted
    elif (
        later >= window.seconds * 1000 + 2 * slots.slot_ms + 60
    ):  # a rounded-up slot is at most 60 × 1 ms longer in all
        assert not is_counted


@given(WINDOWS.filter(lambda window: window.kind != "balance"), st.integers(0, 2**42))
def test_a_slot_leaves_at_the_moment_it_says(window: Window, then: int) -> None:
    slots = Slots.of(window)
    slot = slots.at(then)
    leaves = slots.leaves_at_ms(slot)
    assert leaves > then
    assert slots.oldest(leaves - 1) <= slot < slots.oldest(leaves)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["reserve", "settle", "wait"]),
        st.integers(0, 40),  # amount, or which reservation
        st.integers(0, 40_000),  # milliseconds
    ),
    max_size=60,
)


@given(st.integers(1, 60), STEPS, st.sampled_from([MINUTE, Window(kind="fixed", seconds=60), Window()]))
def test_whatever_happens_no_window_holds_more_than_the_cap(
    cap: int, steps: list[tuple[str, int, int]], window: Window
) -> None:
    """Against a plain list of what was used when. Real use is never more than what was reserved for it."""
    meter, now_ms = Meter(cap, window), 1_000_000_000_000
    held: list[int] = []
    used: list[tuple[int, int]] = []
    for what, number, milliseconds in steps:
        if what == "wait":
            now_ms += milliseconds
        elif what == "reserve":
            if meter.refuses(number, now_ms) is None:
                meter.reserve(number)
                held.append(number)
        elif held:
            reserved = held.pop(number % len(held))
            amount = min(reserved, number)
            meter.settle(reserved, amount, now_ms)
            used.append((now_ms, amount))
        assert meter.reserved == sum(held)
        if window.kind == "rolling":
            inside = [amount for when, amount in used if when > now_ms - 60_000]
        elif window.kind == "fixed":
            inside = [amount for when, amount in used if when // 60_000 == now_ms // 60_000]
        else:
            inside = [amount for _, amount in used]
        assert sum(inside) <= meter.used(now_ms)
        assert sum(inside) + sum(held) <= cap
    for reserved in held:
        meter.settle(reserved, 0, now_ms)
    assert meter.reserved == 0
    if window.kind != "balance":
        assert meter.remaining(now_ms + meter.reset_ms(now_ms)) == cap


@given(
    st.integers(1, 100),
    st.lists(st.tuples(st.integers(0, 120_000), st.integers(0, 50)), max_size=20),
    st.integers(0, 60),
    st.integers(0, 100),
    WINDOWS,
)
def test_after_the_wait_that_is_advised_it_fits(
    cap: int, bookings: list[tuple[int, int]], reserved: int, amount: int, window: Window
) -> None:
    now_ms = 1_700_000_000_000
    slots = Slots.of(window)
    booked = [(slots.at(now_ms - ago), used) for ago, used in bookings]
    found = shortfall(slots, cap, booked, reserved, amount, now_ms)
    if found is None:
        return
    if found.wait_ms is None:
        # Never, by waiting: too large as such, or what is used is never forgotten.
        assert amount > cap or (window.kind == "balance" and found.used + amount > cap)
        return
    # What is reserved may settle at nothing; that is all that the advice takes for granted.
    later = now_ms + found.wait_ms
    assert found.wait_ms > 0
    assert shortfall(slots, cap, booked, 0, amount, later) is None


def test_a_clock_that_is_set_back_loses_no_use() -> None:
    meter = Meter(10, MINUTE)
    meter.settle(0, 4, 1_000_000)
    meter.settle(0, 5, 900_000)
    assert meter.used(900_000) == 9
    assert meter.refuses(2, 1_000_000) is not None
    assert meter.used(1_000_000 + 61_000) == 0
