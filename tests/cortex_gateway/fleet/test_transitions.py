"""Events in, snapshots out."""

from __future__ import annotations

import pytest
from cortex_core.fleet import Activation, DiscoveryResponse, HealthResponse, ModelInfo, ModelLoad
from cortex_gateway.fleet.snapshot import FleetSnapshot, LoadFailure, NodeSnapshot
from cortex_gateway.fleet.transitions import (
    FleetEvent,
    OperationEnded,
    OperationStarted,
    Pinned,
    Polled,
    PollMissed,
    reduce,
)

EMPTY = FleetSnapshot(nodes={name: NodeSnapshot(name=name, endpoint=f"http://{name}") for name in ("alpha", "beta")})


def after(*events: FleetEvent, snapshot: FleetSnapshot = EMPTY) -> NodeSnapshot:
    for event in events:
        snapshot = reduce(snapshot, event)
    return snapshot.nodes["alpha"]


def polled(*models: str, at: float = 1.0, **fields: object) -> Polled:
    return Polled(node="alpha", started_at=at, models={model: ModelInfo(id=model) for model in models}, **fields)  # type: ignore[arg-type]


MISSED = PollMissed(node="alpha", error="no answer")


@pytest.mark.parametrize(
    ("events", "health"),
    [
        ([], "unknown"),
        ([MISSED], "unhealthy"),
        ([polled()], "healthy"),
        ([polled(), MISSED], "suspect"),
        ([polled(), MISSED, MISSED], "suspect"),
        ([polled(), MISSED, MISSED, MISSED], "unhealthy"),
        ([polled(), MISSED, MISSED, polled(), MISSED], "suspect"),
        ([polled(), MISSED, MISSED, MISSED, polled()], "healthy"),
    ],
)
def test_F23_a_node_is_given_up_after_three_misses_and_taken_back_after_one_answer(
    events: list[FleetEvent], health: str
) -> None:
    node = after(*events)
    assert node.health == health
    assert node.is_routable == (health in ("healthy", "suspect"))


def test_a_missed_poll_forgets_nothing() -> None:
    assert list(after(polled("m"), MISSED, MISSED, MISSED).models) == ["m"]


def test_a_model_absent_from_the_reply_is_gone() -> None:
    assert list(after(polled("m", "n"), polled("n", at=2)).models) == ["n"]


def test_F22_a_failed_health_call_costs_a_node_neither_health_nor_figures() -> None:
    load = {"m": ModelLoad(id="m", in_flight=3)}
    node = after(polled("m", health=HealthResponse(uptime_secs=9), loads=load), polled("m", at=2))
    assert (node.health, node.uptime_secs, node.loads) == ("healthy", 9, load)


def test_discovery_is_kept_until_it_is_replaced() -> None:
    found = DiscoveryResponse(hostname="h")
    assert after(polled(discovery=found), polled(at=2)).discovery == found


def test_an_operation_outranks_a_poll_until_it_ends() -> None:
    events: list[FleetEvent] = [
        polled(),
        OperationStarted(node="alpha", model="m", kind="load", at=2),
        polled(at=3),
    ]
    assert after(*events).status("m") == "loading"
    ended = OperationEnded(node="alpha", model="m", kind="load", at=4, succeeded=True)
    assert after(*events, ended).status("m") == "loaded"


def test_a_poll_that_began_before_an_operation_ended_describes_the_past() -> None:
    events: list[FleetEvent] = [
        polled(),
        OperationStarted(node="alpha", model="m", kind="load", at=2),
        OperationEnded(node="alpha", model="m", kind="load", at=4, succeeded=True),
        polled(at=3),
    ]
    assert after(*events).status("m") == "loaded"
    assert after(*events, polled(at=5)).status("m") is None


def test_an_unload_takes_the_model_off_the_list_and_remembers_it() -> None:
    node = after(
        polled("m", "n"),
        OperationStarted(node="alpha", model="m", kind="unload", at=2),
        OperationEnded(node="alpha", model="m", kind="unload", at=3, succeeded=True),
    )
    assert (list(node.models), list(node.unloaded), node.lifecycle_cycles) == (["n"], ["m"], 1)
    again = after(polled("m", at=4), snapshot=FleetSnapshot(nodes={"alpha": node}))
    assert (list(again.models), list(again.unloaded)) == (["m"], [])


