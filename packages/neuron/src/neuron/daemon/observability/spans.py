"""Spans of the neuron's requests, by the conventions of OpenTelemetry for HTTP and for generative AI.

Only imported where traces are on. A request's spans are made at its end, of times that were taken for its log line
anyway: the request itself, and below it the wait for its seat, prefill and decode. No text of a prompt or an answer
goes into any of them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from cortex_core.trace_context import TraceContext
from opentelemetry.context import Context
from opentelemetry.trace import (
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    StatusCode,
    TraceFlags,
    Tracer,
    set_span_in_context,
)
from opentelemetry.util.types import AttributeValue

if TYPE_CHECKING:
    from neuron.daemon.observability.request_record import RequestRecord

OPERATIONS = {"completion": "text_completion"}
"""Routes by the convention's names of operations; all others chat."""

Attributes = Mapping[str, AttributeValue | None]


class RequestSpans:
    """Spans of requests, recorded when these have ended."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def record(self, record: RequestRecord, outcome: str, *, status: int | None, total_s: float) -> str:
        """The spans of a request that has ended just now. Returns the id of their trace."""
        ended_ns = time.time_ns()
        began_ns = ended_ns - int(total_s * 1e9)
        server = self._tracer.start_span(
            f"POST {record.path}",
            context=_context_of(record.trace),
            kind=SpanKind.SERVER,
            start_time=began_ns,
            attributes=_known(_attributes(record, outcome, status)),
        )
        if outcome not in ("ok", "client_gone") and not 400 <= (status or 500) < 500:
            server.set_attribute("error.type", outcome)
            server.set_status(StatusCode.ERROR)
        if server.is_recording():
            self._phases(server, record, began_ns, total_s)
        server.end(ended_ns)
        return format(server.get_span_context().trace_id, "032x")

    def _phases(self, server: Span, record: RequestRecord, began_ns: int, total_s: float) -> None:
        """As far as it came."""
        if not record.model:
            return
        usage = record.usage
        within = set_span_in_context(server, Context())
        marks: tuple[tuple[str, float | None, Attributes], ...] = (
            ("queue", record.queue_s, {}),
            ("prefill", record.first_token_s, {"cortex.cached_tokens": usage.cached_tokens if usage else None}),
            ("decode", record.last_token_s, {"cortex.num_choices": record.num_choices}),
        )
        begins_s = 0.0
        for name, ends_s, attributes in marks:
            span = self._tracer.start_span(
                name, context=within, start_time=began_ns + int(begins_s * 1e9), attributes=_known(attributes)
            )
            span.end(began_ns + int((total_s if ends_s is None else ends_s) * 1e9))
            if ends_s is None:
                return
            begins_s = ends_s


def _attributes(record: RequestRecord, outcome: str, status: int | None) -> Attributes:
    usage, request = record.usage, record.request
    attributes: dict[str, AttributeValue | None] = {
        "http.request.method": "POST",
        "http.route": record.path,
        "url.path": record.path,
        "http.response.status_code": status or (200 if outcome == "ok" else None),
        "gen_ai.operation.name": OPERATIONS.get(record.route, "chat"),
        "gen_ai.provider.name": "cortex",
        "gen_ai.request.model": record.asked_model or None,
        "gen_ai.request.stream": record.stream,
        "gen_ai.response.model": record.model or None,
        "gen_ai.response.finish_reasons": record.finish or None,
        "gen_ai.response.time_to_first_chunk": record.first_token_s,
        "cortex.request_id": record.request_id,
        "cortex.outcome": outcome,
        "cortex.resumed": record.is_resumed or None,
    }
    if usage is not None:
        attributes |= {
            "gen_ai.usage.input_tokens": usage.prompt_tokens,
            "gen_ai.usage.output_tokens": usage.completion_tokens,
            "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
            "gen_ai.usage.reasoning.output_tokens": usage.reasoning_tokens or None,
        }
    if request is not None:
        sampling = request.sampling
        attributes |= {
            "gen_ai.request.max_tokens": request.limits.max_tokens,
            "gen_ai.request.choice.count": request.num_choices if request.num_choices > 1 else None,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.request.top_k": sampling.top_k,
            "gen_ai.request.presence_penalty": sampling.presence_penalty,
            "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
            "gen_ai.request.seed": sampling.seed,
            "gen_ai.output.type": "json" if request.response_format is not None else None,
        }
    return attributes


def _context_of(parent: TraceContext | None) -> Context:
    """Nothing goes further than here, so the state that vendors keep beside a trace is of no use."""
    if parent is None:
        return Context()
    remote = SpanContext(
        int(parent.trace_id, 16),
        int(parent.span_id, 16),
        is_remote=True,
        trace_flags=TraceFlags(TraceFlags.SAMPLED if parent.is_sampled else TraceFlags.DEFAULT),
    )
    return set_span_in_context(NonRecordingSpan(remote), Context())


def _known(attributes: Attributes) -> dict[str, AttributeValue]:
    return {key: value for key, value in attributes.items() if value is not None}
