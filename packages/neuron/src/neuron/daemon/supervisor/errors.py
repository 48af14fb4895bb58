"""Failures of engine groups, and what clients are told of them."""

from __future__ import annotations

from cortex_core.errors import ENDED_ENGINE, ApiError, invalid, request_kills_engine

from neuron.protocol import GrammarSpec, LogitsHealth, SequenceFailed


class EngineLoadError(Exception):
    """A group did not come up. kind: one of `protocol.LoadFailed`, or `died`, `start_timeout`, `stalled`,
    `load_timeout`.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message


def engine_restarting(retry_after: int) -> ApiError:
    """There is no engine, and none will come that could serve the request here."""
    return ApiError(
        "overloaded",
        "The engine of this model is not running on this neuron. Please retry.",
        code="engine_restarting",
        retry_after=retry_after,
    )


def engine_lost(reason: str, retry_after: int, *, ended_engine: str | None) -> ApiError:
    """The engine died and could not be rebuilt. Another neuron may serve the request: gateways know the code as a
    reason to look for one. ended_engine: the last one that ended while it held the request, so that they know when a
    request was the end of two."""
    return ApiError(
        "overloaded",
        f"The engine that was working on this request died and could not be rebuilt: {reason}",
        code="engine_restarting",
        retry_after=retry_after,
        extras={} if ended_engine is None else {ENDED_ENGINE: ended_engine},
    )


def engine_fault(model_id: str, deaths: int, reason: str) -> ApiError:
    """The request is the cause: the engine died whenever it held it, the last time it held nothing else."""
    return request_kills_engine(model_id, deaths, f"The last one held nothing else, and its end was: {reason}")


def engine_stopped() -> ApiError:
    """The group was unloaded or given up while the request was in flight."""
    return ApiError(
        "overloaded",
        "The model was unloaded while this request was in flight.",
        code="model_unloaded",
        retry_after=5,
    )


def sequence_error(failure: SequenceFailed, grammar: GrammarSpec | None = None) -> ApiError:
    """What one sequence's failure means to its client. grammar: that it asked for."""
    if failure.kind == "invalid_grammar":
        message = f"the requested output cannot be constrained: {failure.message}"
        return invalid(message, param=(grammar and grammar.param) or None, code="invalid_schema")
    if failure.kind == "too_long":
        return invalid(failure.message, param="messages", code="context_length_exceeded")
    if failure.kind == "step":
        return ApiError(
            "overloaded",
            f"The request could not be computed with the memory that is free: {failure.message}",
            code="insufficient_memory",
            retry_after=5,
        )
    if failure.kind == "nan_logits":
        return ApiError(
            "internal",
            f"The model produced invalid numbers: {failure.message}",
            code="unhealthy_logits",
            extras={} if failure.health is None else {"logits": _as_dict(failure.health)},
        )
    return ApiError("internal", "The engine failed on this request.", code="engine_error")


def _as_dict(health: LogitsHealth) -> dict[str, float | None]:
    """With names: on the wire between engine and daemon the struct is an array."""
    return {name: getattr(health, name) for name in health.__struct_fields__}
