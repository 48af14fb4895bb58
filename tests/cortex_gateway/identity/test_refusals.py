"""Errors for requests beyond what their key may: numbers that add up, and a wait where waiting helps."""

from __future__ import annotations

import pytest
from cortex_core.entitlements import Budget, Window
from cortex_gateway.identity.estimate import NANO_USD
from cortex_gateway.identity.refusals import (
    budget_spent,
    model_not_allowed,
    not_authenticated,
    rate_limited,
    store_out_of_reach,
    too_many_at_once,
)
from cortex_gateway.identity.store import Refused
from cortex_gateway.identity.windows import Shortfall

TOKENS = Budget(tokens=100, window=Window("rolling", 600))
MONEY = Budget(cost_usd=2.5)
BUDGETS = ((TOKENS, None, 100), (MONEY, None, 2_500_000_000))


def test_without_a_key_one_is_told_how_to_send_it_and_with_a_wrong_one_it_is_not_repeated() -> None:
    assert "x-api-key: KEY" in not_authenticated(was_given=False).message
    wrong = not_authenticated(was_given=True)
    assert (wrong.status, wrong.code, wrong.is_retryable) == (401, "invalid_api_key", False)


def test_a_model_that_a_key_may_not_use_is_named_with_the_key() -> None:
    error = model_not_allowed("ci", "org/name")
    assert (error.status, error.param) == (403, "model")
    assert "`ci`" in error.message and "`org/name`" in error.message


def test_too_many_at_once_says_how_many_are() -> None:
    error = too_many_at_once(6)
    assert error.status == 429 and error.extras == {"limit": 6, "unit": "concurrent_requests"}


@pytest.mark.parametrize(("wait_ms", "seconds"), [(0, 1), (1, 1), (1000, 1), (1001, 2), (59_999, 60), (None, 1)])
def test_a_wait_is_told_in_whole_seconds_and_never_too_early(wait_ms: int | None, seconds: int) -> None:
    error = rate_limited("tokens", Shortfall(100, 60, 30, 20, wait_ms))
    assert error.retry_after == seconds and f"try again in {seconds}s" in error.message
    assert error.extras == {"limit": 100, "used": 60, "reserved": 30, "requested": 20, "unit": "tokens"}


def test_a_window_that_is_spent_says_when_to_come_back() -> None:
    error = budget_spent(Refused(TOKENS.name, Shortfall(100, 60, 30, 20, 5_000)), BUDGETS)
    assert (error.code, error.retry_after, error.extras["budget"]) == ("rate_limit_exceeded", 5, TOKENS.name)
    assert "100 tokens in 600 s: 60 used, 30 reserved" in error.message


def test_a_balance_that_is_spent_is_not_worth_a_retry_and_is_told_in_dollars() -> None:
    cap, used = 5 * NANO_USD // 2, 2 * NANO_USD
    error = budget_spent(Refused(MONEY.name, Shortfall(cap, cap, 0, used, None)), BUDGETS)
    assert (error.code, error.retry_after, error.extras["unit"]) == ("insufficient_quota", None, "nano_usd")
    assert "$2.5 in all: $2.5 used" in error.message and "may need $2." in error.message
    assert "max_tokens" not in error.message, "no smaller request fits either"


def test_where_a_smaller_request_would_fit_it_says_so() -> None:
    error = budget_spent(Refused(MONEY.name, Shortfall(100, 60, 0, 50, None)), BUDGETS)
    assert "A smaller `max_tokens` may fit." in error.message
    in_flight = budget_spent(Refused(MONEY.name, Shortfall(100, 60, 30, 20, None)), BUDGETS)
    assert "max_tokens" not in in_flight.message, "it is the requests under way that are in the way"


def test_without_the_store_a_retry_is_advised_and_nobody_is_blamed() -> None:
    error = store_out_of_reach()
    assert error.status == 503 and error.is_retryable
