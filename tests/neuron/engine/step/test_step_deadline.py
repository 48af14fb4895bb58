from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from neuron.engine.step.step_deadline import StepDeadline

from tests.neuron.engine.toy import request, run, toy_engine


def test_before_anything_is_learnt_warming_up_tells() -> None:
    assert StepDeadline(seconds_per_token=0.0, max_prefill_tokens=2048).seconds == 5.0
    assert StepDeadline(seconds_per_token=0.001, max_prefill_tokens=1000).seconds == 5.0 + 8.0


def test_a_slow_step_is_believed_at_once_and_forgotten_slowly() -> None:
    deadline = StepDeadline(seconds_per_token=0.0, max_prefill_tokens=100)
    deadline.learn(0, 2.0)
    assert deadline.seconds == 21.0
    deadline.learn(0, 0.1)
    assert 20.0 < deadline.seconds < 21.0
    for _ in range(200):
        deadline.learn(0, 0.1)
    assert 5.8 <= deadline.seconds < 5.9


def test_short_chunks_do_not_raise_the_price_of_a_token() -> None:
    deadline = StepDeadline(seconds_per_token=1e-5, max_prefill_tokens=4096)
    deadline.learn(3, 0.05)
    assert deadline.seconds < 6.0


@given(st.lists(st.tuples(st.integers(0, 512), st.floats(0.0, 30.0)), min_size=1, max_size=30))
def test_a_step_like_the_last_one_is_always_allowed_with_margin(steps: list[tuple[int, float]]) -> None:
    deadline = StepDeadline(seconds_per_token=0.0, max_prefill_tokens=512)
    for prefill_tokens, seconds in steps:
        deadline.learn(prefill_tokens, seconds)
        assert deadline.seconds >= 5.0 + 7.9 * seconds


def test_every_step_reports_the_deadline_of_the_next() -> None:
    engine = toy_engine()
    assert engine.stats().step_deadline_s >= 5.0
    run(engine, request(0, range(100), 5))
    assert 5.0 <= engine.stats().step_deadline_s < 60.0
