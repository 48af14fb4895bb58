"""The life of one model on this neuron, as a pure function: `decide(state, event) -> (state, effects)`.

absent → fetching → loading → loaded → recovering → loaded | failed, and from anywhere → unloading → absent.
An unload never cuts requests: it waits for those in flight, also while their engine is being rebuilt, and is refused
if they take too long; a load that is under way it calls off at once. The last of two orders given while a model
unloads is the one that counts.
Nothing in here does I/O or looks at a clock; `manager` carries out the effects and feeds back what came of them.
Loads and unloads join those in progress: whoever asks is answered by the next `AnswerLoads` / `AnswerUnloads`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec
from cortex_core.errors import ApiError
from cortex_core.fleet import LoadProgress, ModelSpec

Phase = Literal["absent", "fetching", "loading", "loaded", "recovering", "failed", "unloading"]


class ModelState(msgspec.Struct, frozen=True):
    """progress: while fetching, loading or recovering. error: why it failed or recovers.

    fetch_failures: in a row, without a byte fetched between them; failed_at: bytes there were at the last one.
    draining: while unloading waits for requests, what the engine is meanwhile, and the model becomes again if they do
    not end in time. next_spec: a load was asked for while unloading; it begins when that is done.
    """

    phase: Phase = "absent"
    spec: ModelSpec | None = None
    progress: LoadProgress | None = None
    error: str | None = None
    fetch_failures: int = 0
    failed_at: int = 0
    draining: Literal["loaded", "recovering"] | None = None
    next_spec: ModelSpec | None = None


ABSENT = ModelState()

# ---------------------------------------------------------------- events


class LoadRequested(msgspec.Struct, frozen=True):
    """Somebody asks for the model; joins a load that is under way."""

    spec: ModelSpec


class Progressed(msgspec.Struct, frozen=True):
    """Of the fetch or of the engine's load."""

    progress: LoadProgress


class Fetched(msgspec.Struct, frozen=True):
    """The checkpoint is on disk, in the folder `path`."""

    path: Path


class FetchFailed(msgspec.Struct, frozen=True):
    """A retryable error is retried by the machine, as often as `FETCH_RETRY_DELAYS_S` has entries."""

    error: ApiError


class RetryDue(msgspec.Struct, frozen=True):
    """The pause before another try to fetch is over."""


class EngineUp(msgspec.Struct, frozen=True):
    """The engine group is loaded, for the first time or again."""


class EngineDied(msgspec.Struct, frozen=True):
    """A loaded engine ended; the supervisor is already rebuilding it."""

    reason: str


class EngineFailed(msgspec.Struct, frozen=True):
    """The load failed, or the supervisor gave the engine up."""

    error: ApiError


class UnloadRequested(msgspec.Struct, frozen=True):
    """Somebody asks for the model to go."""


class Drained(msgspec.Struct, frozen=True):
    """No request is in flight any more."""


class DrainTimedOut(msgspec.Struct, frozen=True):
    """Requests are still in flight although the time to drain is over."""

    num_in_flight: int


class Stopped(msgspec.Struct, frozen=True):
    """Fetch, engine and processes are gone."""


Event = (
    LoadRequested
    | Progressed
    | Fetched
    | FetchFailed
    | RetryDue
    | EngineUp
    | EngineDied
    | EngineFailed
    | UnloadRequested
    | Drained
    | DrainTimedOut
    | Stopped
)

# ---------------------------------------------------------------- effects


class StartFetch(msgspec.Struct, frozen=True):
    """Bring the checkpoint to disk."""

    spec: ModelSpec


class RetryLater(msgspec.Struct, frozen=True):
    """Report `RetryDue` after `delay_s` seconds."""

    delay_s: float


class StartEngine(msgspec.Struct, frozen=True):
    """Start an engine group from the folder `path`."""

    path: Path


class OpenAdmission(msgspec.Struct, frozen=True):
    """Let requests in."""


class Drain(msgspec.Struct, frozen=True):
    """Close admission and report `Drained` or `DrainTimedOut`."""


class Stop(msgspec.Struct, frozen=True):
    """Call off the fetch, kill the engine, close admission; report `Stopped`."""


class AnswerLoads(msgspec.Struct, frozen=True):
    """Answer everybody who waits for the load: it is done, or `error`."""

    error: ApiError | None = None


class AnswerUnloads(msgspec.Struct, frozen=True):
    """Answer everybody who waits for the unload: it is done, or `error`."""

    error: ApiError | None = None


class Remember(msgspec.Struct, frozen=True):
    """The model is served from now on: a daemon that dies loads it again when it is back."""


class Disown(msgspec.Struct, frozen=True):
    """It was unloaded on request: a daemon that dies now does not bring it back."""


class Forget(msgspec.Struct, frozen=True):
    """The model is absent: nothing of it is kept in memory."""


Effect = (
    StartFetch
    | RetryLater
    | StartEngine
    | OpenAdmission
    | Drain
    | Stop
    | AnswerLoads
    | AnswerUnloads
    | Remember
    | Disown
    | Forget
)

FETCH_RETRY_DELAYS_S = (1.0, 4.0)

Decision = tuple[ModelState, tuple[Effect, ...]]


