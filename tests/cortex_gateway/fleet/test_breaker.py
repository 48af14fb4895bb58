"""The breaker: pure transitions, and what keeps their states."""

from __future__ import annotations

import pytest
from cortex_core.gateway_config import BreakerSection
from cortex_gateway.fleet.breaker import CLOSED, Breaker, Breakers, abandoned, answering, begun, failed, succeeded
from hypothesis import given
from hypothesis import strategies as st

SETTINGS = BreakerSection(failures=3, backoff_s=2.0, max_backoff_s=10.0)


def after_failures(count: int, now: float = 0.0) -> Breaker:
    breaker = CLOSED
    for _ in range(count):
        breaker = failed(breaker, now, SETTINGS)
    return breaker


def test_it_opens_after_so_many_failures_in_a_row_and_admits_one_try_when_the_back_off_is_over() -> None:
    assert after_failures(2).admits(0.0)
    opened = after_failures(3, now=5.0)
    assert (opened.state, opened.until) == ("open", 7.0)
    assert not opened.admits(6.9) and opened.admits(7.0)
    assert not begun(opened).admits(7.0)


def test_a_success_in_between_starts_the_count_anew() -> None:
    assert failed(failed(succeeded(after_failures(2)), 0.0, SETTINGS), 0.0, SETTINGS).admits(0.0)


def test_each_failed_try_doubles_the_back_off_up_to_the_limit() -> None:
    breaker, backoffs = after_failures(3), []
    for _ in range(4):
        breaker = failed(begun(breaker), 100.0, SETTINGS)
        backoffs.append(breaker.until - 100.0)
    assert backoffs == [4.0, 8.0, 10.0, 10.0]


def test_an_answer_that_begins_lets_others_in_and_one_that_breaks_off_opens_it_again() -> None:
    begins = answering(begun(after_failures(3)), SETTINGS)
    assert begins.admits(0.0)
    again = failed(begins, 10.0, SETTINGS)
    assert (again.state, again.until) == ("open", 14.0)


def test_a_client_that_hangs_up_is_neither_success_nor_failure() -> None:
    opened = after_failures(3)
    given_back = abandoned(begun(opened), 3.0)
    assert given_back.admits(3.0)
    assert (given_back.failures, given_back.openings) == (opened.failures, opened.openings)
    assert abandoned(after_failures(2), 0.0) == after_failures(2)


def test_requests_sent_before_it_opened_do_not_prolong_it() -> None:
    opened = after_failures(3, now=5.0)
    assert failed(opened, 6.0, SETTINGS).until == opened.until


def test_zero_failures_means_never() -> None:
    breaker = CLOSED
    for _ in range(1000):
        breaker = failed(breaker, 0.0, BreakerSection(failures=0))
    assert breaker.state == "closed"


@given(st.lists(st.sampled_from(["request", "fail", "answer", "succeed", "abandon"]), max_size=60))
def test_whatever_happens_it_never_stays_shut_and_never_admits_two_tries(events: list[str]) -> None:
    breakers, now, tries = Breakers(SETTINGS), 0.0, 0
    for event in events:
        now += 1.0
        match event:
            case "request" if breakers.get("n", "m").admits(now):
                tries += breakers.begun("n", "m")
            case "fail":
                breakers.failed("n", "m", now)
                tries = 0
            case "answer":
                breakers.answering("n", "m")
            case "succeed":
                breakers.succeeded("n", "m")
                tries = 0
            case "abandon" if tries:
                breakers.abandoned("n", "m", now)
                tries = 0
        breaker = breakers.get("n", "m")
        assert tries <= 1
        assert breaker.state != "open" or breaker.until <= now + SETTINGS.max_backoff_s
        assert breaker.state != "half_open" or tries == 1


def test_only_what_is_not_as_it_began_is_kept() -> None:
    changes: list[str] = []
    breakers = Breakers(SETTINGS, lambda node, model, breaker: changes.append(breaker.state))
    for _ in range(3):
        breakers.failed("n", "m", 0.0)
    assert len(dict(breakers.items())) == 1
    breakers.succeeded("n", "m")
    assert not dict(breakers.items())
    breakers.failed("n", "gone", 0.0)
    breakers.forget_absent("n", frozenset(("m",)))
    assert not dict(breakers.items())
    assert changes == ["open", "closed"]


@pytest.mark.parametrize("state", ["closed", "half_open"])
def test_beginning_a_request_changes_only_an_open_breaker(state: str) -> None:
    breaker = Breaker(state=state, failures=1)  # type: ignore[arg-type]
    assert begun(breaker) == breaker
