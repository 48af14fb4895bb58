"""Events in, snapshots out."""

from __future__ import annotations

import pytest
from cortex_core.fleet import Activation, DiscoveryResponse, HealthResponse, ModelInfo, ModelLoad
from cortex_gateway.fleet.snapshot import FleetSnapshot, NodeSnapshot
from cortex_gateway.fleet.transitions import (
    FleetEvent,
    OperationEnded,
    OperationStarted,
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
