"""Why a request waits or is refused, in words and in figures."""

from __future__ import annotations

from typing import Any

import msgspec
from cortex_core.catalogue import Catalogue, ModelProfile
from cortex_core.fleet import ModelInfo
from cortex_gateway.fleet.activity import Activity
from cortex_gateway.fleet.snapshot import NodeSnapshot, Operation, Residence
from cortex_gateway.placement.decision import Hold, Refuse
from cortex_gateway.placement.evictor import account
from cortex_gateway.placement.explanation import explain
from cortex_gateway.placement.router import decide
from cortex_gateway.placement.state import PlacementState
from hypothesis import given

from tests.cortex_gateway.placement.harness import SIZES, decided, shortage

from .fleets import INCOMING, node, situations, state


@given(situations())
def test_O1_every_wait_has_words_and_every_account_adds_up(drawn: PlacementState) -> None:
    for model in (INCOMING, "org/m0", "org/m1"):
        decision = decide(model, drawn)
        if isinstance(decision, Hold):
            wait = explain(model, decision, drawn)
            assert wait.node == decision.node and len(wait.text) > 5 and wait.text.isprintable()
        for each in drawn.snapshot.nodes.values():
            found = account(model, each, drawn)
            if found is not None:
                figures = (found.free_mb, found.displaceable_mb, found.kept_mb, found.others_mb)
                assert min(figures) >= 0
                assert all(each.status(kept) not in ("failed", "unloaded", None) for kept in found.kept)


def test_O1_a_refusal_for_lack_of_memory_that_others_hold_is_told_with_its_numbers() -> None:
    failed = node(having={"b": "loaded"}, free_mb=[4_000], load_failures={"m": shortage(20_000, 4_000)})
    refused = decided(failed)
    assert isinstance(refused, Refuse)
    assert (refused.code, refused.retry_after) == ("insufficient_vram", 100)
    assert refused.extras == {
        "node": "alpha",
        "needed_mb": 20_000,
        "free_mb": 4_000,
        "displaceable_mb": 4_000,
        "kept_mb": 0,
        "others_mb": 16_000,
        "kept": (),
    }
    for number in ("20000 MB are needed", "4000 MB are free", "16000 MB by others"):
        assert number in refused.message


def test_O1_kept_models_are_named() -> None:
    kept = Catalogue(models=(*SIZES.models, ModelProfile(id="p", vram_mb=10_000, pinned_on=("alpha",))))
    failed = node(having={"p": "loaded"}, free_mb=[4_000], load_failures={"m": shortage(20_000, 4_000)})
    refused = decided(failed, catalogue=kept)
    assert isinstance(refused, Refuse)
    assert (refused.extras["kept_mb"], refused.extras["kept"], refused.extras["others_mb"]) == (10_000, ("p",), 10_000)


def test_O1_what_is_told() -> None:
    def told(snapshot: NodeSnapshot, model: str = "m", **fields: Any) -> str:
        drawn = state(snapshot, catalogue=SIZES, **fields)
        hold = decide(model, drawn)
        assert isinstance(hold, Hold), hold
        return explain(model, hold, drawn).text

    busy = Activity()
    busy.begin("alpha", "a", 99.0)
    full = node(having={"a": "loaded"}, free_mb=[6_000])
    memory = "20000 MB are needed, 6000 MB are free, 16000 MB are held by models that may be displaced"
    assert f"a (1 request at work); {memory}" in told(full, activity=busy)
    new = msgspec.structs.replace(full, polled_at=95.0, residences={"a": Residence(begun=70.0, since=90.0)})
    assert "a (new, stays for 10 s)" in told(new)
    assert told(node(having={"m": "loading"})) == "its load on alpha"
    failing = ModelInfo(id="m", status="recovering", error="killed by signal 9")
    assert "being rebuilt: killed by signal 9" in told(node(models={"m": failing}))
    assert "unload from alpha" in told(node(having={"m": "loaded"}, operations={"m": Operation("unload", 0.0)}))
    assert "which b has waited for longer" in told(
        node(having={"a": "loaded"}, free_mb=[2_000]), waiting={"b": 80.0, "m": 90.0}
    )
    claimed = told(full, model="a", activity=busy, waiting={"m": 60.0})
    assert claimed == "its next turn on alpha, where m comes first"
    assert "has not said yet" in told(node(health="unknown", discovery=None, models={}))
