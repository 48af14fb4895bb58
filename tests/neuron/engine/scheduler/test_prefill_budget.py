"""How many prompt tokens a step has, and who gets them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from neuron.engine.kv_cache.page_pool import PagePool
from neuron.engine.kv_cache.prefix_cache import PrefixCache
from neuron.engine.scheduler.prefill_budget import (
    ALONE_S,
    DECODE_SHARE,
    SHORTEST_S,
    WAITED_FOR_S,
    PrefillBudget,
    shares,
)
from neuron.engine.scheduler.scheduler import Scheduler, StepPlan
from neuron.engine.scheduler.sequence import Sequence

from tests.neuron.engine.scheduler.harness import compute, sequence

PAGE = 4


@given(st.integers(1, 5000), st.lists(st.integers(1, 20_000), max_size=40))
def test_the_first_has_half_and_no_token_is_left_while_somebody_wants_it(budget: int, lengths: list[int]) -> None:
    given_ = shares(budget, lengths)
    assert all(0 <= tokens <= length for tokens, length in zip(given_, lengths, strict=True))
    assert sum(given_) == min(budget, sum(lengths))
    if lengths:
        assert given_[0] >= min(lengths[0], budget / 2)
    others = list(zip(lengths[1:], given_[1:], strict=True))
    served = [length for length, tokens in others if tokens]
    unserved = [length for length, tokens in others if not tokens]
    assert not served or not unserved or max(served) <= min(unserved), "the shortest come first"
    assert sum(0 < tokens < length for length, tokens in others) <= 1, "and are not cut, but for the last"


@pytest.mark.parametrize("per_token", [0.0001, 0.002, 0.05])
def test_a_step_keeps_its_time_while_others_wait(per_token: float) -> None:
    budget = PrefillBudget(max_tokens=2048, seconds_per_token=per_token)
    for num_decodes, num_prompts, bound_s in ((0, 1, ALONE_S), (0, 2, WAITED_FOR_S), (3, 1, WAITED_FOR_S)):
        tokens = budget.tokens(num_decodes, num_prompts)
        assert tokens == 2048 or bound_s / 2 < tokens * per_token <= bound_s or tokens == 16


def test_decodes_on_a_cpu_come_at_even_intervals() -> None:
    budget = PrefillBudget(max_tokens=2048, seconds_per_token=0.001, step_seconds=0.4, keeps_decodes_even=True)
    assert 0.5 < budget.tokens(32, 1) * 0.001 / (0.4 * DECODE_SHARE) <= 1
    for _ in range(20):
        budget.learn(0, 32, 0.001)
    assert budget.tokens(32, 1) * 0.001 <= SHORTEST_S
    for _ in range(20):
        budget.learn(0, 32, 10.0)
    assert budget.tokens(32, 1) * 0.001 <= WAITED_FOR_S
    assert budget.tokens(0, 1) == 2048


def test_many_prompts_beside_few_decodes_are_not_cut_into_small_pieces() -> None:
    """Sixteen requests that come at once: when the first one decodes, the others' prompts are still to be computed."""
    budget = PrefillBudget(max_tokens=2048, seconds_per_token=0.001, step_seconds=0.02, keeps_decodes_even=True)
    tokens = [budget.tokens(num_decodes, 16 - num_decodes) for num_decodes in range(16)]
    assert tokens[:13] == [448] * 13 and tokens[15] == 192, tokens
    assert tokens == sorted(tokens, reverse=True)


def test_the_budget_follows_the_speed_that_is_seen() -> None:
    budget = PrefillBudget(max_tokens=2048, seconds_per_token=0.01)
    assert budget.tokens(0, 2) == 48
    for _ in range(10):
        budget.learn(256, 0, 256 * 0.001)
    assert budget.tokens(0, 2) == 448
    for _ in range(10):
        budget.learn(256, 8, 256 * 0.004)  # contexts have grown
    assert budget.tokens(0, 2) == 112
    budget.learn(3, 0, 5.0)  # a chunk of three tokens says nothing of a token
    assert budget.tokens(0, 2) == 112


def test_what_memory_allows_comes_before_what_time_does() -> None:
    budget = PrefillBudget(max_tokens=2048)
    budget.max_tokens = 48
    assert budget.tokens(0, 1) == budget.most == 48


# ---------------------------------------------------------------------------------------------- with the scheduler


def scheduler_of(*, tokens: int, num_pages: int = 10_000, max_running: int = 8) -> Scheduler:
    pool = PagePool(num_pages)
    return Scheduler(
        pool,
        PrefixCache(pool, PAGE, root="", enabled=True),
        page_size=PAGE,
        max_step_tokens=max(tokens, 64),
        max_running=max_running,
        max_model_len=30_000,
        prefill_budget=PrefillBudget(max_tokens=tokens),
    )


def prompt(arrival: int, length: int) -> Sequence:
    return sequence(arrival, [(arrival * 7919 + index) % 9000 for index in range(length)])


