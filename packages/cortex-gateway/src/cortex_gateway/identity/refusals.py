"""Errors for requests beyond what their key may. No message holds more of a key than its id."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from cortex_core.entitlements import Budget
from cortex_core.errors import ApiError

from cortex_gateway.identity.estimate import NANO_USD
from cortex_gateway.identity.store import Refused
from cortex_gateway.identity.windows import Shortfall

Reason = Literal["model", "concurrency", "requests", "tokens", "budget", "store"]

STORE_RETRY_S = 5
CONCURRENCY_RETRY_S = 1


def not_authenticated(*, was_given: bool) -> ApiError:
    message = (
        "The API key is not valid here."
        if was_given
        else "An API key is needed: send it as `Authorization: Bearer KEY` or `x-api-key: KEY`."
    )
    return ApiError("authentication", message, code="invalid_api_key")


def model_not_allowed(key_id: str, model: str) -> ApiError:
    return ApiError(
        "permission", f"The key `{key_id}` may not use the model `{model}`.", code="model_not_allowed", param="model"
    )


def too_many_at_once(limit: int) -> ApiError:
    return ApiError(
        "rate_limit",
        f"{limit} requests of this key are running, and no more may at once. Please try again in "
        f"{CONCURRENCY_RETRY_S}s.",
        code="rate_limit_exceeded",
        retry_after=CONCURRENCY_RETRY_S,
        extras={"limit": limit, "unit": "concurrent_requests"},
    )


def rate_limited(unit: Literal["requests", "tokens"], found: Shortfall) -> ApiError:
    """`wait_ms` is always known: a minute passes, and no reservation is larger than its limit."""
    seconds = _seconds(found.wait_ms or 0)
    return ApiError(
        "rate_limit",
        f"Rate limit reached: {found.cap} {unit} per minute, {found.used} used, {found.reserved} reserved, "
        f"{found.amount} requested. Please try again in {seconds}s.",
        code="rate_limit_exceeded",
        retry_after=seconds,
        extras=_numbers(found, unit),
    )


def budget_spent(refused: Refused, budgets: Iterable[tuple[Budget, Any, int]]) -> ApiError:
    """With `Retry-After` where time helps; else `insufficient_quota`, which clients do not repeat."""
    found = refused.shortfall
    budget = next(budget for budget, _, _ in budgets if budget.name == refused.budget)
    is_cost = budget.tokens is None
    show = _usd if is_cost else str
    unit = "" if is_cost else " tokens"
    window = budget.window
    span = {"balance": "in all", "fixed": f"each {window.seconds} s", "rolling": f"in {window.seconds} s"}[window.kind]
    message = (
        f"The budget of this key is {show(found.cap)}{unit} {span}: {show(found.used)} used, "
        f"{show(found.reserved)} reserved by requests under way, and this one may need {show(found.amount)}."
    )
    extras = {**_numbers(found, "nano_usd" if is_cost else "tokens"), "budget": refused.budget}
    if found.wait_ms is None:
        if found.amount > found.cap - found.used and found.used < found.cap:
            message += " A smaller `max_tokens` may fit."
        return ApiError("rate_limit", message, code="insufficient_quota", extras=extras)
    seconds = _seconds(found.wait_ms)
    return ApiError(
        "rate_limit",
        f"{message} Please try again in {seconds}s.",
        code="rate_limit_exceeded",
        retry_after=seconds,
        extras=extras,
    )


def store_out_of_reach() -> ApiError:
    return ApiError(
        "overloaded",
        "Keys and budgets cannot be checked at the moment; ask again.",
        code="service_unavailable",
        retry_after=STORE_RETRY_S,
    )


def _numbers(found: Shortfall, unit: str) -> dict[str, Any]:
    return {
        "limit": found.cap,
        "used": found.used,
        "reserved": found.reserved,
        "requested": found.amount,
        "unit": unit,
    }


def _seconds(wait_ms: int) -> int:
    return max(1, -(-wait_ms // 1000))


def _usd(nano: int) -> str:
    return f"${nano / NANO_USD:.6f}".rstrip("0").rstrip(".")
