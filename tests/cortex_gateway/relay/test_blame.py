"""Which requests are refused because processes end under them."""

from __future__ import annotations

import asyncio

import pytest
from cortex_core.errors import ApiError
from cortex_gateway.relay.blame import (
    LONGEST_TURN_S,
    LONGEST_WAIT_S,
    MAX_LIVES,
    MAX_REMEMBERED,
    MOST_DEATHS,
    REMEMBERED_S,
    SHORTEST_TURN_S,
    TURN_AGAIN,
    Blame,
    Body,
    Life,
    Trial,
)
from hypothesis import given
from hypothesis import strategies as st

FIRST, SECOND, THIRD = (Life("alpha", number) for number in range(3))


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def body(text: bytes, model: str = "m") -> Body:
    return Body(model, len(text), text)


def is_refused(blame: Blame, text: bytes, model: str = "m") -> bool:
    try:
        blame.check(body(text, model))
    except ApiError as error:
        assert error.code == "request_kills_engine" and error.status == 400 and error.retry_after is None
        return True
    return False


def died(blame: Blame, text: bytes, life: Life, lived_s: float = 0.1) -> bool:
    """Sent alone, as a suspect where it is one, and the process ends."""
    assert not blame.is_taken(body(text), life.node)
    return blame.died(body(text), blame.begin(body(text), life), life, lived_s)


def test_H2_a_body_that_ended_two_processes_is_refused_for_a_while() -> None:
    clock = Clock()
    blame = Blame(clock)
    assert not died(blame, b"abc", FIRST)
    assert not is_refused(blame, b"abc")
    assert died(blame, b"abc", SECOND)
    assert is_refused(blame, b"abc")
    assert not is_refused(blame, b"abd") and not is_refused(blame, b"abc", "other")
    clock.now = REMEMBERED_S - 1
    assert is_refused(blame, b"abc")
    clock.now = REMEMBERED_S
    assert not is_refused(blame, b"abc")


def test_H2_two_tries_under_one_end_count_once() -> None:
    """A client's requests at once, or one and its twin."""
    blame = Blame(Clock())
    for _ in range(10):
        assert not died(blame, b"abc", FIRST)
    assert not is_refused(blame, b"abc")


def test_H2_an_answer_clears_a_suspect_and_an_end_long_ago_is_forgotten() -> None:
    clock = Clock()
    blame = Blame(clock)
    died(blame, b"abc", FIRST)
    trial = blame.begin(body(b"abc"), SECOND)
    assert trial is not None
    trial.answered()
    assert blame.begin(body(b"abc"), SECOND) is None, "nobody suspects it any more"
    died(blame, b"abc", FIRST)
    clock.now = REMEMBERED_S
    assert not died(blame, b"abc", SECOND)


def test_H2_what_a_neuron_has_found_out_is_remembered_too() -> None:
    blame = Blame(Clock())
    blame.remember(body(b"abc"))
    assert is_refused(blame, b"abc")


def test_H2_a_suspect_has_a_node_to_itself_for_twice_as_long_as_the_first_process_lived() -> None:
    blame = Blame(Clock())
    died(blame, b"abc", FIRST, lived_s=1.5)
    died(blame, b"xyz", FIRST, lived_s=0.01)
    died(blame, b"old", FIRST, lived_s=LONGEST_TURN_S + 1)
    trial = blame.begin(body(b"abc"), SECOND)
    assert trial is not None and trial.turn_s == 3.0
    assert blame.is_taken(body(b"xyz"), "alpha") and not blame.is_taken(body(b"xyz"), "beta")
    assert not blame.is_taken(body(b"new"), "alpha"), "whom nobody suspects waits for nobody"
    assert not blame.is_taken(body(b"old"), "alpha"), "nor does what was at work for long"
    trial.turn_is_over()
    assert not blame.is_taken(body(b"xyz"), "alpha")
    joined = blame.begin(body(b"xyz"), SECOND)
    assert joined is not None and joined.turn_s == SHORTEST_TURN_S
    # Both were in the path of this end: neither is blamed, and each is alone for long the next time.
    assert not blame.died(body(b"abc"), trial, SECOND, 3.2) and not blame.died(body(b"xyz"), joined, SECOND, 0.1)
    alone = blame.begin(body(b"abc"), THIRD)
    assert alone is not None and alone.turn_s == TURN_AGAIN * LONGEST_TURN_S
    assert blame.died(body(b"abc"), alone, THIRD, 1.0)
    assert not is_refused(blame, b"xyz")


