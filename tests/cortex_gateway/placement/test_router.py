"""Where requests go: one decision per state."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from cortex_core.catalogue import Catalogue, ModelProfile
from cortex_core.fleet import Activation, ModelInfo, ModelLoad, Servable
from cortex_gateway.fleet.activity import Activity
from cortex_gateway.fleet.snapshot import FleetSnapshot, NodeSnapshot, Operation
from cortex_gateway.placement.decision import Decision, Forward, Hold, Load, Refuse
from cortex_gateway.placement.router import decide
from cortex_gateway.placement.state import PlacementState
from hypothesis import given

from .fleets import INCOMING, fleet, node, situations, state

IN_CATALOGUE = Catalogue(models=(ModelProfile(id="m", vram_mb=8_000),))


def route(
    *members: NodeSnapshot, catalogue: Catalogue = IN_CATALOGUE, activity: Activity | None = None, model: str = "m"
) -> Decision:
    return decide(model, state(*members, catalogue=catalogue, activity=activity))


# ---------------------------------------------------------------------------------------------- properties


@given(situations())
def test_every_decision_can_be_carried_out_and_would_be_made_again(drawn: PlacementState) -> None:
    alpha, beta = drawn.snapshot.nodes.values()
    turned = msgspec.structs.replace(drawn, snapshot=fleet(beta, alpha))
    for model in (INCOMING, "org/m0", "org/m1"):
        decision = decide(model, drawn)
        check_feasible(decision, model, drawn)
        check_no_second_copy(decision, model, drawn.snapshot)
        assert decide(model, drawn) == decision
        if isinstance(decision, Forward | Load):
            assert decide(model, turned) == decision


def check_feasible(decision: Decision, model: str, drawn: PlacementState) -> None:
    snapshot, catalogue = drawn.snapshot, drawn.catalogue
    match decision:
        case Forward():
            chosen = snapshot.nodes[decision.node]
            assert chosen.is_routable and not chosen.is_draining
            assert chosen.status(model) in ("loaded", "reloading")
        case Load():
            chosen = snapshot.nodes[decision.node]
            assert chosen.is_routable and not chosen.is_draining
            assert chosen.status(model) not in ("loaded", "loading", "fetching", "unloading")
            failure = chosen.load_failures.get(model)
            assert failure is None or failure.until <= drawn.now
            profile = catalogue.profile(model)
            assert profile is None or not profile.pinned_on or decision.node in profile.pinned_on
            for victim in decision.victims:
                assert drawn.activity.in_flight(decision.node, victim) == 0
                assert not chosen.is_pinned(victim)
                assert chosen.status(victim) == "loaded"
                assert catalogue.residency(victim) <= catalogue.residency(model)
        case Hold():
            assert decision.node in snapshot.nodes
            assert decision.until is None or decision.until > drawn.now
        case Refuse():
            assert decision.message and decision.code


def check_no_second_copy(decision: Decision, model: str, snapshot: FleetSnapshot) -> None:
    coming = ("loading", "fetching", "recovering", "loaded")
    if any(
        node.is_routable and not node.is_draining and node.status(model) in coming for node in snapshot.nodes.values()
    ):
        assert not isinstance(decision, Load)


# ---------------------------------------------------------------------------------------------- loaded


def test_the_least_loaded_node_is_taken() -> None:
    busy = node("alpha", having={"m": "loaded"}, loads={"m": ModelLoad(id="m", in_flight=1, queue_depth=2)})
    idle = node("beta", having={"m": "loaded"}, loads={"m": ModelLoad(id="m", in_flight=2)})
    assert route(busy, idle) == Forward(node="beta")


def test_what_was_sent_since_the_poll_counts() -> None:
    alpha = node("alpha", having={"m": "loaded"}, loads={"m": ModelLoad(id="m")})
    beta = node("beta", having={"m": "loaded"}, loads={"m": ModelLoad(id="m", in_flight=1)})
    activity = Activity()
    chosen = []
    for number in range(5):
        decision = route(alpha, beta, activity=activity)
        assert isinstance(decision, Forward)
        activity.begin(decision.node, "m", float(number))
        chosen.append(decision.node)
    assert chosen == ["alpha", "beta", "alpha", "beta", "alpha"]


def test_ties_are_broken_by_name() -> None:
    assert route(node("beta", having={"m": "loaded"}), node("alpha", having={"m": "loaded"})) == Forward(node="alpha")


def test_a_suspect_node_is_still_routable() -> None:
    assert route(node(having={"m": "loaded"}, health="suspect")) == Forward(node="alpha")


def test_an_unknown_status_reads_as_loaded() -> None:
    assert route(node(having={"m": "humming"})) == Forward(node="alpha")


def unservable() -> NodeSnapshot:
    info = ModelInfo(id="m", servable=Servable(ok=False, reason="no memory"))
    return node("alpha", models={"m": info})


def test_F24_a_model_that_cannot_be_served_is_skipped() -> None:
    assert route(unservable(), node("beta", having={"m": "loaded"})) == Forward(node="beta")
    alone = route(unservable())
    assert isinstance(alone, Refuse) and (alone.code, alone.retry_after) == ("model_unservable", 5)
    assert "no memory" in alone.message


# ---------------------------------------------------------------------------------------------- hold


@pytest.mark.parametrize(
    ("status", "reason"),
    [("loading", "loading"), ("fetching", "loading"), ("recovering", "recovering"), ("poisoned", "recovering")],
)
def test_F11_a_model_on_its_way_is_waited_for_and_not_started_elsewhere(status: str, reason: str) -> None:
    decision = route(node("alpha", having={"m": status}), node("beta"))
    assert decision == Hold(node="alpha", reason=reason)  # type: ignore[arg-type]


def test_a_model_in_a_neurons_activation_queue_is_waited_for() -> None:
    pending = Activation(state="pre_warming", pending=("m",), in_progress="other")
    assert route(node("alpha", activation=pending), node("beta")) == Hold(node="alpha", reason="loading")


def test_own_operations_outrank_what_the_last_poll_said() -> None:
    loading = node(having={}, operations={"m": Operation(kind="load", since=0)})
    assert route(loading) == Hold(node="alpha", reason="loading")
    unloading = node(having={"m": "loaded"}, operations={"m": Operation(kind="unload", since=0)})
    assert route(unloading) == Hold(node="alpha", reason="unloading")


def test_before_the_first_poll_nothing_is_decided() -> None:
    decision = route(node("alpha", health="unknown", discovery=None, models={}), node("beta"))
    assert decision == Hold(node="alpha", reason="unpolled")


def test_room_is_waited_for_while_all_that_could_go_are_busy() -> None:
    activity = Activity()
    activity.begin("alpha", "a", 0.0)
    models = Catalogue(models=(ModelProfile(id="m", vram_mb=8_000), ModelProfile(id="a", vram_mb=20_000)))
    assert route(node(having={"a": "loaded"}, free_mb=[4_000]), catalogue=models, activity=activity) == Hold(
        node="alpha", reason="busy", until=130.0
    )


# ---------------------------------------------------------------------------------------------- load


def loads_on(decision: Decision) -> str:
    assert isinstance(decision, Load), decision
    return decision.node


def test_an_absent_and_an_unloaded_model_are_loaded_alike() -> None:
    assert loads_on(route(node())) == "alpha"
    assert loads_on(route(node(having={"m": "unloaded"}))) == "alpha"
    assert loads_on(route(node(having={"m": "failed"}))) == "alpha"


@pytest.mark.parametrize(
    ("alpha", "beta", "profile", "expected"),
    [
        ({"free_mb": [20_000]}, {"free_mb": [1_000]}, {"pinned_on": ("beta",)}, "beta"),
        ({"free_mb": [1_000], "having": {"x": "loaded"}}, {"free_mb": [9_000]}, {}, "beta"),
        ({"free_mb": [1_000]}, {"free_mb": [500], "having": {"x": "loaded"}}, {}, "beta"),
        ({"free_mb": [9_000]}, {"free_mb": [10_000]}, {}, "beta"),
        ({"free_mb": [9_000]}, {"free_mb": [9_000]}, {}, "alpha"),
        ({"free_mb": [9_000]}, {"free_mb": [9_000, 9_000]}, {"min_devices": 2}, "beta"),
        ({"free_mb": [9_000], "total_mb": [10_000]}, {"free_mb": [8_500]}, {"min_device_vram_mb": 20_000}, "beta"),
        ({"free_mb": [20_000], "is_draining": True}, {"free_mb": [9_000]}, {}, "beta"),
        ({"free_mb": [20_000], "health": "unhealthy"}, {"free_mb": [9_000]}, {}, "beta"),
    ],
    ids=[
        "pinned",
        "fits free",
        "fits after eviction",
        "most free",
        "name",
        "enough devices",
        "large devices",
        "draining",
        "unhealthy",
    ],
)
def test_the_best_node_for_a_cold_load(
    alpha: dict[str, Any], beta: dict[str, Any], profile: dict[str, Any], expected: str
) -> None:
    models = Catalogue(
        models=(ModelProfile(id="m", **{"vram_mb": 8_000, **profile}), ModelProfile(id="x", vram_mb=20_000))
    )
    assert loads_on(route(node("alpha", **alpha), node("beta", **beta), catalogue=models)) == expected


def test_the_load_request_carries_the_profile_and_the_best_devices() -> None:
    profile = ModelProfile(id="m", quant="Q4", source="hf2", vram_mb=9_000, min_devices=2)
    decision = route(node(free_mb=[1_000, 6_000, 7_000]), catalogue=Catalogue(models=(profile,)))
    assert isinstance(decision, Load)
    spec = decision.spec
    assert (spec.model_id, spec.quant, spec.tensor_parallel, spec.devices) == ("hf2:m", "Q4", 2, (1, 2))


def test_victims_are_named_in_the_decision() -> None:
    models = Catalogue(models=(ModelProfile(id="m", vram_mb=8_000), ModelProfile(id="a", vram_mb=20_000)))
    decision = route(node(having={"a": "loaded"}, free_mb=[4_000]), catalogue=models)
    assert isinstance(decision, Load) and decision.victims == ("a",)


def test_if_only_pinned_models_are_in_the_way_the_neuron_has_the_last_word() -> None:
    models = Catalogue(
        models=(ModelProfile(id="m", vram_mb=8_000), ModelProfile(id="a", vram_mb=20_000, pinned_on=("alpha",)))
    )
    decision = route(node(having={"a": "loaded"}, free_mb=[4_000]), catalogue=models)
    assert isinstance(decision, Load) and decision.victims == ()


def test_a_model_outside_the_catalogue_comes_back_where_it_was() -> None:
    info = ModelInfo(id="m", harness="candle", devices=(0, 1))
    decision = route(node(unloaded={"m": info}), catalogue=Catalogue())
    assert isinstance(decision, Load)
    assert (decision.spec.model_id, decision.spec.tensor_parallel, decision.spec.devices) == ("m", 2, (0, 1))


# ---------------------------------------------------------------------------------------------- refuse


def refusal(decision: Decision) -> tuple[str, str, int | None]:
    assert isinstance(decision, Refuse), decision
    return decision.kind, decision.code, decision.retry_after


def test_a_model_nobody_knows_is_not_found() -> None:
    assert refusal(route(node(), catalogue=Catalogue())) == ("not_found", "model_not_found", None)


def test_without_any_reachable_node_a_retry_makes_sense() -> None:
    assert refusal(route(node(health="unhealthy"))) == ("overloaded", "service_unavailable", 5)
    assert refusal(route()) == ("overloaded", "service_unavailable", 5)


def test_F23_a_model_whose_node_is_away_is_not_a_404() -> None:
    away = node("alpha", having={"m": "loaded"}, health="unhealthy")
    assert refusal(route(away, node("beta"), catalogue=Catalogue())) == ("overloaded", "service_unavailable", 3)
    pinned = Catalogue(models=(ModelProfile(id="m", pinned_on=("alpha",)),))
    assert refusal(route(away, node("beta"), catalogue=pinned)) == ("overloaded", "service_unavailable", 3)


def test_a_model_no_node_can_run_is_refused_at_once() -> None:
    nowhere = Catalogue(models=(ModelProfile(id="m", pinned_on=("gamma",)),))
    assert refusal(route(node(), catalogue=nowhere)) == ("not_found", "no_feasible_node", None)
    too_large = Catalogue(models=(ModelProfile(id="m", vram_mb=99_000),))
    assert refusal(route(node(), catalogue=too_large)) == ("overloaded", "insufficient_vram", None)


def test_a_failed_model_outside_the_catalogue_says_why() -> None:
    info = ModelInfo(id="m", status="failed", error="no such file")
    decision = route(node(models={"m": info}), catalogue=Catalogue())
    assert refusal(decision) == ("overloaded", "model_load_failed", 10)
    assert isinstance(decision, Refuse) and "no such file" in decision.message


def test_the_snapshot_is_never_changed_by_a_decision() -> None:
    before = fleet(node(having={"a": "loaded"}))
    copy = msgspec.json.encode(before)
    decide("m", msgspec.structs.replace(state(catalogue=IN_CATALOGUE), snapshot=before))
    assert msgspec.json.encode(before) == copy
    assert isinstance(before, FleetSnapshot)


def test_a_server_that_is_no_neuron_serves_what_it_has_and_is_no_place_for_more() -> None:
    # It says nothing of devices, as a neuron that serves from its CPU does: that must not make it one.
    other = node("other", having={"m": "loaded"}, free_mb=[], kind="openai")
    assert route(other) == Forward(node="other")
    assert refusal(route(msgspec.structs.replace(other, models={}))) == ("not_found", "no_feasible_node", None)
    away = msgspec.structs.replace(other, health="unhealthy")
    assert refusal(route(away, node("n", free_mb=[], kind="openai"))) == ("overloaded", "service_unavailable", 3)
    loaded = route(away, node("alpha"))
    assert isinstance(loaded, Load) and loaded.node == "alpha"
    with_room = msgspec.structs.replace(away, health="healthy", models={})
    cold = route(with_room, node("alpha"))
    assert isinstance(cold, Load) and cold.node == "alpha"
    assert fleet(other, node("alpha")).neurons_only().nodes.keys() == {"alpha"}