def test_a_model_that_never_served_is_forgotten_when_it_is_unloaded() -> None:
    failed = Polled(node="alpha", started_at=1, models={"m": ModelInfo(id="m", status="failed")})
    node = after(
        failed,
        OperationStarted(node="alpha", model="m", kind="unload", at=2),
        OperationEnded(node="alpha", model="m", kind="unload", at=3, succeeded=True),
    )
    assert (list(node.models), list(node.unloaded)) == ([], [])


@pytest.mark.parametrize("kind", ["load", "unload"])
def test_a_failed_operation_leaves_what_was_there(kind: str) -> None:
    node = after(
        polled("m"),
        OperationStarted(node="alpha", model="m", kind=kind, at=2),  # type: ignore[arg-type]
        OperationEnded(node="alpha", model="m", kind=kind, at=3, succeeded=False),  # type: ignore[arg-type]
    )
    assert (node.status("m"), node.lifecycle_cycles, node.operations) == ("loaded", 0, {})


def test_activation_shows_until_it_is_ready() -> None:
    warming = Activation(state="pre_warming", pending=("b",), in_progress="a")
    node = after(polled(health=HealthResponse(activation=warming)))
    assert (node.status("a"), node.status("b"), node.status("c")) == ("loading", "loading", None)
    done = Activation(state="ready", pending=("b",))
    assert after(polled(health=HealthResponse(activation=done))).status("b") is None


def test_events_of_other_nodes_and_of_unknown_ones_change_nothing_here() -> None:
    before = EMPTY.nodes["alpha"]
    assert after(PollMissed(node="beta", error="x")) is before
    assert reduce(EMPTY, PollMissed(node="gamma", error="x")) is EMPTY


def test_F22_a_node_that_streams_is_suspect_for_missing_polls_and_never_given_up() -> None:
    alive = PollMissed(node="alpha", error="no answer", is_alive=True)
    assert after(polled(), *[alive] * 10).health == "suspect"
    assert after(polled(), MISSED, MISSED, alive, MISSED, MISSED).health == "suspect"
    assert after(polled(), MISSED, MISSED, alive, MISSED, MISSED, MISSED).health == "unhealthy"
    assert after(alive).health == "unhealthy"


def failed(at: float) -> OperationEnded:
    failure = LoadFailure(message="no", code="x")
    return OperationEnded(node="alpha", model="m", kind="load", at=at, succeeded=False, failure=failure)


def test_each_failed_load_is_left_alone_for_twice_as_long_until_one_succeeds() -> None:
    events: list[FleetEvent] = [polled()]
    waits = []
    for number in range(10):
        events.append(failed(at=100.0 * number))
        waits.append(after(*events).load_failures["m"].until - 100.0 * number)
    assert waits == [2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 300.0, 300.0]
    loaded = OperationEnded(node="alpha", model="m", kind="load", at=2000.0, succeeded=True)
    assert after(*events, loaded).load_failures == {}
    assert after(*events, polled("m", at=2000.0)).load_failures == {}, "someone else got it loaded"


def test_it_is_remembered_since_when_a_model_is_here_and_how_long_its_load_took() -> None:
    node = after(
        polled(),
        OperationStarted(node="alpha", model="m", kind="load", at=5.0),
        OperationEnded(node="alpha", model="m", kind="load", at=12.0, succeeded=True),
        polled("m", "n", at=20.0),
        polled("m", "n", at=30.0),
    )
    assert (node.residences["m"].since, node.residences["m"].load_s) == (12.0, 7.0)
    assert (node.residences["n"].since, node.residences["n"].load_s) == (20.0, 0.0)
    loading = {"o": ModelInfo(id="o", status="loading")}
    elsewhere = after(
        Polled(node="alpha", started_at=1.0, models=loading),
        Polled(node="alpha", started_at=4.0, models=loading),
        polled("o", at=9.0),
    )
    assert (elsewhere.residences["o"].since, elsewhere.residences["o"].load_s) == (9.0, 8.0)
    assert after(polled("m"), polled(at=2)).residences == {}


def test_a_pin_is_the_neurons_where_it_can_keep_it_and_ends_with_an_unload() -> None:
    pinned = after(polled("m"), Pinned(node="alpha", model="m", pinned=True))
    assert pinned.is_pinned("m") and not pinned.pins
    kept = after(polled("m"), Pinned(node="alpha", model="m", pinned=True, is_kept_here=True), polled("m", at=2))
    assert kept.is_pinned("m") and kept.pins == {"m"}
    unload = OperationEnded(node="alpha", model="m", kind="unload", at=3, succeeded=True)
    assert not after(unload, polled("m", at=4), snapshot=FleetSnapshot(nodes={"alpha": kept})).is_pinned("m")
