"""The lifecycle as a table. What holds whatever happens is in `test_accounting.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
from cortex_core.errors import ApiError
from cortex_core.fleet import LoadProgress, ModelSpec
from neuron.daemon.lifecycle import state_machine
from neuron.daemon.lifecycle.state_machine import (
    ABSENT,
    AnswerLoads,
    AnswerUnloads,
    Disown,
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
    Remember,
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
    assert state.phase == "loaded" and effects == [Remember(), OpenAdmission(), AnswerLoads()]


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
    for delay in state_machine.FETCH_RETRY_DELAYS_S:
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
    state, effects = run(*UP, EngineDied("killed"), EngineUp())
    assert state == ModelState("loaded", SPEC) and Remember() not in effects
    assert run(*UP, EngineDied("killed"), EngineFailed(BROKEN))[0].phase == "failed"


def test_unloading_waits_for_requests_and_then_stops() -> None:
    state, effects = run(*UP, UNLOAD)
    assert state.phase == "unloading" and effects == [Drain()]
    assert run(*UP, UNLOAD, Drained())[1][-1] == Stop()
    state, effects = run(*UP, UNLOAD, Drained(), Stopped())
    assert state == ABSENT and effects == [AnswerUnloads(), Disown(), Forget()]


def test_an_unload_that_would_cut_requests_is_refused() -> None:
    state, effects = run(*UP, UNLOAD, DrainTimedOut(3))
    assert state == ModelState("loaded", SPEC)
    assert effects[0] == OpenAdmission()
    refusal = effects[1]
    assert isinstance(refusal, AnswerUnloads) and refusal.error is not None
    assert refusal.error.status == 409 and "inference still in flight (3 requests)" in refusal.error.message


@pytest.mark.parametrize("way", [(LOAD,), (LOAD, Fetched(FOLDER))])
def test_an_unload_calls_a_load_off(way: tuple[Event, ...]) -> None:
    state, effects = run(*way, UNLOAD)
    assert state.phase == "unloading" and effects[-1] == Stop()
    answer = effects[0]
    assert isinstance(answer, AnswerLoads) and answer.error is not None and answer.error.code == "load_cancelled"


def test_an_unload_during_a_recovery_waits_for_the_requests_that_will_go_on() -> None:
    state, effects = run(*UP, EngineDied("killed"), UNLOAD)
    assert state.phase == "unloading" and effects == [Drain()]
    assert run(*UP, EngineDied("killed"), UNLOAD, EngineUp(), Drained())[1][-1] == Stop()
    state, effects = run(*UP, EngineDied("killed"), UNLOAD, DrainTimedOut(1))
    assert state.phase == "recovering" and state.error == "killed"
    assert AnswerLoads() not in effects, "it is not loaded yet"
    state, effects = run(*UP, EngineDied("killed"), UNLOAD, EngineUp(), DrainTimedOut(1))
    assert state == ModelState("loaded", SPEC) and AnswerLoads() in effects


def test_an_engine_that_dies_while_its_model_waits_to_unload() -> None:
    state, _ = run(*UP, UNLOAD, EngineDied("killed"))
    assert state.phase == "unloading"
    assert run(*UP, UNLOAD, EngineDied("killed"), DrainTimedOut(1))[0].phase == "recovering"
    assert run(*UP, UNLOAD, EngineFailed(BROKEN))[1][-1] == Stop(), "no request is left to wait for"


def test_the_last_of_two_orders_counts() -> None:
    state, effects = run(*UP, UNLOAD, LOAD, UNLOAD)
    assert state.phase == "unloading" and state.next_spec is None
    (answer,) = effects
    assert isinstance(answer, AnswerLoads) and answer.error is not None and answer.error.code == "load_cancelled"
    assert run(*UP, UNLOAD, LOAD, UNLOAD, Drained(), Stopped())[0] == ABSENT
    assert run(*UP, UNLOAD, LOAD, UNLOAD, LOAD, Drained(), Stopped())[0].phase == "fetching"


def test_a_fetch_that_gets_on_between_failures_is_not_given_up() -> None:
    way: tuple[Event, ...] = (LOAD,)
    for part in range(1, 9):
        way = (*way, Progressed(LoadProgress("fetching", part, 10)), FetchFailed(OFFLINE))
        assert run(*way)[1] == [RetryLater(state_machine.FETCH_RETRY_DELAYS_S[0])]
        way = (*way, RetryDue())
    for _ in range(len(state_machine.FETCH_RETRY_DELAYS_S) - 1):
        way = (*way, FetchFailed(OFFLINE), RetryDue())
    assert run(*way, FetchFailed(OFFLINE))[0].phase == "failed"


def test_only_an_unload_takes_a_model_off_the_list_of_what_is_served() -> None:
    assert Disown() in run(*UP, EngineFailed(BROKEN), UNLOAD, Stopped())[1]
    for way in ((LOAD, FetchFailed(REFUSED)), (*UP, EngineDied("x"), EngineFailed(BROKEN)), (UNLOAD,)):
        assert Disown() not in run(*way)[1]
    assert Disown() not in run(*UP, UNLOAD, LOAD, Drained(), Stopped())[1]


def test_a_load_during_an_unload_begins_when_that_is_done() -> None:
    state, effects = run(*UP, UNLOAD, LOAD)
    assert state.phase == "unloading" and effects == []
    state, effects = run(*UP, UNLOAD, LOAD, Drained(), Stopped())
    assert state.phase == "fetching" and effects == [AnswerUnloads(), StartFetch(SPEC)]


def test_unloading_what_is_not_here_is_answered() -> None:
    state, effects = run(UNLOAD)
    assert state == ABSENT and isinstance(effects[0], AnswerUnloads)
    assert effects[0].error is not None and effects[0].error.status == 404
