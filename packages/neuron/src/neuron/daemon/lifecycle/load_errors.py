"""Errors of loads, for whoever asked; what a preflight finds is in `preflight`."""

from __future__ import annotations

from cortex_core.errors import ApiError

from neuron.checkpoint.preflight import refusal
from neuron.daemon.supervisor.engine_group import GroupFailed

_PERMANENT = ("unsupported_architecture", "bad_checkpoint", "unsupported_parallelism")


def debug_levers_off() -> ApiError:
    return ApiError(
        "permission",
        "`debug` asks for an engine that fails. This neuron was not started with `--debug-levers`.",
        code="debug_levers_off",
        param="debug",
    )


def shutting_down() -> ApiError:
    return ApiError(
        "overloaded", "This neuron is shutting down. Please retry elsewhere.", code="shutting_down", retry_after=15
    )


def load_error(model_id: str, event: GroupFailed) -> ApiError:
    """Why an engine did not come up, for whoever asked for the load."""
    if event.kind in _PERMANENT:
        return refusal(event.kind, f"`{model_id}`: {event.reason}", model_id=model_id)
    if event.kind == "out_of_memory":
        return ApiError(
            "overloaded",
            f"`{model_id}` does not fit into memory: {event.reason}",
            code="insufficient_vram",
            retry_after=5,
            extras={"kind": event.kind, "model_id": model_id},
        )
    return ApiError(
        "internal",
        f"`{model_id}` could not be loaded: {event.reason}",
        code="load_failed",
        extras={"kind": event.kind, "model_id": model_id},
    )
