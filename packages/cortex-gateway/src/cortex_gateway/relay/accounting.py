"""Accounting at the end of every request: what it used, its metrics, its one access line, its span and its capture."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec
from cortex_core.hop import ChoiceTokens

from cortex_gateway.http.asgi import Scope, Send
from cortex_gateway.identity import estimate
from cortex_gateway.observability.access_log import AccessLog, AccessRecord
from cortex_gateway.observability.captures import Capture, Captures
from cortex_gateway.observability.metrics import MIN_RATE_WINDOW_S, Metrics
from cortex_gateway.relay.request_state import RequestState
from cortex_gateway.relay.spans import end_trace
from cortex_gateway.translation.answer_stream import AnswerStream, Usage

if TYPE_CHECKING:
    from cortex_gateway.observability.tracing import Tracing

_decode_batches = msgspec.json.Decoder(list[list[ChoiceTokens]]).decode


def generated_tokens(events: AnswerStream) -> int:
    """Tokens behind the events that were sent on: by the neuron's marks, else one for each event."""
    if not events.batches:
        return events.num_events
    batches = _decode_batches(b"[%s]" % bytes(events.batches[:-1]))
    return sum(len(choice.token_ids) for batch in batches for choice in batch)


def used(request: RequestState, now: float) -> estimate.MeteredTokens:
    """Nothing where no neuron worked for the client: refused, never sent, or failed before there was an answer.

    A client that hangs up pays for what was generated until then: in a stream what it was sent, else at most what
    the time allows.
    """
    grant, sent_at = request.grant, request.sent_at
    if grant is None or sent_at is None or not request.surface.generates:
        return estimate.NOTHING_USED
    if request.first_byte_at is None and request.outcome not in ("ok", "client_gone"):
        return estimate.NOTHING_USED
    guessed = estimate.unmetered_usage(
        grant.estimate,
        num_events=(request.generated or 0) if request.is_stream else None,
        seconds=now - sent_at,
    )
    usage = request.usage
    if usage is None:
        return guessed
    completion = guessed.completion if usage.completion_tokens is None else usage.completion_tokens
    if request.is_stream and request.outcome != "ok":
        # Cut short: what an event near the cut says of the usage was true at its beginning.
        completion = max(completion, guessed.completion)
    prompt = guessed.prompt if usage.prompt_tokens is None else usage.prompt_tokens
    return estimate.MeteredTokens(prompt, completion, usage.cached_tokens or 0)


class Accounting:
    """What one gateway notes of its requests: metrics, access log, captures and, where they are on, traces."""

    def __init__(
        self, metrics: Metrics, access_log: AccessLog, captures: Captures, tracing: Tracing | None = None
    ) -> None:
        self.metrics = metrics
        self._access_log = access_log
        self._captures = captures
        self._tracing = tracing

    def capture(self, scope: Scope, send: Send) -> tuple[Capture | None, Send]:
        """Where requests are captured: what notes this one, and a `send` that it sees through."""
        if not self._captures.max_exchanges:
            return None, send
        capture = self._captures.begin(scope)
        return capture, capture.watched(send)

    def begin(self, request: RequestState, scope: Scope, capture: Capture | None) -> None:
        request.capture = capture
        if self._tracing is not None:
            request.trace = self._tracing.begin(scope, route=request.path, started_at=request.started_at)
            request.trace_id = request.trace.trace_id

    def end(self, request: RequestState) -> None:
        """Charge the key, count, log: exactly once."""
        now = request.loop.time()
        request.status = request.status or request.writer.status
        if request.grant is not None:
            request.charged = used(request, now)
            request.grant.settle(request.charged)
        _record(request, self.metrics, self._access_log, now)


def _record(request: RequestState, metrics: Metrics, access_log: AccessLog, now: float) -> None:
    """Count and log one finished request. Unknown token counts stay unknown: absent is not zero."""
    usage = request.usage or Usage()
    duration = now - request.started_at
    ttft = None if request.first_byte_at is None else request.first_byte_at - request.started_at
    metrics.finished.labels(request.surface.name, request.outcome).inc()
    # A name that nobody has loaded or sent anything for may be a client's invention, and becomes no label.
    is_known = request.num_attempts > 0 or request.route == "cold"
    if is_known and request.node is not None and request.resolved is not None:
        series = metrics.places[request.resolved, request.node]
        if request.outcome == "client_gone":
            series.client_gone.inc()
        if ttft is not None:
            series.ttft.observe(ttft)
        if usage.prompt_tokens:
            series.prompt_tokens.inc(usage.prompt_tokens)
        if usage.cached_tokens:
            series.cached_tokens.inc(usage.cached_tokens)
        if usage.completion_tokens:
            series.completion_tokens.inc(usage.completion_tokens)
            window = request.last_byte_at - request.first_byte_at if request.first_byte_at is not None else 0.0
            seconds = window if window >= MIN_RATE_WINDOW_S else duration
            series.tokens_per_second.observe(usage.completion_tokens / max(seconds, 1e-6))
    principal, translation = request.principal, request.translation
    if principal is not None and request.charged is not None:
        charged = request.charged
        metrics.charged(
            principal.account_id, principal.key_id, prompt_tokens=charged.prompt, completion_tokens=charged.completion
        )
    if request.trace is not None:
        end_trace(request.trace, request, usage, ttft_s=ttft, now=now)
    if request.is_mixed:
        metrics.mixed.labels(request.resolved, request.node).inc()
    line = AccessRecord(
        id=request.request_id,
        method="POST",
        path=request.path,
        status=request.status,
        outcome=request.outcome,
        duration_ms=round(duration * 1000, 2),
        model=request.model,
        resolved=request.resolved if request.resolved != request.model else None,
        node=request.node,
        route=request.route,
        translated=translation.label if translation is not None else None,
        dropped=translation.dropped if translation is not None else (),
        stream=request.is_stream,
        attempts=request.num_attempts,
        resumes=request.num_resumes,
        mixed=request.is_mixed,
        ttft_ms=None if ttft is None else round(ttft * 1000, 2),
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
        finish=usage.finish,
        client=request.client,
        key=principal.key_id if principal is not None else None,
        account=principal.account_id if principal is not None else None,
        trace_id=request.trace_id,
        at=round(time.time(), 3),
        error=request.error,
    )
    access_log.write(line)
    if request.capture is not None:
        request.capture.end(line)
