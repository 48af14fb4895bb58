"""The books of scheduler, page pool and prefix cache, driven by random events without any model."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from neuron.engine.scheduler.sequence import Status

from tests.neuron.engine.scheduler.harness import Books, build, compute, sequence

Books.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
test_books = Books.TestCase


def test_decodes_come_first_and_prefill_fills_the_rest():
    scheduler, _ = build(num_pages=65, max_step_tokens=10)
    scheduler.add(sequence(0, [1, 2, 3]))
    compute(scheduler, scheduler.schedule())
    scheduler.add(sequence(1, list(range(20))))
    plan = scheduler.schedule()
    assert [(chunk.sequence.arrival, chunk.start, chunk.num_tokens, chunk.num_sampled) for chunk in plan.chunks] == [
        (0, 3, 1, 1),
        (1, 0, 9, 0),
    ]
    compute(scheduler, plan)
    compute(scheduler, scheduler.schedule())
    plan = scheduler.schedule()
    assert [(chunk.sequence.arrival, chunk.start, chunk.num_tokens, chunk.num_sampled) for chunk in plan.chunks] == [
        (0, 5, 1, 1),
        (1, 18, 2, 1),
    ]


def test_prefill_can_be_given_less_than_the_whole_budget():
    scheduler, _ = build(num_pages=65, max_step_tokens=20)
    scheduler.prefill_budget.max_tokens = 6
    scheduler.add(sequence(0, list(range(20))))
    scheduler.add(sequence(1, list(range(50, 60))))
    assert [chunk.num_tokens for chunk in scheduler.schedule().chunks] == [3, 3]


def test_a_sequence_whose_grammar_compiles_is_passed():
    scheduler, _ = build()
    first = sequence(0, [1, 2])
    first.status = Status.COMPILING
    scheduler.add(first)
    assert not scheduler.has_runnable
    assert scheduler.schedule() is None
    scheduler.add(sequence(1, [3]))
    assert [chunk.sequence.arrival for chunk in scheduler.schedule().chunks] == [1]


def test_the_queue_is_first_come_even_if_a_later_prompt_would_fit():
    scheduler, _ = build(num_pages=9, max_step_tokens=40)
    scheduler.add(sequence(0, list(range(20))))
    compute(scheduler, scheduler.schedule())
    scheduler.add(sequence(1, list(range(100, 120))))
    scheduler.add(sequence(2, [7]))
    assert [chunk.sequence.arrival for chunk in scheduler.schedule().chunks] == [0]


def test_equal_prompts_that_arrive_together_are_computed_once():
    scheduler, _ = build(num_pages=65, max_step_tokens=200, max_running=4)
    prompt = list(range(30))
    for arrival in range(4):
        scheduler.add(sequence(arrival, prompt))
    plan = scheduler.schedule()
    assert [chunk.sequence.arrival for chunk in plan.chunks] == [0]
    compute(scheduler, plan)
    plan = scheduler.schedule()
    assert [(chunk.sequence.arrival, chunk.start) for chunk in plan.chunks] == [(0, 30), (1, 28), (2, 28), (3, 28)]
    assert scheduler.check() == []


def test_a_waiter_does_not_hang_on_a_prefix_whose_owner_is_cancelled():
    scheduler, _ = build(num_pages=65, max_step_tokens=8)
    scheduler.add(sequence(0, list(range(40))))
    scheduler.add(sequence(1, list(range(40))))
    compute(scheduler, scheduler.schedule())
    scheduler.finish(scheduler.find(0))
    plan = scheduler.schedule()
    assert [(chunk.sequence.arrival, chunk.start) for chunk in plan.chunks] == [(1, 8)]
