from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from neuron.daemon.admission.capacity import KVCapacity, KVNeed, OutputEstimate

CACHE = KVCapacity(num_pages=100, page_size=16, bytes_per_token=2**16)


@pytest.mark.parametrize(
    ("prompts", "num_choices", "expected_output", "need"),
    [
        ([(15, 1)], 1, 1000, KVNeed(1, 1, 1)),
        ([(16, 1)], 1, 1000, KVNeed(2, 2, 1)),
        ([(100, 500)], 1, 60, KVNeed(7, 10, 60)),  # as far as is expected, not as far as is allowed
        ([(100, 20)], 1, 60, KVNeed(7, 8, 20)),
        ([(100, 60)], 3, 60, KVNeed(7, 10 + 2 * 5, 180)),  # a second choice shares the prompt
        ([(100, 20), (300, 20)], 1, 60, KVNeed(19, 8 + 20, 40, 2)),
        ([(15, 0)], 1, 60, KVNeed(1, 1, 1)),  # no output asked for: one token is computed all the same
    ],
)
def test_what_a_request_needs(
    prompts: list[tuple[int, int]], num_choices: int, expected_output: int, need: KVNeed
) -> None:
    assert CACHE.need(prompts, num_choices=num_choices, expected_output=expected_output) == need


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    assert CACHE.refusal(CACHE.need([(1599, 1)], num_choices=1, expected_output=1)) is None
    refusal = CACHE.refusal(CACHE.need([(1600, 1)], num_choices=1, expected_output=1))
    assert refusal is not None and refusal.status == 413 and not refusal.is_retryable
    assert refusal.extras == {"required_mb": 101, "budget_mb": 100}


def test_answers_teach_how_long_answers_are() -> None:
    estimate = OutputEstimate(ceiling=8192)
    assert estimate.num_tokens == 1024
    for _ in range(100):
        estimate.observe(20)
    assert 20 <= estimate.num_tokens <= 24
    for _ in range(100):
        estimate.observe(6000)
    assert 6000 <= estimate.num_tokens <= 8192


@given(st.lists(st.integers(0, 10**6)), st.integers(1, 8192))
def test_the_estimate_stays_within_its_bounds(lengths: list[int], ceiling: int) -> None:
    estimate = OutputEstimate(ceiling=ceiling)
    for length in lengths:
        estimate.observe(length)
        assert 1 <= estimate.num_tokens <= ceiling
