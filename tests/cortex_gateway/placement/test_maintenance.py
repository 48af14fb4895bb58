"""What a gateway does of its own accord."""

from __future__ import annotations

import pytest
from cortex_core.catalogue import Catalogue, ModelProfile
from cortex_core.fleet import ModelInfo, ModelLoad, ModelSpec
from cortex_gateway.fleet.activity import Activity
from cortex_gateway.fleet.snapshot import FleetSnapshot, NodeSnapshot, Operation, Residence
from cortex_gateway.fleet.transitions import DefragDone, DefragDue, OperationEnded, OperationStarted, reduce
from cortex_gateway.placement.maintenance import BeginDefrag, Chore, EndDefrag, Recycle, UnloadIdle, plan_maintenance
from cortex_gateway.placement.state import PlacementState
from hypothesis import given

from .fleets import node, situations, state

HERE = {"m": Residence(begun=0.0, since=10.0)}
CATALOGUE = Catalogue(models=(ModelProfile(id="m", idle_unload_s=60.0),))


def chores(*members: NodeSnapshot, **drawn: object) -> tuple[Chore, ...]:
    return plan_maintenance(state(*members, **drawn))  # type: ignore[arg-type]


def test_a_model_nobody_used_for_its_time_is_unloaded() -> None:
    idle = node(having={"m": "loaded"}, residences=HERE)
    assert chores(idle, catalogue=CATALOGUE, now=69.0) == ()
    assert chores(idle, catalogue=CATALOGUE, now=70.0) == (UnloadIdle(node="alpha", model="m", idle_s=60.0),)


def test_the_catalogue_has_the_last_word_on_idle_time() -> None:
    idle = node(having={"m": "loaded"}, residences=HERE)
    assert chores(idle, now=1e6) == ()
    assert len(chores(idle, now=1e6, idle_unload_s=60.0)) == 1
    never = Catalogue(models=(ModelProfile(id="m", idle_unload_s=0.0),))
    assert chores(idle, catalogue=never, now=1e6, idle_unload_s=60.0) == ()


def test_use_by_this_gateway_or_by_another_keeps_a_model() -> None:
    activity = Activity()
    activity.mark("alpha", "m", 50.0)
    assert (
        chores(node(having={"m": "loaded"}, residences=HERE), catalogue=CATALOGUE, activity=activity, now=100.0) == ()
    )
    elsewhere = node(
        having={"m": "loaded"}, residences=HERE, loads={"m": ModelLoad(id="m", idle_s=5.0)}, polled_at=95.0
    )
    assert chores(elsewhere, catalogue=CATALOGUE, now=100.0) == ()
    assert chores(elsewhere, catalogue=CATALOGUE, now=150.0) != ()


@pytest.mark.parametrize("reason", ["in flight", "queued", "pinned", "under way", "waited for"])
def test_what_is_needed_is_left_alone(reason: str) -> None:
    activity = Activity()
    if reason == "in flight":
        activity.begin("alpha", "m", 0.0)
    kept = node(
        having={"m": "loaded"},
        residences=HERE,
        loads={"m": ModelLoad(id="m", queue_depth=1)} if reason == "queued" else {},
        pins=frozenset(("m",)) if reason == "pinned" else frozenset(),
        operations={"x": Operation(kind="load", since=0.0)} if reason == "under way" else {},
    )
    waiting = {"m": 99.0} if reason == "waited for" else {}
    assert chores(kept, catalogue=CATALOGUE, activity=activity, waiting=waiting, now=1000.0) == ()


def evicted(count: int) -> NodeSnapshot:
    snapshot = FleetSnapshot(nodes={"alpha": node(having={"m": "loaded"}, residences=HERE)})
    for _ in range(count):
        snapshot = reduce(snapshot, OperationStarted(node="alpha", model="x", kind="unload", at=20.0))
        snapshot = reduce(snapshot, OperationEnded(node="alpha", model="x", kind="unload", at=20.0, succeeded=True))
    return snapshot.nodes["alpha"]


def test_after_so_many_evictions_each_model_is_recycled_once_and_that_is_it() -> None:
    assert chores(evicted(2), defrag_after_cycles=3) == ()
    worn = evicted(3)
    assert chores(worn, defrag_after_cycles=3) == (BeginDefrag(node="alpha"),)
    assert chores(worn, defrag_after_cycles=0) == ()

    snapshot = reduce(FleetSnapshot(nodes={"alpha": worn}), DefragDue(node="alpha", at=100.0))
    (recycle,) = chores(snapshot.nodes["alpha"], defrag_after_cycles=3, now=101.0)
    assert isinstance(recycle, Recycle) and (recycle.node, recycle.model) == ("alpha", "m")

    for kind, is_eviction in (("unload", False), ("load", True)):
        snapshot = reduce(snapshot, OperationStarted(node="alpha", model="m", kind=kind, at=102.0))  # type: ignore[arg-type]
        snapshot = reduce(
            snapshot,
            OperationEnded(
                node="alpha",
                model="m",
                kind=kind,  # type: ignore[arg-type]
                at=103.0,
                succeeded=True,
                is_eviction=is_eviction,
            ),
        )
    assert chores(snapshot.nodes["alpha"], defrag_after_cycles=3, now=104.0) == (EndDefrag(node="alpha"),)
    snapshot = reduce(snapshot, DefragDone(node="alpha"))
    assert chores(snapshot.nodes["alpha"], defrag_after_cycles=3, now=105.0) == ()


def test_a_busy_model_is_recycled_when_it_is_idle_and_does_not_hold_up_the_others() -> None:
    activity = Activity()
    activity.begin("alpha", "a", 0.0)
    both = {"a": Residence(begun=0.0, since=1.0), "b": Residence(begun=0.0, since=1.0)}
    worn = node(having={"a": "loaded", "b": "loaded"}, residences=both, defrag_since=50.0)
    (first,) = chores(worn, activity=activity)
    assert isinstance(first, Recycle) and first.model == "b"
    alone = node(having={"a": "loaded"}, residences=both, defrag_since=50.0)
    assert chores(alone, activity=activity) == ()


def test_G4_a_recycled_model_comes_back_as_it_was() -> None:
    spec = ModelSpec(model_id="m", quant="q6k", tensor_parallel=2, devices=(0, 1), max_model_len=4096)
    said = node(models={"m": ModelInfo(id="m", spec=spec)}, residences=HERE, defrag_since=50.0)
    (recycle,) = chores(said)
    assert isinstance(recycle, Recycle) and recycle.spec == spec
    silent = node(models={"m": ModelInfo(id="m", devices=(0,))}, residences=HERE, defrag_since=50.0)
    (recycle,) = chores(silent, catalogue=Catalogue(models=(ModelProfile(id="m", quant="q6k"),)))
    assert isinstance(recycle, Recycle) and (recycle.spec.quant, recycle.spec.devices) == ("q6k", (0,))


@given(situations())
def test_no_chore_ever_touches_what_is_in_use_or_pinned_and_one_at_a_time_moves(drawn: PlacementState) -> None:
    for alpha in drawn.snapshot.nodes.values():
        moved = [c for c in plan_maintenance(drawn) if c.node == alpha.name and isinstance(c, UnloadIdle | Recycle)]
        assert len(moved) <= 1
        for chore in moved:
            assert drawn.activity.in_flight(alpha.name, chore.model) == 0
            assert chore.model not in drawn.waiting
            assert not alpha.operations
            assert isinstance(chore, Recycle) or not alpha.is_pinned(chore.model)
