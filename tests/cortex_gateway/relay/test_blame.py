"""Which requests are refused because processes end under them."""

from __future__ import annotations

import pytest
from cortex_core.errors import ApiError
from cortex_gateway.fleet.transitions import has_died
from cortex_gateway.relay.blame import MAX_REMEMBERED, REMEMBERED_S, Blame
from hypothesis import given
from hypothesis import strategies as st


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def is_refused(blame: Blame, body: bytes, model: str = "m") -> bool:
    try:
        blame.check(model, len(body), lambda: body)
    except ApiError as error:
        assert error.code == "request_kills_engine" and error.status == 400 and error.retry_after is None
        return True
    return False


def test_H2_a_body_that_ended_two_processes_is_refused_for_a_while() -> None:
    clock = Clock()
    blame = Blame(clock)
    blame.remember("m", 3, b"abc")
    assert is_refused(blame, b"abc")
    assert not is_refused(blame, b"abd") and not is_refused(blame, b"abc", "other")
    clock.now = REMEMBERED_S - 1
    assert is_refused(blame, b"abc")
    clock.now = REMEMBERED_S
    assert not is_refused(blame, b"abc")


def test_H2_nothing_is_digested_but_where_a_body_of_that_length_is_remembered() -> None:
    blame = Blame(Clock())

    def never() -> bytes:
        raise AssertionError("digested")

    blame.check("m", 3, never)
    blame.remember("m", 3, b"abc")
    blame.check("m", 4, never)
    with pytest.raises(AssertionError):
        blame.check("m", 3, never)


@given(st.lists(st.tuples(st.integers(0, 40), st.floats(0, 300)), max_size=400))
def test_what_is_remembered_is_bounded_and_right(steps: list[tuple[int, float]]) -> None:
    clock = Clock()
    blame = Blame(clock)
    last: dict[int, float] = {}
    for number, wait in steps:
        clock.now += wait
        blame.remember("m", number % 7 + 1, b"%d" % number)
        last[number] = clock.now
        assert len(blame._until) <= MAX_REMEMBERED and sum(blame._lengths.values()) == len(blame._until)
    for number, at in last.items():
        try:
            blame.check("m", number % 7 + 1, lambda number=number: b"%d" % number)  # type: ignore[misc]
            assert clock.now >= at + REMEMBERED_S
        except ApiError:
            assert clock.now < at + REMEMBERED_S


def test_the_oldest_is_forgotten_first() -> None:
    blame = Blame(Clock())
    for number in range(MAX_REMEMBERED + 1):
        blame.remember("m", 1, b"%d" % number)
    blame.check("m", 1, lambda: b"0")
    with pytest.raises(ApiError):
        blame.check("m", 1, lambda: b"1")


@pytest.mark.parametrize(
    ("before", "after", "refuses", "died"),
    [
        (50, None, True, True),  # gone
        (50, None, False, False),  # silent: a cut, a stop, a host that is gone with all it had
        (50, 1, False, True),  # back already
        (50, 51, False, False),  # a connection that was closed, and no more
        (0, 0, False, False),
    ],
)
def test_a_process_has_died_where_nothing_listens_or_where_it_is_younger_than_it_was(
    before: int, after: int | None, refuses: bool, died: bool
) -> None:
    assert has_died(uptime_before_s=before, uptime_after_s=after, refuses_connections=refuses) is died
