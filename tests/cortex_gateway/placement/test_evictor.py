"""Who has to go: never the busy, never a higher class, and no more than needed."""

from __future__ import annotations

import msgspec
import pytest
from cortex_core.catalogue import Catalogue, ModelProfile
from cortex_core.fleet import ModelInfo, ModelLoad
from cortex_gateway.configuration.policy import Strategy
from cortex_gateway.fleet.activity import Activity
from cortex_gateway.fleet.snapshot import NodeSnapshot
from cortex_gateway.placement import evictor
from cortex_gateway.placement.evictor import Room, eviction_order, never_fits
from cortex_gateway.placement.state import PlacementState
from hypothesis import given

from .fleets import INCOMING, node, situations, state


def plan_room(
    profile: ModelProfile, snapshot: NodeSnapshot, catalogue: Catalogue, activity: Activity, strategy: Strategy
) -> Room:
    drawn = state(snapshot, catalogue=catalogue, activity=activity, strategy=strategy)
    return evictor.plan_room(profile, snapshot, drawn)


def catalogue(**vram_mb: int) -> Catalogue:
    return Catalogue(models=tuple(ModelProfile(id=model, vram_mb=mb) for model, mb in vram_mb.items()))


def used(*pairs: tuple[str, float]) -> Activity:
    activity = Activity()
    for model, at in pairs:
        activity.begin("alpha", model, at)
        activity.end("alpha", model)
    return activity


@given(situations())
def test_no_victim_is_ever_in_use_pinned_of_a_higher_class_or_anything_but_loaded(drawn: PlacementState) -> None:
    profile = drawn.catalogue.profile(INCOMING)
    assert profile is not None
    alpha = drawn.snapshot.nodes["alpha"]
    for claim in (False, True):
        room = evictor.plan_room(profile, alpha, drawn, claim=claim)
        assert len(set(room.victims)) == len(room.victims)
        for victim in (*room.victims, *eviction_order(alpha, INCOMING, drawn, claim=claim)):
            assert alpha.status(victim) == "loaded"
            assert not alpha.is_pinned(victim)
            assert drawn.catalogue.residency(victim) <= drawn.catalogue.residency(INCOMING)
            assert claim or (drawn.activity.in_flight("alpha", victim) == 0 and victim not in drawn.waiting)
            assert claim or drawn.stays_until(alpha, victim) <= drawn.now
        if not room.fits:
            assert not room.victims


@given(situations())
def test_a_claim_spares_whom_it_can(drawn: PlacementState) -> None:
    alpha = drawn.snapshot.nodes["alpha"]
    free_to_go = eviction_order(alpha, INCOMING, drawn)
    assert eviction_order(alpha, INCOMING, drawn, claim=True)[: len(free_to_go)] == free_to_go


@given(situations())
def test_plans_are_deterministic_and_do_not_depend_on_the_order_of_the_list(drawn: PlacementState) -> None:
    profile = drawn.catalogue.profile(INCOMING)
    assert profile is not None
    alpha = drawn.snapshot.nodes["alpha"]
    turned = msgspec.structs.replace(alpha, models=dict(reversed(alpha.models.items())))
    assert evictor.plan_room(profile, alpha, drawn) == evictor.plan_room(profile, turned, drawn)


@given(situations())
def test_no_victim_is_superfluous(drawn: PlacementState) -> None:
    profile = drawn.catalogue.profile(INCOMING)
    assert profile is not None
    alpha = drawn.snapshot.nodes["alpha"]
    room = evictor.plan_room(profile, alpha, drawn)
    for spared in room.victims:
        # As if no other and not the spared one could go: the rest alone must not have been enough.
        busy = Activity()
        for model in alpha.models:
            if model == spared or model not in room.victims:
                busy.begin("alpha", model, 0.0)
        assert not evictor.plan_room(profile, alpha, msgspec.structs.replace(drawn, activity=busy)).fits


def test_what_fits_displaces_nobody() -> None:
    room = plan_room(
        ModelProfile(id="new", vram_mb=20_000),
        node(having={"a": "loaded"}, free_mb=[20_000]),
        catalogue(a=4_000),
        Activity(),
        "lru",
    )
    assert (room.fits, room.victims, room.devices) == (True, (), (0,))


def test_lru_takes_the_least_recently_used_and_never_used_ones_first() -> None:
    snapshot = node(having={"a": "loaded", "b": "loaded", "c": "loaded"}, free_mb=[0])
    sizes = catalogue(a=8_000, b=8_000, c=8_000)
    profile = ModelProfile(id="new", vram_mb=8_000)
    assert plan_room(profile, snapshot, sizes, used(("a", 2), ("b", 1), ("c", 3)), "lru").victims == ("b",)
    assert plan_room(profile, snapshot, sizes, used(("a", 2), ("b", 1)), "lru").victims == ("c",)
    big = ModelProfile(id="new", vram_mb=16_000)
    assert plan_room(big, snapshot, sizes, used(("a", 2), ("b", 1), ("c", 3)), "lru").victims == ("b", "a")


