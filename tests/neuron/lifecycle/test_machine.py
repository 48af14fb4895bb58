"""The lifecycle as a table, and what holds whatever happens."""

from __future__ import annotations

from pathlib import Path

import pytest
from cortex_core.errors import ApiError
from cortex_core.fleet import LoadProgress, ModelSpec
from hypothesis import given
from hypothesis import strategies as st
from neuron.lifecycle import machine
from neuron.lifecycle.machine import (
    ABSENT,
    AnswerLoads,
    AnswerUnloads,
    Drain,
    Drained,
    DrainTimedOut,
    Effect,
    EngineDied,
    EngineFailed,
    EngineUp,
    Event,
    Fetched,
    FetchFailed,
    Forget,
    LoadRequested,
    ModelState,
    OpenAdmission,
    Progressed,
    RetryDue,
    RetryLater,
    StartEngine,
    StartFetch,
    Stop,
    Stopped,
    UnloadRequested,
    decide,
)

SPEC = ModelSpec("acme/model")
FOLDER = Path("/checkpoint")
REFUSED = ApiError("invalid_request", "no such repository", code="repo_fetch_failed", status=422)
OFFLINE = ApiError("overloaded", "no network", code="repo_fetch_failed", retry_after=10)
BROKEN = ApiError("internal", "broken", code="load_failed")

LOAD, UNLOAD = LoadRequested(SPEC), UnloadRequested()


def run(*events: Event) -> tuple[ModelState, list[Effect]]:
    """The state after `events` from absent, and the effects of the last of them."""
    state, effects = ABSENT, ()
    for event in events:
        state, effects = decide(state, event)
    return state, list(effects)


UP = (LOAD, Fetched(FOLDER), EngineUp())


def test_the_way_up() -> None:
    assert run(LOAD)[1] == [StartFetch(SPEC)]
    state, effects = run(LOAD, Fetched(FOLDER))
    assert state.phase == "loading" and effects == [StartEngine(FOLDER)]
    state, effects = run(*UP)
    assert state.phase == "loaded" and effects == [OpenAdmission(), AnswerLoads()]


def test_progress_is_visible_while_it_moves() -> None:
    progress = LoadProgress("weights", 5, 10)
    assert run(LOAD, Progressed(progress))[0].progress == progress
    assert run(LOAD, Fetched(FOLDER), Progressed(progress))[0].progress == progress
    assert run(*UP, Progressed(progress))[0].progress is None
    assert run(*UP, EngineDied("x"), Progressed(progress))[0].progress == progress


def test_a_second_load_joins_the_first() -> None:
    for way in ((LOAD,), (LOAD, Fetched(FOLDER)), (*UP, EngineDied("x"))):
        before, _ = run(*way)
        assert decide(before, LOAD) == (before, ())
    assert run(*UP, LOAD)[1] == [AnswerLoads()]


def test_a_refusal_leaves_no_trace() -> None:
    state, effects = run(LOAD, FetchFailed(REFUSED))
    assert state == ABSENT and effects == [AnswerLoads(REFUSED), Forget()]


def test_a_fetch_that_may_succeed_later_is_retried_and_then_failed() -> None:
    way: tuple[Event, ...] = (LOAD,)
    for delay in machine.FETCH_RETRY_DELAYS_S:
        state, effects = run(*way, FetchFailed(OFFLINE))
        assert state.phase == "fetching" and state.error == "no network" and effects == [RetryLater(delay)]
        way = (*way, FetchFailed(OFFLINE), RetryDue())
        assert run(*way)[1] == [StartFetch(SPEC)]
    state, effects = run(*way, FetchFailed(OFFLINE))
    assert state.phase == "failed" and effects == [AnswerLoads(OFFLINE)]


def test_a_failed_load_says_why_and_can_be_tried_again() -> None:
    failed, effects = run(LOAD, Fetched(FOLDER), EngineFailed(BROKEN))
    assert failed.phase == "failed" and failed.error == "broken" and effects == [AnswerLoads(BROKEN)]
    again, effects = decide(failed, LOAD)
    assert again.phase == "fetching" and again.error is None and list(effects) == [StartFetch(SPEC)]


