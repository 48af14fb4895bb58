"""Attributes of an inference request's spans, where traces are on: only then is there a `request.trace`."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from cortex_core.errors import ApiError
from multidict import CIMultiDict

from cortex_gateway.fleet.openai_server import OpenAIServer
from cortex_gateway.http.body import ClientGone
from cortex_gateway.relay.retries import BrokenStream, StaleRoute, Unanswered
from cortex_gateway.translation.answer_stream import Usage

if TYPE_CHECKING:
    from cortex_gateway.observability.tracing import RequestTrace
    from cortex_gateway.placement.placement import Lease
    from cortex_gateway.relay.request_state import RequestState

OPERATIONS = {
    "chat_completions": "chat",
    "messages": "chat",
    "responses": "chat",
    "completions": "text_completion",
}
"""Surfaces by OpenTelemetry's names of operations. The others generate nothing."""

_FINE = ("ok", "client_gone")


def begin_attempt(
    trace: RequestTrace, request: RequestState, lease: Lease, path: str, headers: CIMultiDict[str]
) -> None:
    operation = OPERATIONS.get(request.surface.name, request.surface.name)
    trace.attempt(
        f"{operation} {lease.model}",
        lease.neuron.url(path),
        headers,
        {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "openai" if isinstance(lease.neuron, OpenAIServer) else "cortex",
            "gen_ai.request.model": lease.neuron_model,
            "gen_ai.request.stream": request.is_stream,
            "http.request.resend_count": request.num_attempts - 1 or None,
            "cortex.node": lease.neuron.name,
            "cortex.route": lease.route,
            "cortex.resume": request.num_resumes > 0 or None,
        },
    )


def end_attempt(trace: RequestTrace, request: RequestState, raised: BaseException | None) -> None:
    trace.attempt_ended(_fault(request, raised), first_byte_at=request.first_byte_at)


def _fault(request: RequestState, raised: BaseException | None) -> str | None:
    """A client that left is no fault of the node."""
    if isinstance(raised, asyncio.CancelledError) and request.interruption is not None:
        raised = request.interruption
    match raised:
        case None | ClientGone():
            return None
        case BrokenStream():
            return "broken_stream"
        case StaleRoute():
            return "stale_route"
        case Unanswered():
            return "stale_route" if request.stream is None else "broken_stream"
        case ApiError():
            return raised.code or raised.kind
        case _:
            return type(raised).__name__


def end_trace(trace: RequestTrace, request: RequestState, usage: Usage, *, ttft_s: float | None, now: float) -> None:
    """An error that the client made (4xx) is none of the server's span, by the conventions for HTTP."""
    principal, translation = request.principal, request.translation
    is_ours = request.outcome not in _FINE and not 400 <= request.status < 500
    trace.end(
        {
            "http.response.status_code": request.status or None,
            "gen_ai.operation.name": OPERATIONS.get(request.surface.name, request.surface.name),
            "gen_ai.provider.name": "cortex",
            "gen_ai.request.model": request.model,
            "gen_ai.request.stream": request.is_stream,
            "gen_ai.response.model": request.resolved if request.first_byte_at is not None else None,
            "gen_ai.response.finish_reasons": usage.finish,
            "gen_ai.response.time_to_first_chunk": ttft_s,
            "gen_ai.usage.input_tokens": usage.prompt_tokens,
            "gen_ai.usage.output_tokens": usage.completion_tokens,
            "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
            "cortex.request_id": request.request_id,
            "cortex.outcome": request.outcome,
            "cortex.node": request.node,
            "cortex.route": request.route,
            "cortex.attempts": request.num_attempts,
            "cortex.resumes": request.num_resumes or None,
            "cortex.translated": translation.label if translation is not None else None,
            "cortex.key": principal.key_id if principal is not None else None,
            "cortex.account": principal.account_id if principal is not None else None,
        },
        error_type=_error_type(request) if is_ours else None,
        # What a neuron answered may quote what it was asked.
        error=request.error if request.outcome != "upstream_error" else None,
        now=now,
    )


def _error_type(request: RequestState) -> str:
    """A word out of few: an error's code, or the status where it is not one of the gateway's own."""
    if request.outcome == "upstream_error":
        return str(request.status)
    if request.error is None or request.outcome == "error":
        return request.outcome
    return request.error.partition(":")[0]
