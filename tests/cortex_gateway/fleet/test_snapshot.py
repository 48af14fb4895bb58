"""What a snapshot says of its nodes and models."""

from __future__ import annotations

import pytest
from cortex_core.fleet import Activation, ModelInfo, ModelSpec, Servable
from cortex_gateway.fleet.snapshot import FleetSnapshot, NodeSnapshot, Operation, Residence

INFO = ModelInfo(id="m", status="loaded")


def node(**fields: object) -> NodeSnapshot:
    return NodeSnapshot("alpha", "http://a", **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({}, None),
        ({"models": {"m": INFO}}, "loaded"),
        ({"models": {"m": INFO}, "operations": {"m": Operation("unload", 1.0)}}, "unloading"),
        ({"operations": {"m": Operation("load", 1.0)}}, "loading"),
        ({"models": {"m": INFO}, "operations": {"other": Operation("unload", 1.0)}}, "loaded"),
        ({"activation": Activation(state="activating", in_progress="m")}, "loading"),
        ({"activation": Activation(state="activating", pending=("m",))}, "loading"),
        ({"activation": Activation(state="activating", pending=("other",))}, None),
        ({"activation": Activation(state="ready", pending=("m",))}, None),
    ],
)
def test_own_operations_come_before_what_is_polled_and_that_before_the_queue(
    fields: dict[str, object], status: str | None
) -> None:
    assert node(**fields).status("m") == status


@pytest.mark.parametrize(
    ("health", "is_routable"),
    [("healthy", True), ("suspect", True), ("unknown", False), ("unhealthy", False), ("refusing", False)],
)
def test_requests_go_where_a_node_is_well_or_only_suspected(health: str, is_routable: bool) -> None:
    assert node(health=health).is_routable is is_routable


def test_a_pin_is_the_neurons_or_kept_for_one_that_cannot() -> None:
    assert node(pins=frozenset({"m"})).is_pinned("m")
    assert node(models={"m": ModelInfo(id="m", status="loaded", pinned=True)}).is_pinned("m")
    assert not node(models={"m": INFO}, pins=frozenset({"other"})).is_pinned("m")


def test_only_a_neuron_that_says_so_cannot_serve_a_model() -> None:
    bad = ModelInfo(id="m", status="loaded", servable=Servable(ok=False, reason="engine_dead"))
    assert not node(models={"m": bad}).is_servable("m")
    assert node(models={"m": INFO}).is_servable("m") and node().is_servable("m")


def test_an_order_is_read_where_every_feature_it_needs_is_known() -> None:
    plain, newer = ModelSpec(model_id="m"), ModelSpec(model_id="m", dtype="float32")
    assert node().reads(plain) and not node().reads(newer)
    assert node(features=frozenset({"load.dtype"})).reads(newer)


def test_how_long_a_load_took_is_known_when_it_has_ended() -> None:
    assert Residence(5.0).load_s == 0.0
    assert Residence(5.0, 8.0).load_s == 3.0


def test_other_servers_serve_and_are_no_place_for_loads() -> None:
    other = NodeSnapshot("other", "http://o", kind="openai", models={"m": INFO})
    fleet = FleetSnapshot({"alpha": node(), "other": other}, 7)
    assert fleet.has_model("m") and not fleet.has_model("n") and not other.can_load
    neurons = fleet.neurons_only()
    assert (list(neurons.nodes), neurons.version) == (["alpha"], 7) and not neurons.has_model("m")