def test_an_engine_that_dies_recovers_or_is_given_up() -> None:
    state, effects = run(*UP, EngineDied("killed"))
    assert state.phase == "recovering" and state.error == "killed" and effects == []
    assert run(*UP, EngineDied("killed"), EngineUp())[0] == ModelState("loaded", SPEC)
    assert run(*UP, EngineDied("killed"), EngineFailed(BROKEN))[0].phase == "failed"


def test_unloading_waits_for_requests_and_then_stops() -> None:
    state, effects = run(*UP, UNLOAD)
    assert state.phase == "unloading" and effects == [Drain()]
    assert run(*UP, UNLOAD, Drained())[1] == [Stop()]
    state, effects = run(*UP, UNLOAD, Drained(), Stopped())
    assert state == ABSENT and effects == [AnswerUnloads(), Forget()]


def test_an_unload_that_would_cut_requests_is_refused() -> None:
    state, effects = run(*UP, UNLOAD, DrainTimedOut(3))
    assert state == ModelState("loaded", SPEC)
    assert effects[0] == OpenAdmission()
    refusal = effects[1]
    assert isinstance(refusal, AnswerUnloads) and refusal.error is not None
    assert refusal.error.status == 409 and "inference still in flight (3 requests)" in refusal.error.message


@pytest.mark.parametrize("way", [(LOAD,), (LOAD, Fetched(FOLDER)), (*UP, EngineDied("x"))])
def test_what_is_not_serving_is_unloaded_at_once(way: tuple[Event, ...]) -> None:
    state, effects = run(*way, UNLOAD)
    assert state.phase == "unloading" and effects[-1] == Stop()
    answer = effects[0]
    assert isinstance(answer, AnswerLoads) and answer.error is not None and answer.error.code == "load_cancelled"


def test_a_load_during_an_unload_begins_when_that_is_done() -> None:
    state, effects = run(*UP, UNLOAD, LOAD)
    assert state.phase == "unloading" and effects == []
    state, effects = run(*UP, UNLOAD, LOAD, Drained(), Stopped())
    assert state.phase == "fetching" and effects == [AnswerUnloads(), StartFetch(SPEC)]


def test_unloading_what_is_not_here_is_answered() -> None:
    state, effects = run(UNLOAD)
    assert state == ABSENT and isinstance(effects[0], AnswerUnloads)
    assert effects[0].error is not None and effects[0].error.status == 404


EVENTS = st.sampled_from(
    [
        LOAD,
        UNLOAD,
        Progressed(LoadProgress("weights", 1, 2)),
        Fetched(FOLDER),
        FetchFailed(REFUSED),
        FetchFailed(OFFLINE),
        RetryDue(),
        EngineUp(),
        EngineDied("x"),
        EngineFailed(BROKEN),
        Drained(),
        DrainTimedOut(1),
        Stopped(),
    ]
)


@given(st.lists(EVENTS, max_size=40))
def test_whoever_asks_is_answered_and_no_engine_outlives_its_model(events: list[Event]) -> None:
    state = ABSENT
    loads_waiting = unloads_waiting = False
    engine = False
    for event in events:
        loads_waiting |= event == LOAD
        unloads_waiting |= event == UNLOAD
        state, effects = decide(state, event)
        for effect in effects:
            if isinstance(effect, AnswerLoads):
                loads_waiting = False
            elif isinstance(effect, AnswerUnloads):
                unloads_waiting = False
            elif isinstance(effect, StartEngine):
                engine = True
            elif isinstance(effect, Stop):
                engine = False
            elif isinstance(effect, Forget):
                assert not engine or state != ABSENT
    if loads_waiting:
        assert state.phase in ("fetching", "loading", "recovering") or state.next_spec is not None
    if unloads_waiting:
        assert state.phase == "unloading"
    if state == ABSENT:
        assert not engine
