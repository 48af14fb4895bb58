"""Models that displace each other: few swaps, everybody's turn, and nobody cut off."""

from __future__ import annotations

import pytest
from cortex_core.catalogue import Catalogue, ModelProfile
from cortex_gateway.fleet.activity import Activity
from cortex_gateway.fleet.snapshot import Operation, Residence
from cortex_gateway.placement.decision import Forward, Hold, Load
from cortex_gateway.placement.router import decide
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from .fleets import node, state
from .simulation import Arrival, Node

ALONE = {"a": 20_000, "b": 20_000, "c": 20_000}
"""Each fits, no two do."""


# ---------------------------------------------------------------------------------------------- over time


def test_requests_for_a_b_c_a_b_c_at_once_cost_three_loads_not_six() -> None:
    simulated = Node(ALONE, load_s=5.0)
    simulated.run([Arrival(0.001 * i, "abcabc"[i % 6], 1.0) for i in range(60)])
    assert simulated.loads == ["a", "b", "c"]
    assert not simulated.evicted_in_use


def test_a_b_c_a_b_c_over_time_swaps_at_most_once_per_residence() -> None:
    """A request every second for two hundred seconds: load and stay take five seconds each."""
    simulated = Node(ALONE, load_s=5.0)
    simulated.run([Arrival(float(i), "abc"[i % 3], 0.5) for i in range(200)])
    end = max(served.began for served in simulated.served)
    assert len(simulated.loads) <= end / 10 + 2
    assert not simulated.evicted_in_use
    assert max(served.began - served.arrived for served in simulated.served) < 60


def test_without_residence_the_same_order_would_swap_far_more_often() -> None:
    """The counter-proof: it is the residence that bounds the swaps."""
    arrivals = [Arrival(float(i), "abc"[i % 3], 0.5) for i in range(200)]
    bounded, unbounded = Node(ALONE, load_s=0.1, min_residence_s=10.0), Node(ALONE, load_s=0.1, min_residence_s=0.0)
    bounded.run(arrivals)
    unbounded.run(arrivals)
    assert len(unbounded.loads) > 4 * len(bounded.loads)


def test_a_model_that_is_never_idle_yields_when_patience_is_over() -> None:
    simulated = Node({"a": 20_000, "b": 20_000}, load_s=2.0, patience_s=30.0)
    always = [Arrival(0.5 * i, "a", 1.0) for i in range(400)]
    simulated.run([*always, Arrival(5.0, "b", 1.0)])
    (waited,) = [served.began - served.arrived for served in simulated.served if served.model == "b"]
    assert 29 < waited < 40
    assert simulated.loads == ["a", "b", "a"]
    assert not simulated.evicted_in_use


def test_a_turn_is_for_all_who_waited_for_the_load_however_long_others_have_waited() -> None:
    """Loads and answers take longer than patience lasts: one request a turn would be a load for each."""
    simulated = Node(ALONE, load_s=10.0, patience_s=10.0)
    simulated.run([Arrival(0.1 * i, "abc"[i % 3], 20.0) for i in range(12)])
    assert simulated.loads == ["a", "b", "c"]
    assert max(served.began for served in simulated.served) < 3 * (10 + 20) + 10
    assert not simulated.evicted_in_use


@given(
    st.lists(
        st.tuples(st.floats(0, 120), st.sampled_from("abcde"), st.floats(0.01, 20)).map(lambda drawn: Arrival(*drawn)),
        min_size=1,
        max_size=60,
    ),
    st.lists(st.sampled_from([5_000, 10_000, 20_000, 24_000]), min_size=5, max_size=5),
    st.sampled_from([0.0, 0.5, 10.0]),
    st.sampled_from(["lru", "priority"]),
    st.sampled_from([None, 0.0, 15.0]),
)
@settings(max_examples=60, phases=[Phase.generate])
def test_whatever_comes_everyone_is_served_in_bounded_time_and_no_work_is_cut(
    arrivals: list[Arrival], sizes: list[int], load_s: float, strategy: str, min_residence_s: float | None
) -> None:
    simulated = Node(
        dict(zip("abcde", sizes, strict=True)),
        load_s=load_s,
        strategy=strategy,
        min_residence_s=min_residence_s,
        patience_s=10.0,
    )
    simulated.run(sorted(arrivals))
    assert not simulated.evicted_in_use
    # Each turn of another model: patience, the longest answer in flight, and a load. A model has at most one turn
    # before ours for each of the others, and one more that was under way.
    turn = 10.0 + max(arrival.service_s for arrival in arrivals) + load_s
    assert max(served.began - served.arrived for served in simulated.served) <= 6 * turn + load_s


# ---------------------------------------------------------------------------------------------- rules, one by one

