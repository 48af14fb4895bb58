"""One model: what a request needs of it, why it takes none, and what the outside is told."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from cortex_core.errors import ApiError
from cortex_core.fleet import ModelStatus, Servable
from neuron.daemon.admission.capacity import KVNeed
from neuron.daemon.lifecycle.state_machine import ModelState
from neuron.daemon.memory.memory_fit import Fit
from neuron.daemon.memory.memory_ledger import Promise
from neuron.protocol import EngineStats

from tests.neuron.daemon.lifecycle.harness import LOADED, model


@pytest.mark.parametrize(
    ("phase", "code", "retry_after"),
    [
        ("fetching", "model_loading", 5),
        ("loading", "model_loading", 5),
        ("unloading", "model_unloading", 5),
        ("recovering", "engine_restarting", 7),
        ("failed", "model_failed", 30),
    ],
)
def test_why_a_model_takes_no_requests_is_said_with_when_to_come_back(phase: str, code: str, retry_after: int) -> None:
    error = model(phase, error="no memory").unavailable()
    assert (error.status, error.code, error.retry_after) == (503, code, retry_after)
    assert "`org/name`" in error.message and ("no memory" in error.message) is (phase == "failed")


def test_requests_are_taken_while_an_engine_is_rebuilt_and_not_while_it_leaves() -> None:
    for phase in ("loaded", "recovering"):
        served = model(phase)
        assert served.serving() == (served.text, served.group)
    for phase in ("loading", "unloading", "failed"):
        with pytest.raises(ApiError):
            model(phase).serving()


def test_before_the_first_load_a_request_needs_nothing_that_is_known() -> None:
    assert model("loading").need([(100, 100)], num_choices=1) == KVNeed(0, 0)
    need = model().need([(100, 100)], num_choices=2)
    assert 0 < need.minimum <= need.expected


def test_a_rebuilt_engine_with_another_cache_is_believed() -> None:
    served = model()
    assert served.load().kv_budget_mb == 64
    served.engine_came_up(msgspec.structs.replace(LOADED, num_pages=32))
    assert served.load().kv_budget_mb == 32


def test_what_is_free_is_neither_promised_nor_held() -> None:
    """The smaller of what the desk has left and what the engine says; the desk alone before the first step."""
    assert model().load().kv_available_mb == 64
    assert model(stats=EngineStats(step=1, free_pages=10, total_pages=63)).load().kv_available_mb == 10


def test_rates_are_of_the_time_that_was_worked() -> None:
    stats = EngineStats(prefill_tokens=100, prefill_seconds=0.5, decode_tokens=10, decode_seconds=0.0)
    told = model(stats=stats).load()
    assert (told.tok_s_prefill, told.tok_s_decode) == (200.0, 0.0)


def test_an_engine_that_seems_stuck_is_not_called_healthy() -> None:
    served = model()
    assert served.info().servable.ok
    served.group.stalled = "no step for 61 s"
    assert served.info().servable == Servable(ok=False, reason="engine_stalled", detail="no step for 61 s")
    assert (served.load().status, served.load().error) == ("stalled", "no step for 61 s")
    served.state = ModelState("recovering", error="it died")
    assert (served.load().status, served.load().error) == ("recovering", "it died")
    assert served.info().servable is None, "of a model that is not loaded nothing is said"


def test_a_cache_too_small_for_anything_is_no_service() -> None:
    served = model()
    served.engine_came_up(msgspec.structs.replace(LOADED, num_pages=0))
    assert not served.info().servable.ok


@pytest.mark.parametrize(("phase", "status"), [("absent", "fetching"), ("loaded", "loaded"), ("failed", "failed")])
def test_the_window_and_what_it_can_are_told_when_they_are_known(phase: str, status: ModelStatus) -> None:
    info = model(phase).info()
    assert info.status == status
    if phase == "loaded":
        assert info.limit is not None and info.limit.context == 4096
        assert info.tool_call and not info.reasoning and info.capabilities == ("text",)
    else:
        assert info.limit is None and info.capabilities == () and info.servable is None


@pytest.mark.parametrize(
    ("phase", "stage"), [("loaded", "here"), ("unloading", "leaving"), ("loading", "coming"), ("recovering", "coming")]
)
def test_memory_is_promised_from_the_estimate_to_the_end(phase: str, stage: Any) -> None:
    served = model(phase)
    assert served.promise() is None, "nothing has been estimated"
    config: Any = None
    served.fit = Fit(config, {0: 100}, 4096, 4096)
    promise = served.promise()
    group = () if phase == "loading" else (5, 6)
    assert promise == Promise("org/name", {0: 100}, stage, group, in_flight=0)
    served.state = ModelState("failed")
    assert served.promise() is None