def test_ties_are_broken_by_name() -> None:
    snapshot = node(having={"b": "loaded", "a": "loaded"}, free_mb=[0])
    assert plan_room(ModelProfile(id="new", vram_mb=1), snapshot, catalogue(a=5, b=5), Activity(), "lru").victims == (
        "a",
    )


def test_priority_empties_the_lowest_class_first() -> None:
    models = Catalogue(
        models=(
            ModelProfile(id="low", vram_mb=8_000, residency_priority=10),
            ModelProfile(id="same", vram_mb=8_000, residency_priority=100),
        )
    )
    snapshot = node(having={"low": "loaded", "same": "loaded"}, free_mb=[0])
    recent = used(("same", 1), ("low", 2))
    profile = ModelProfile(id="new", vram_mb=8_000)
    assert plan_room(profile, snapshot, models, recent, "lru").victims == ("same",)
    assert plan_room(profile, snapshot, models, recent, "priority").victims == ("low",)


def test_a_pinned_model_is_not_displaced_by_an_ordinary_one() -> None:
    models = Catalogue(models=(ModelProfile(id="pinned", vram_mb=20_000, pinned_on=("alpha",)),))
    room = plan_room(
        ModelProfile(id="new", vram_mb=8_000), node(having={"pinned": "loaded"}, free_mb=[0]), models, Activity(), "lru"
    )
    assert (room.fits, room.victims, room.fits_later) == (False, (), False)


def test_G3_equal_rank_may_displace_both_ways() -> None:
    sizes = catalogue(a=20_000, b=20_000)
    for resident, incoming in (("a", "b"), ("b", "a")):
        profile = sizes.profile(incoming)
        assert profile is not None
        room = plan_room(profile, node(having={resident: "loaded"}, free_mb=[4_000]), sizes, Activity(), "lru")
        assert room.victims == (resident,)


@pytest.mark.parametrize("is_own", [True, False])
def test_a_busy_model_is_waited_for_whoever_keeps_it_busy(is_own: bool) -> None:
    activity = Activity()
    loads = {}
    if is_own:
        activity.begin("alpha", "a", 0.0)
    else:
        loads = {"a": ModelLoad(id="a", in_flight=1)}
    snapshot = node(having={"a": "loaded"}, free_mb=[0], loads=loads)
    room = plan_room(ModelProfile(id="new", vram_mb=8_000), snapshot, catalogue(a=8_000), activity, "lru")
    assert (room.fits, room.fits_later) == (False, True)


def test_G2_a_neurons_figure_wins_and_the_catalogues_stands_in() -> None:
    profile = ModelProfile(id="new", vram_mb=10_000)
    snapshot = node(having={"a": "loaded"}, free_mb=[0])
    assert plan_room(profile, snapshot, catalogue(a=10_000), Activity(), "lru").fits
    info = ModelInfo(id="a", status="loaded", devices=(0,), vram_used_mb=9_000)
    measured = msgspec.structs.replace(snapshot, models={"a": info})
    assert not plan_room(profile, measured, catalogue(a=10_000), Activity(), "lru").fits


def test_room_that_a_load_under_way_will_take_is_not_given_away_twice() -> None:
    snapshot = node(having={"arriving": "loading"}, free_mb=[20_000])
    room = plan_room(ModelProfile(id="new", vram_mb=8_000), snapshot, catalogue(arriving=16_000), Activity(), "lru")
    assert not room.fits and room.fits_later


def test_the_emptiest_devices_are_chosen_and_tensor_parallel_models_get_several() -> None:
    snapshot = node(free_mb=[5_000, 20_000, 15_000])
    room = plan_room(ModelProfile(id="new", vram_mb=18_000), snapshot, Catalogue(), Activity(), "lru")
    assert (room.fits, room.devices) == (True, (1,))
    room = plan_room(ModelProfile(id="new", vram_mb=30_000, min_devices=2), snapshot, Catalogue(), Activity(), "lru")
    assert (room.fits, room.devices) == (True, (1, 2))


def test_a_host_without_devices_counts_its_memory_as_one() -> None:
    snapshot = node(free_mb=[], memory_free_mb=4_000)
    assert plan_room(ModelProfile(id="new", vram_mb=3_000), snapshot, Catalogue(), Activity(), "lru").devices is None
    assert not plan_room(ModelProfile(id="new", vram_mb=5_000), snapshot, Catalogue(), Activity(), "lru").fits


def test_without_an_estimate_the_neuron_decides() -> None:
    room = plan_room(ModelProfile(id="new"), node(having={"a": "loaded"}, free_mb=[0]), Catalogue(), Activity(), "lru")
    assert (room.fits, room.victims) == (True, ())


def test_what_is_larger_than_the_devices_never_fits() -> None:
    assert never_fits(ModelProfile(id="new", vram_mb=25_000), node(total_mb=[24_000]))
    assert not never_fits(ModelProfile(id="new", vram_mb=25_000, min_devices=2), node(free_mb=[1, 1]))
    assert not never_fits(ModelProfile(id="new"), node())