TWO = Catalogue(models=(ModelProfile(id="m", vram_mb=8_000), ModelProfile(id="a", vram_mb=20_000)))
FULL = node(having={"a": "loaded"}, free_mb=[4_000])


def test_a_model_that_was_just_loaded_stays_as_long_as_its_load_took() -> None:
    new = node(having={"a": "loaded"}, free_mb=[4_000], residences={"a": Residence(begun=85.0, since=95.0)})
    assert decide("m", state(new, catalogue=TWO)) == Hold(node="alpha", reason="settling", until=105.0)
    assert isinstance(decide("m", state(new, catalogue=TWO, now=105.0)), Load)
    assert isinstance(decide("m", state(new, catalogue=TWO, min_residence_s=0.0)), Load)


def test_however_long_a_load_took_it_protects_for_half_a_minute_at_most() -> None:
    slow = node(having={"a": "loaded"}, free_mb=[4_000], residences={"a": Residence(begun=-900.0, since=95.0)})
    held = decide("m", state(slow, catalogue=TWO, patience_s=300.0))
    assert held == Hold(node="alpha", reason="settling", until=125.0)


def test_a_model_whose_requests_are_about_to_be_sent_is_not_a_victim() -> None:
    """They have been woken by the end of its load, and another model's request was woken first."""
    assert decide("m", state(FULL, catalogue=TWO, waiting={"a": 90.0, "m": 95.0})) == Hold(
        node="alpha", reason="busy", until=125.0
    )


def test_whoever_waits_longest_makes_room_first() -> None:
    models = Catalogue(models=(*TWO.models, ModelProfile(id="n", vram_mb=8_000)))
    waiting = {"n": 90.0, "m": 95.0}
    assert decide("m", state(FULL, catalogue=models, waiting=waiting)) == Hold(node="alpha", reason="queued")
    assert isinstance(decide("n", state(FULL, catalogue=models, waiting=waiting)), Load)


def test_what_fits_without_displacing_anyone_needs_not_queue() -> None:
    models = Catalogue(models=(*TWO.models, ModelProfile(id="small", vram_mb=1_000)))
    assert isinstance(decide("small", state(FULL, catalogue=models, waiting={"m": 90.0, "small": 95.0})), Load)


def test_another_node_is_taken_where_one_has_a_queue() -> None:
    models = Catalogue(models=(ModelProfile(id="n", vram_mb=8_000, pinned_on=("alpha",)), *TWO.models))
    both = (FULL, node("beta", having={"a": "loaded"}, free_mb=[2_000]))
    decision = decide("m", state(*both, catalogue=models, waiting={"n": 90.0, "m": 95.0}))
    assert isinstance(decision, Load) and decision.node == "beta"


@pytest.mark.parametrize("in_flight", [0, 1])
def test_when_patience_is_over_new_requests_yield_and_those_in_flight_are_awaited(in_flight: int) -> None:
    activity = Activity()
    for _ in range(in_flight):
        activity.begin("alpha", "a", 99.0)
    patient = state(FULL, catalogue=TWO, activity=activity, waiting={"m": 80.0})
    lost = state(FULL, catalogue=TWO, activity=activity, waiting={"m": 60.0})
    if in_flight:
        assert decide("a", patient) == Forward(node="alpha")
        assert decide("a", lost) == Hold(node="alpha", reason="yielding")
        assert decide("m", lost) == Hold(node="alpha", reason="busy")
    else:
        load = decide("m", lost)
        assert isinstance(load, Load) and load.victims == ("a",)


def test_a_replica_elsewhere_serves_while_one_yields() -> None:
    activity = Activity()
    activity.begin("alpha", "a", 99.0)
    pinned = Catalogue(models=(ModelProfile(id="m", vram_mb=8_000, pinned_on=("alpha",)), TWO.models[1]))
    both = (FULL, node("beta", having={"a": "loaded"}))
    assert decide("a", state(*both, catalogue=pinned, activity=activity, waiting={"m": 0.0})) == Forward("beta")


def test_a_pinned_model_never_yields() -> None:
    activity = Activity()
    activity.begin("alpha", "a", 99.0)
    pinned = node(having={"a": "loaded"}, free_mb=[4_000], pins=frozenset(("a",)))
    assert decide("a", state(pinned, catalogue=TWO, activity=activity, waiting={"m": 0.0})) == Forward("alpha")


def test_a_load_under_way_is_waited_for_before_the_next_one_begins() -> None:
    arriving = node(having={}, free_mb=[24_000], operations={"a": Operation(kind="load", since=90.0)})
    held = decide("m", state(arriving, catalogue=TWO, waiting={"a": 90.0, "m": 91.0}))
    assert isinstance(held, Hold)
