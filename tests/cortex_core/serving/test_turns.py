"""Whose job is next."""

from __future__ import annotations

from cortex_core.serving.turns import Turns
from hypothesis import given
from hypothesis import strategies as st

Jobs = st.lists(st.tuples(st.sampled_from(["a", "b", "c", None]), st.booleans()), max_size=40)


@given(Jobs)
def test_every_job_gets_its_turn_once_and_each_principals_in_order(jobs: list[tuple[str | None, bool]]) -> None:
    turns: Turns[int] = Turns()
    for number, (principal, is_long) in enumerate(jobs):
        turns.put(number, principal, is_long=is_long)
    assert len(turns) == len(jobs)
    order = [turns.next(takes_long=True) for _ in jobs]
    assert sorted(order) == list(range(len(jobs)))  # type: ignore[type-var]
    assert turns.next(takes_long=True) is None and len(turns) == 0
    for kind in set(jobs):
        mine = [number for number in order if jobs[number] == kind]  # type: ignore[index]
        assert mine == sorted(mine)  # type: ignore[type-var]


def test_H9_a_thousand_jobs_of_one_cost_another_one_turn() -> None:
    turns: Turns[str] = Turns()
    for number in range(1_000):
        turns.put(f"flood {number}", "flood", is_long=False)
    turns.next(takes_long=True)
    turns.put("mine", "me", is_long=False)
    assert [turns.next(takes_long=True) for _ in range(2)].count("mine") == 1


def test_long_jobs_wait_where_they_may_not_be_taken_and_short_ones_pass_them() -> None:
    turns: Turns[str] = Turns()
    turns.put("long", "a", is_long=True)
    assert turns.next(takes_long=False) is None
    turns.put("short", "a", is_long=False)
    assert turns.next(takes_long=False) == "short"
    assert turns.next(takes_long=True) == "long"


@given(Jobs, st.integers(0, 39))
def test_a_job_that_is_taken_back_is_never_handed_out(jobs: list[tuple[str | None, bool]], index: int) -> None:
    turns: Turns[int] = Turns()
    for number, (principal, is_long) in enumerate(jobs):
        turns.put(number, principal, is_long=is_long)
    if index < len(jobs):
        principal, is_long = jobs[index]
        assert turns.remove(index, principal, is_long=is_long)
        assert not turns.remove(index, principal, is_long=is_long)
    left = [turns.next(takes_long=True) for _ in range(len(turns))]
    assert sorted(left) == [number for number in range(len(jobs)) if number != index]  # type: ignore[type-var]


def test_whoever_waits_when_it_ends_is_handed_back() -> None:
    turns: Turns[int] = Turns()
    turns.put(1, "a", is_long=True)
    turns.put(2, "b", is_long=False)
    assert sorted(turns.drain()) == [1, 2] and len(turns) == 0 and turns.next(takes_long=True) is None