def test_H5_whoever_has_waited_for_long_after_one_end_shares_the_node_and_after_two_is_alone() -> None:
    """Most ends are nobody's doing: twenty that were there would wait for one another for a minute and more."""
    blame = Blame(Clock())
    texts = [b"%d" % number for number in range(20)]
    for text in texts:
        died(blame, text, FIRST, lived_s=2.0)
    holder = blame.begin(body(texts[0]), SECOND)
    assert holder is not None and holder.turn_s == 4.0
    assert all(blame.is_taken(body(text), "alpha", LONGEST_WAIT_S - 0.1) for text in texts[1:])
    assert not any(blame.is_taken(body(text), "alpha", LONGEST_WAIT_S) for text in texts[1:])
    joined = [(text, blame.begin(body(text), SECOND)) for text in texts[1:]]
    assert all(trial is not None and trial.turn_s is None for _, trial in joined), "nobody's turn is taken away"
    # If that ends the second process, nobody is blamed, and nobody's patience is asked.
    for text, trial in [(texts[0], holder), *joined]:
        assert not blame.died(body(text), trial, SECOND, 1.0)
    alone = blame.begin(body(texts[7]), THIRD)
    assert all(blame.is_taken(body(text), "alpha", 60.0) for text in texts if text != texts[7])
    assert blame.died(body(texts[7]), alone, THIRD, 2.0)
    assert sum(is_refused(blame, text) for text in texts) == 1


def test_H2_two_engines_that_ended_under_a_living_process_blame_the_body_too() -> None:
    blame = Blame(Clock())
    first, again = (FIRST._replace(engine=name) for name in ("e1", "e2"))
    for _ in range(3):
        assert not died(blame, b"abc", first), "many tries in one engine saw one end"
    trial = blame.begin(body(b"abc"), FIRST)
    assert blame.died(body(b"abc"), trial, again, 0.1)
    assert is_refused(blame, b"abc")


@pytest.mark.parametrize("is_first", [True, False])
def test_H2_suspects_in_one_engine_are_none_to_blame_and_leave_its_process_clean(is_first: bool) -> None:
    blame = Blame(Clock())
    for text in (b"abc", b"xyz"):
        died(blame, text, FIRST, lived_s=LONGEST_TURN_S + 1)
    trials = [(body(text), blame.begin(body(text), SECOND)) for text in (b"abc", b"xyz")]
    for each, trial in trials if is_first else trials[::-1]:
        assert not blame.died(each, trial, SECOND._replace(engine="e"), 0.1)
    assert died(blame, b"abc", SECOND._replace(engine="f")), "the process goes on: this time it was alone there"
    assert not is_refused(blame, b"xyz")


def test_H2_who_never_was_alone_is_refused_after_four() -> None:
    blame = Blame(Clock())
    for number in range(MOST_DEATHS):
        life = Life("alpha", number)
        trials = {text: blame.begin(body(text), life) for text in (b"abc", b"xyz")}
        verdicts = [blame.died(body(text), trial, life, LONGEST_TURN_S + 1) for text, trial in trials.items()]
        assert verdicts == [number == MOST_DEATHS - 1] * 2


