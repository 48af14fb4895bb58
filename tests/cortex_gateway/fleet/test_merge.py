"""One list of models out of catalogue, neurons, activation and aliases."""

from __future__ import annotations

from cortex_core.catalogue import Catalogue, ModelProfile
from cortex_core.dialects.models import ModelEntry
from cortex_core.fleet import (
    Activation,
    ContextLimit,
    DiscoveryResponse,
    LoadProgress,
    ModelCost,
    ModelInfo,
)
from cortex_gateway.fleet.merge import dead_aliases, merge_models
from cortex_gateway.fleet.snapshot import FleetSnapshot, NodeSnapshot


def node(name: str, *infos: ModelInfo, **fields: object) -> NodeSnapshot:
    defaults = {"health": "healthy", "models": {info.id: info for info in infos}, "discovery": DiscoveryResponse()}
    return NodeSnapshot(name=name, endpoint="http://x", **{**defaults, **fields})  # type: ignore[arg-type]


def merged(catalogue: Catalogue, *nodes: NodeSnapshot) -> dict[str, ModelEntry]:
    entries = merge_models(FleetSnapshot(nodes={each.name: each for each in nodes}), catalogue, created=7)
    assert [entry.id for entry in entries] == sorted(entry.id for entry in entries)
    return {entry.id: entry for entry in entries}


def test_a_model_of_the_catalogue_is_listed_before_anything_is_loaded() -> None:
    profile = ModelProfile(id="m", capabilities=("text", "vision"), cost=ModelCost(input=1.0), pinned_on=("alpha",))
    entry = merged(Catalogue(models=(profile,)), node("alpha"), node("beta"))["m"]
    assert (entry.loaded, entry.feasible_on, entry.locations) == (False, ("alpha",), ())
    assert (entry.modalities, entry.cost, entry.created) == (("text", "vision"), ModelCost(input=1.0), 7)


def test_what_neurons_say_is_united_and_the_smallest_window_holds() -> None:
    entry = merged(
        Catalogue(models=(ModelProfile(id="m", capabilities=("audio",), vram_mb=9),)),
        node("alpha", ModelInfo(id="m", capabilities=("text",), limit=ContextLimit(context=8192), tool_call=True)),
        node("beta", ModelInfo(id="m", capabilities=("vision",), limit=ContextLimit(context=4096), created=3)),
    )["m"]
    assert (entry.loaded, entry.modalities, entry.tool_call, entry.reasoning) == (True, ("text", "vision"), True, False)
    assert entry.limit == ContextLimit(context=4096)
    assert entry.created == 3
    assert entry.locations is not None
    assert [(place.node, place.status, place.vram_estimate_mb) for place in entry.locations] == [
        ("alpha", "loaded", 9),
        ("beta", "loaded", 9),
    ]


def test_progress_is_shown_where_a_model_is_on_its_way() -> None:
    progress = LoadProgress(phase="fetching", bytes_done=1, bytes_total=2)
    entry = merged(Catalogue(), node("alpha", ModelInfo(id="m", status="fetching", progress=progress)))["m"]
    assert entry.locations is not None
    assert (entry.loaded, entry.locations[0].status, entry.locations[0].progress) == (False, "fetching", progress)


def test_what_a_neuron_is_about_to_load_is_listed_once() -> None:
    warming = Activation(state="pre_warming", in_progress="a", pending=("b",))
    entries = merged(Catalogue(), node("alpha", ModelInfo(id="a", status="loading"), activation=warming))
    assert {model: [place.status for place in entry.locations or ()] for model, entry in entries.items()} == {
        "a": ["loading"],
        "b": ["loading"],
    }


def test_aliases_are_listed_under_their_own_name_and_dead_and_wildcard_ones_are_not() -> None:
    catalogue = Catalogue(models=(ModelProfile(id="m"),), aliases={"fast": "m", "gone": "nowhere", "claude-*": "m"})
    entries = merged(catalogue, node("alpha", ModelInfo(id="m")))
    assert sorted(entries) == ["fast", "m"]
    assert entries["fast"].loaded and entries["fast"].display_name == "fast"
    assert dead_aliases(FleetSnapshot(), catalogue) == ["gone"]


def test_a_dead_node_hides_nothing_and_serves_nothing() -> None:
    entry = merged(Catalogue(), node("alpha", ModelInfo(id="m"), health="unhealthy"))["m"]
    assert (entry.loaded, entry.locations) == (False, ())