def decide(state: ModelState, event: Event) -> Decision:
    """The next state and what to do. An event that means nothing in this state changes nothing."""
    if isinstance(event, LoadRequested):
        return _load(state, event.spec)
    if isinstance(event, UnloadRequested):
        return _unload(state)
    if state.phase == "unloading":
        return _unloading(state, event)
    if isinstance(event, Progressed) and state.phase in ("fetching", "loading", "recovering"):
        return msgspec.structs.replace(state, progress=event.progress), ()
    if state.phase == "fetching":
        return _fetching(state, event)
    if state.phase in ("loading", "loaded", "recovering"):
        return _with_engine(state, event)
    return state, ()


def _load(state: ModelState, spec: ModelSpec) -> Decision:
    if state.phase in ("absent", "failed"):
        return _begin(spec)
    if state.phase == "loaded":
        return state, (AnswerLoads(),)
    if state.phase == "unloading":
        return msgspec.structs.replace(state, next_spec=state.next_spec or spec), ()
    return state, ()


def _begin(spec: ModelSpec) -> Decision:
    return ModelState("fetching", spec, LoadProgress("fetching")), (StartFetch(spec),)


def _unload(state: ModelState) -> Decision:
    if state.phase == "absent":
        return state, (AnswerUnloads(_not_here()), Forget())
    if state.phase == "unloading":
        if state.next_spec is None:
            return state, ()
        return msgspec.structs.replace(state, next_spec=None), (AnswerLoads(_called_off()),)
    if state.phase in ("loaded", "recovering"):
        draining = msgspec.structs.replace(state, phase="unloading", draining=state.phase)
        return draining, (Drain(),)
    unloading = ModelState("unloading", state.spec, error=state.error)
    return unloading, (AnswerLoads(_called_off()), Stop())


def _unloading(state: ModelState, event: Event) -> Decision:
    if isinstance(event, Stopped):
        if state.next_spec is not None:
            begun, effects = _begin(state.next_spec)
            return begun, (AnswerUnloads(), *effects)
        return ABSENT, (AnswerUnloads(), Disown(), Forget())
    if state.draining is None:
        return state, ()
    if isinstance(event, Drained | EngineFailed):  # an engine that was given up has no requests left to wait for
        stopping = msgspec.structs.replace(state, draining=None)
        return stopping, (Stop(),) if state.next_spec is not None else (AnswerLoads(_called_off()), Stop())
    if isinstance(event, DrainTimedOut):
        answers: tuple[Effect, ...] = (OpenAdmission(), AnswerUnloads(_busy(event.num_in_flight)))
        if state.draining == "loaded":
            return ModelState("loaded", state.spec), (*answers, AnswerLoads())
        return ModelState("recovering", state.spec, state.progress, state.error), answers
    if isinstance(event, EngineDied):
        return msgspec.structs.replace(state, draining="recovering", error=event.reason), ()
    if isinstance(event, EngineUp):
        return msgspec.structs.replace(state, draining="loaded", error=None, progress=None), ()
    return state, ()


def _fetching(state: ModelState, event: Event) -> Decision:
    assert state.spec is not None
    if isinstance(event, Fetched):
        return ModelState("loading", state.spec, LoadProgress("starting")), (StartEngine(event.path),)
    if isinstance(event, RetryDue):
        return state, (StartFetch(state.spec),)
    if isinstance(event, FetchFailed):
        return _fetch_failed(state, state.spec, event.error)
    return state, ()


def _fetch_failed(state: ModelState, spec: ModelSpec, error: ApiError) -> Decision:
    if not error.is_retryable:
        # What was refused never was a model here: it leaves no trace but the answer.
        return ABSENT, (AnswerLoads(error), Forget())
    num_bytes = state.progress.bytes_done if state.progress is not None else 0
    failures = state.fetch_failures if num_bytes <= state.failed_at else 0
    if failures < len(FETCH_RETRY_DELAYS_S):
        waiting = msgspec.structs.replace(
            state, error=error.message, fetch_failures=failures + 1, failed_at=max(num_bytes, state.failed_at)
        )
        return waiting, (RetryLater(FETCH_RETRY_DELAYS_S[failures]),)
    return ModelState("failed", spec, error=error.message), (AnswerLoads(error),)


def _with_engine(state: ModelState, event: Event) -> Decision:
    if isinstance(event, EngineUp):
        remember = (Remember(),) if state.phase == "loading" else ()
        return ModelState("loaded", state.spec), (*remember, OpenAdmission(), AnswerLoads())
    if isinstance(event, EngineDied):
        recovering = ModelState("recovering", state.spec, LoadProgress("starting"), error=event.reason)
        return recovering, ()
    if isinstance(event, EngineFailed):
        return ModelState("failed", state.spec, error=event.error.message), (AnswerLoads(event.error),)
    return state, ()


# ---------------------------------------------------------------- errors


def _not_here() -> ApiError:
    return ApiError("not_found", "The model is not loaded here.", code="model_not_found", param="model_id")


def _called_off() -> ApiError:
    return ApiError("conflict", "The load was called off by an unload.", code="load_cancelled")


def _busy(num_in_flight: int) -> ApiError:
    noun = "request" if num_in_flight == 1 else "requests"
    return ApiError(
        "conflict",
        f"cannot unload: inference still in flight ({num_in_flight} {noun})",
        code="model_busy",
        retry_after=10,
        extras={"in_flight": num_in_flight},
    )
