"""Spans of the gateway's requests, by the conventions of OpenTelemetry for HTTP and for generative AI.

Only imported where traces are on. One request is one SERVER span; below it one span for each time in which no node
served it, and one CLIENT span for each attempt on a node, under which the neuron's own spans come. No text of a prompt
or an answer goes into any of them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from cortex_core.trace_context import TRACEPARENT, TRACESTATE, TraceContext, read_trace_context, write_traceparent
from multidict import CIMultiDict
from opentelemetry.context import Context
from opentelemetry.trace import (
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    StatusCode,
    TraceFlags,
    Tracer,
    TraceState,
    set_span_in_context,
)
from opentelemetry.util.types import AttributeValue
from yarl import URL

from cortex_gateway.http.asgi import Scope

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_TEXT = 600

Attributes = Mapping[str, AttributeValue | None]


class Tracing:
    """Starts the spans of requests. clock: the one that the times of requests are told in, in seconds."""

    def __init__(self, tracer: Tracer, *, clock: Callable[[], float]) -> None:
        self._tracer = tracer
        self._clock = clock

    def begin(self, scope: Scope, *, route: str | None, started_at: float) -> RequestTrace:
        """route: the path where it is one of ours. A client's paths would be names without number."""
        offset_ns = time.time_ns() - int(self._clock() * 1e9)
        method = scope["method"]
        attributes: dict[str, AttributeValue] = {
            "http.request.method": method,
            "url.path": scope["path"][:MAX_TEXT],
            "url.scheme": scope.get("scheme", "http"),
            "network.protocol.version": scope.get("http_version", "1.1"),
        }
        if route is not None:
            attributes["http.route"] = route
        if scope.get("client"):
            attributes["client.address"] = scope["client"][0]
        span = self._tracer.start_span(
            f"{method} {route}" if route is not None else method,
            context=_context_of(read_trace_context(scope["headers"])),
            kind=SpanKind.SERVER,
            attributes=attributes,
            start_time=offset_ns + int(started_at * 1e9),
        )
        return RequestTrace(self._tracer, span, offset_ns)


class RequestTrace:
    """The spans of one request. Times are seconds on the gateway's clock."""

    __slots__ = (
        "_attempt",
        "_context",
        "_has_first_byte",
        "_offset_ns",
        "_server",
        "_tracer",
        "_wait",
        "_waits_for",
        "trace_id",
    )

    def __init__(self, tracer: Tracer, server: Span, offset_ns: int) -> None:
        self._tracer = tracer
        self._server = server
        self._offset_ns = offset_ns
        self._context = set_span_in_context(server, Context())
        self._wait: Span | None = None
        self._waits_for: tuple[str, Attributes] | None = None
        self._attempt: Span | None = None
        self._has_first_byte = False
        self.trace_id = format(server.get_span_context().trace_id, "032x")

    def waits(self, what: str, attributes: Attributes) -> None:
        """No node serves it yet. what: `hold` or `load`; attributes: where, why not, and what has to go for it."""
        if self._wait is None:
            self._wait = self._tracer.start_span("placement", context=self._context)
        waits_for = (what, attributes)
        if waits_for == self._waits_for:
            return
        self._waits_for = waits_for
        self._wait.add_event(what, {name: value for name, value in attributes.items() if value is not None})

    def attempt(self, name: str, url: URL, headers: CIMultiDict[str], attributes: Attributes) -> None:
        """The request goes to a node: its headers continue the trace."""
        self._end_wait(None)
        span = self._attempt = self._tracer.start_span(
            name,
            context=self._context,
            kind=SpanKind.CLIENT,
            attributes={
                "http.request.method": "POST",
                "server.address": url.host or "",
                "server.port": url.port or 0,
                "url.full": str(url.with_user(None)),
            },
        )
        _set(span, attributes)
        own = span.get_span_context()
        for header in (TRACEPARENT, TRACESTATE):
            headers.popall(header, None)
        headers[TRACEPARENT] = write_traceparent(
            format(own.trace_id, "032x"), format(own.span_id, "016x"), is_sampled=own.trace_flags.sampled
        )
        if own.trace_state:
            headers[TRACESTATE] = own.trace_state.to_header()

    def answered(self, status: int) -> None:
        """The node's status line."""
        if self._attempt is not None:
            self._attempt.set_attribute("http.response.status_code", status)
            if status >= 400:
                _fail(self._attempt, str(status), None)

    def attempt_ended(self, fault: str | None, *, first_byte_at: float | None) -> None:
        """fault: what ended it before its time; None where it was all said, or the client was gone."""
        span = self._attempt
        if span is None:
            return
        if first_byte_at is not None and not self._has_first_byte:
            self._has_first_byte = True
            span.add_event("first_byte", timestamp=self._ns(first_byte_at))
        if fault is not None:
            _fail(span, fault, None)
        span.end()
        self._attempt = None

    def end(self, attributes: Attributes, *, error_type: str | None, error: str | None, now: float) -> None:
        """error_type: set where the request failed, and not the one who asked."""
        self._end_wait(error_type)
        self.attempt_ended(error_type, first_byte_at=None)
        _set(self._server, attributes)
        if error_type is not None:
            _fail(self._server, error_type, error)
        self._server.end(self._ns(now))

    def _end_wait(self, error_type: str | None) -> None:
        if self._wait is not None:
            if error_type is not None:
                _fail(self._wait, error_type, None)
            self._wait.end()
            self._wait = self._waits_for = None

    def _ns(self, at: float) -> int:
        return self._offset_ns + int(at * 1e9)


def _context_of(parent: TraceContext | None) -> Context:
    """Never the context of the task: nothing of one request may show in another's."""
    if parent is None:
        return Context()
    members = [(key, value) for key, _, value in (member.partition("=") for member in parent.state.split(",")) if key]
    remote = SpanContext(
        int(parent.trace_id, 16),
        int(parent.span_id, 16),
        is_remote=True,
        trace_flags=TraceFlags(TraceFlags.SAMPLED if parent.is_sampled else TraceFlags.DEFAULT),
        trace_state=TraceState(members),
    )
    return set_span_in_context(NonRecordingSpan(remote), Context())


def _set(span: Span, attributes: Attributes) -> None:
    """What is known: absent is not empty."""
    span.set_attributes({key: value for key, value in attributes.items() if value is not None and value != ()})


def _fail(span: Span, error_type: str, description: str | None) -> None:
    span.set_attribute("error.type", error_type)
    span.set_status(StatusCode.ERROR, description[:MAX_TEXT] if description else None)
