from __future__ import annotations

from cortex_core.fleet import ModelLoad
from cortex_gateway.fleet.activity import Activity
from hypothesis import given
from hypothesis import strategies as st


def test_load_is_what_was_polled_plus_what_was_sent_since() -> None:
    activity = Activity()
    activity.begin("alpha", "m", 1.0)
    activity.begin_poll("alpha")  # the neuron counts this one
    polled = ModelLoad(id="m", in_flight=3, queue_depth=1)
    assert activity.load_of("alpha", "m", polled) == 4
    activity.begin("alpha", "m", 2.0)
    assert activity.load_of("alpha", "m", polled) == 5
    activity.end("alpha", "m")
    activity.end("alpha", "m")
    assert activity.load_of("alpha", "m", polled) == 3
    assert activity.load_of("alpha", "m", None) == 0


@given(st.lists(st.sampled_from(["begin", "end", "poll"]), max_size=40))
def test_counts_are_never_negative_and_end_at_zero(steps: list[str]) -> None:
    activity, running = Activity(), 0
    for step in steps:
        if step == "begin":
            activity.begin("alpha", "m", 0.0)
            running += 1
        elif step == "end" and running:
            activity.end("alpha", "m")
            running -= 1
        else:
            activity.begin_poll("alpha")
        assert activity.in_flight("alpha", "m") == running
        assert activity.load_of("alpha", "m", ModelLoad(id="m")) >= running
    for _ in range(running):
        activity.end("alpha", "m")
    assert activity.total_in_flight() == 0


def test_what_a_node_no_longer_has_is_forgotten() -> None:
    activity = Activity()
    for model in ("a", "b"):
        activity.begin("alpha", model, 5.0)
        activity.end("alpha", model)
    activity.forget_absent("alpha", frozenset({"b"}))
    assert activity.last_used("alpha", "a") == float("-inf")
    assert activity.last_used("alpha", "b") == 5.0
