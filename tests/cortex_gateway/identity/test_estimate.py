"""What a request may use: the bound holds whatever the client writes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cortex_core.entitlements import Budget
from cortex_core.fleet import ContextLimit, ModelCost
from cortex_gateway.identity.estimate import (
    DEFAULT_OUTPUT_TOKENS,
    NOTHING,
    TEMPLATE_TOKENS,
    MeteredTokens,
    cap_of,
    estimate,
    reserved_amount,
    unmetered_usage,
    used_amount,
)
from hypothesis import given
from hypothesis import strategies as st


def body(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": "x" * 400}], **fields}).encode()


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens", "max_output_tokens"])
def test_N24_the_clients_limit_bounds_the_answer_in_every_dialect(field: str) -> None:
    content = body(**{field: 7})
    expected = estimate(content, None)
    assert expected.bound == MeteredTokens(prompt=len(content) + TEMPLATE_TOKENS, completion=7)
    assert expected.typical == MeteredTokens(prompt=len(content) // 4 + 1, completion=7)


def test_several_answers_are_bounded_together() -> None:
    assert estimate(body(max_tokens=7, n=3), None).bound.completion == 21
    assert estimate(body(max_tokens=7, best_of=4, n=2), None).bound.completion == 28
    assert estimate(body(max_tokens=7, prompt=["a", "b"]), None).bound.completion == 14
    assert estimate(body(max_tokens=7, prompt=[[1], [2], [3]]), None).bound.completion == 21
    assert estimate(body(max_tokens=7, prompt=[1, 2, 3]), None).bound.completion == 7
    assert estimate(body(max_tokens=7, prompt="[1]"), None).bound.completion == 7


def test_prompt_and_answer_share_the_window() -> None:
    """Claude Code asks for 128000 tokens of every model."""
    expected = estimate(body(max_tokens=128_000), ContextLimit(context=2048))
    assert expected.bound_total == 2048
    assert expected.typical.completion == 2048
    without = estimate(body(), ContextLimit(context=2048, output=512))
    assert (without.bound_total, without.typical.completion) == (2048, 512)
    assert estimate(body(), None).typical.completion == DEFAULT_OUTPUT_TOKENS


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"[" * 200_000, b'{"prompt": [1, }'])
def test_what_is_no_request_costs_nothing(content: bytes) -> None:
    assert estimate(content, None) == NOTHING


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(),
    st.lists(st.integers()),
)


@given(ODD, ODD, ODD, ODD, st.one_of(st.none(), st.builds(ContextLimit, context=st.integers(1, 2**20))))
def test_odd_values_are_left_for_the_neuron_to_refuse(
    first: Any, second: Any, n: Any, prompt: Any, limit: ContextLimit | None
) -> None:
    content = body(max_tokens=first, max_completion_tokens=second, n=n, prompt=prompt)
    expected = estimate(content, limit)
    assert 0 < expected.bound_total <= 2**62
    assert expected.bound_total <= expected.bound.prompt + expected.bound.completion


USES = st.builds(
    MeteredTokens, prompt=st.integers(0, 4096), completion=st.integers(0, 4096), cached=st.integers(0, 4096)
)
PRICES = st.floats(0, 100, allow_nan=False)
COSTS = st.builds(ModelCost, input=PRICES, output=PRICES, cache_read=st.one_of(st.none(), PRICES))


@given(USES, COSTS, st.integers(1, 8192), st.integers(1, 4096), st.integers(0, 2000))
def test_no_use_within_the_model_costs_more_than_was_reserved(
    usage: MeteredTokens, cost: ModelCost, context: int, max_tokens: int, size: int
) -> None:
    content = body(max_tokens=max_tokens, user="u" * size)
    expected = estimate(content, ContextLimit(context=context))
    possible = (
        usage.prompt <= len(content)
        and usage.completion <= max_tokens
        and usage.total <= context
        and usage.cached <= usage.prompt
    )
    if not possible:
        completion = min(usage.completion, max_tokens, context)
        prompt = min(usage.prompt, len(content), context - completion)
        usage = MeteredTokens(prompt, completion, min(usage.cached, prompt))
    for budget in (Budget(tokens=1), Budget(cost_usd=1.0)):
        assert used_amount(budget, usage, cost) <= reserved_amount(budget, expected, cost)


def test_money_is_counted_in_billionths_of_a_dollar() -> None:
    budget = Budget(cost_usd=2.5)
    cost = ModelCost(input=3.0, output=15.0, cache_read=0.3)
    assert cap_of(budget) == 2_500_000_000
    assert used_amount(budget, MeteredTokens(1_000_000, 1_000_000, 0), cost) == 18_000_000_000
    assert used_amount(budget, MeteredTokens(1_000_000, 0, 400_000), cost) == 1_920_000_000
    assert used_amount(budget, MeteredTokens(1, 0, 0), ModelCost(input=0.0001, output=0.0)) == 1, "rounded up"
    assert used_amount(budget, MeteredTokens(5, 5, 0), None) == 0, "a model without a price is free"


def test_who_hangs_up_pays_for_what_time_allows_or_events_show() -> None:
    expected = estimate(body(max_tokens=1000), None)
    assert unmetered_usage(expected, num_events=12, seconds=99).completion == 12
    assert unmetered_usage(expected, num_events=None, seconds=2.0).completion == 400
    assert unmetered_usage(expected, num_events=None, seconds=1e6).completion == 1000
    assert unmetered_usage(expected, num_events=0, seconds=1).prompt == expected.typical.prompt