def tokens_of(plan: StepPlan) -> dict[int, int]:
    return {chunk.sequence.arrival: chunk.num_tokens for chunk in plan.chunks}


def test_a_short_newcomer_has_its_first_token_in_the_next_step_beside_a_long_prompt() -> None:
    scheduler = scheduler_of(tokens=64)
    scheduler.add(prompt(0, 20_000))
    compute(scheduler, scheduler.schedule())
    for arrival in (1, 2):
        scheduler.add(prompt(arrival, 14))
    plan = scheduler.schedule()
    assert tokens_of(plan) == {0: 36, 1: 14, 2: 14}
    assert {chunk.sequence.arrival: chunk.num_sampled for chunk in plan.chunks} == {0: 0, 1: 1, 2: 1}


def test_short_ones_that_keep_coming_leave_a_long_prompt_half_of_every_step() -> None:
    scheduler = scheduler_of(tokens=64, max_running=200)
    long = prompt(0, 3_000)
    scheduler.add(long)
    arrival = num_steps = 0
    while long.num_unscheduled > 1:
        for _ in range(4):
            arrival += 1
            scheduler.add(prompt(arrival, 20))
        before, plan = long.num_computed, scheduler.schedule()
        assert tokens_of(plan)[0] >= min(32, 3_000 - before)
        compute(scheduler, plan)
        num_steps += 1
        for each in [chunk.sequence for chunk in plan.chunks if chunk.num_sampled and chunk.sequence.arrival]:
            scheduler.finish(each)
    assert 3_000 / 64 <= num_steps <= 3_000 / 32 + 1


def test_of_two_long_prompts_the_shorter_one_goes_along() -> None:
    scheduler = scheduler_of(tokens=64)
    for arrival, length in enumerate((10_000, 9_000, 1_000)):
        scheduler.add(prompt(arrival, length))
    assert tokens_of(scheduler.schedule()) == {0: 32, 1: 32}, "those that are admitted: one beside the first"


def test_a_cached_prompt_is_a_short_one() -> None:
    scheduler = scheduler_of(tokens=64)
    first = prompt(5, 400)
    scheduler.add(first)
    while first.num_unscheduled > 1:
        compute(scheduler, scheduler.schedule())
    scheduler.finish(first)
    for arrival in (6, 7):
        scheduler.add(prompt(arrival, 5_000))
    compute(scheduler, scheduler.schedule())
    again = sequence(8, [*first.tokens[:400], 1, 2, 3])
    scheduler.add(again)
    assert tokens_of(scheduler.schedule())[8] <= 8


def test_who_is_passed_keeps_its_claim_on_pages() -> None:
    """Two long prompts run, the third needs nearly all that is free: the short ones behind it get what it does not."""
    scheduler = scheduler_of(tokens=64, num_pages=1 + 1000, max_running=100)
    for arrival, length in enumerate((1200, 1200, 1560)):  # 300, 300 and 390 of 1000 pages
        scheduler.add(prompt(arrival, length))
    compute(scheduler, scheduler.schedule())
    for arrival in range(3, 40):
        scheduler.add(prompt(arrival, 8))
    for _ in range(400):
        plan = scheduler.schedule()
        compute(scheduler, plan)
        if 2 in tokens_of(plan):
            return
        for each in [chunk.sequence for chunk in plan.chunks if chunk.num_sampled and chunk.sequence.arrival < 2]:
            scheduler.finish(each)
    raise AssertionError("the third prompt was never begun")


def test_a_prompt_of_higher_priority_is_the_first_one() -> None:
    scheduler = scheduler_of(tokens=64)
    scheduler.add(prompt(0, 10_000))
    compute(scheduler, scheduler.schedule())
    scheduler.add(sequence(1, list(range(5_000, 0, -1)), priority=1))
    assert tokens_of(scheduler.schedule()) == {1: 32, 0: 32}


@given(priorities=st.lists(st.sampled_from([-1, 0, 1]), min_size=2, max_size=120))
def test_each_is_passed_by_a_bounded_number_of_later_ones(priorities: list[int]) -> None:
    """By 64 for each step of priority between them, and by none of its own or a lower one."""
    scheduler = scheduler_of(tokens=64, max_running=1)
    for arrival, priority in enumerate(priorities):
        scheduler.add(sequence(arrival, [arrival] * 5, priority=priority))
    order = []
    while (plan := scheduler.schedule()) is not None:
        (chunk,) = plan.chunks
        order.append(chunk.sequence.arrival)
        scheduler.finish(chunk.sequence)
    assert sorted(order) == list(range(len(priorities)))
    for place, arrival in enumerate(order):
        before = [other for other in order[:place] if other > arrival]
        for step in (1, 2):
            passing = [other for other in before if priorities[other] - priorities[arrival] == step]
            assert all(other - arrival < 64 * step + 1 for other in passing)
        assert all(priorities[other] > priorities[arrival] for other in before)