@pytest.mark.parametrize("end", ["answered", "leave", "turn_is_over", "died"])
async def test_H2_who_waits_for_a_turn_is_woken_however_it_ends(end: str) -> None:
    blame = Blame(Clock())
    for text in (b"abc", b"xyz"):
        died(blame, text, FIRST)
    trial = blame.begin(body(b"abc"), SECOND)
    assert trial is not None and blame.is_taken(body(b"xyz"), "alpha")
    waiting = asyncio.ensure_future(blame.freed(0.0))
    await asyncio.sleep(0)
    if end == "died":
        blame.died(body(b"abc"), trial, SECOND, 0.1)
    else:
        getattr(trial, end)()
    await waiting
    assert not blame.is_taken(body(b"xyz"), "alpha")


def test_H2_no_digest_is_wanted_but_where_a_body_of_that_length_is_remembered() -> None:
    blame = Blame(Clock())
    assert not blame.needs_digest(Body("m", 3))
    died(blame, b"abc", FIRST)
    assert blame.needs_digest(Body("m", 3)) and not blame.needs_digest(Body("m", 4))
    assert not blame.needs_digest(body(b"xyz")), "it is known"


@given(st.lists(st.tuples(st.integers(0, 40), st.floats(0, 300)), max_size=400))
def test_what_is_remembered_is_bounded_and_right(steps: list[tuple[int, float]]) -> None:
    clock = Clock()
    blame = Blame(clock)
    last: dict[int, float] = {}
    for number, wait in steps:
        clock.now += wait
        blame.remember(Body("m", number % 7, b"%d" % number))
        last[number] = clock.now
        assert len(blame.records) <= MAX_REMEMBERED and sum(blame._lengths.values()) == len(blame.records)
    for number, at in last.items():
        try:
            blame.check(Body("m", number % 7, b"%d" % number))
            assert clock.now >= at + REMEMBERED_S
        except ApiError:
            assert clock.now < at + REMEMBERED_S


@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 2), st.sampled_from(["send", "send", "answer", "leave", "end"])),
        max_size=80,
    ),
    st.integers(0, 5),
)
def test_H2_none_is_blamed_for_an_end_that_another_suspect_saw_too(
    steps: list[tuple[int, int, str]], killer: int
) -> None:
    """Processes end under `killer` alone; others come and go in any order. Short of four ends, no innocent is blamed
    but for two ends at which it was the only suspect, and the killer never ends more than four."""
    blame = Blame(Clock())
    generations = [0, 0, 0]
    at_work: dict[tuple[int, int], Trial | None] = {}
    ends: dict[int, set[Life]] = {number: set() for number in range(6)}
    for number, node, what in steps:
        place, text = (number, node), b"%d" % number
        if what == "send":
            if place not in at_work and not is_refused(blame, text) and not blame.is_taken(body(text), str(node)):
                at_work[place] = blame.begin(body(text), Life(str(node), generations[node]))
        elif place not in at_work:
            continue
        elif what == "end" and number == killer:
            life = Life(str(node), generations[node])
            generations[node] += 1
            here = sorted(each for each in at_work if each[1] == node)
            suspects = {other for other, on in here if at_work[(other, on)] is not None}
            for other, on in here:
                ends[other].add(life)
                trial = at_work.pop((other, on))
                if blame.died(body(b"%d" % other), trial, life, 0.1) and other != killer:
                    assert len(ends[other]) >= MOST_DEATHS or suspects <= {other}
            assert len(ends[killer]) <= MOST_DEATHS + 2  # those that were on their way already
        elif number != killer:
            trial = at_work.pop(place)
            if what == "answer":
                ends[number].clear()
                if trial is not None:
                    trial.answered()
            elif trial is not None:
                trial.leave()
    assert len(blame._paths) <= MAX_LIVES


def test_the_oldest_is_forgotten_first() -> None:
    blame = Blame(Clock())
    for number in range(MAX_REMEMBERED + 1):
        blame.remember(Body("m", 1, b"%d" % number))
    blame.check(Body("m", 1, b"0"))
    with pytest.raises(ApiError):
        blame.check(Body("m", 1, b"1"))
