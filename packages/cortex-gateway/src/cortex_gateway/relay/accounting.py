"""Accounting at the end of every request: what it used, its metrics, its one access line, its span and its capture."""

from __future__ import annotations

import time

import msgspec
from cortex_core.hop import ChoiceTokens

from cortex_gateway.identity import estimate
from cortex_gateway.observability.access_log import AccessLog, AccessRecord
from cortex_gateway.observability.metrics import MIN_RATE_WINDOW_S, Metrics
from cortex_gateway.relay.request_state import RequestState
from cortex_gateway.relay.spans import end_trace
from cortex_gateway.translation.answer_stream import AnswerStream, Usage

_decode_batches = msgspec.json.Decoder(list[list[ChoiceTokens]]).decode


def generated_tokens(events: AnswerStream) -> int:
    """Tokens behind the events that were sent on: by the neuron's marks, else one for each event."""
    if not events.batches:
        return events.num_events
    batches = _decode_batches(b"[%s]" % bytes(events.batches[:-1]))
    return sum(len(choice.token_ids) for batch in batches for choice in batch)


def used(exchange: RequestState, now: float) -> estimate.Usage:
    """Nothing where no neuron worked for the client: refused, never sent, or failed before there was an answer.

    A client that hangs up pays for what was generated until then: in a stream what it was sent, else at most what
    the time allows.
    """
    grant, sent_at = exchange.grant, exchange.sent_at
    if grant is None or sent_at is None or not exchange.surface.generates:
        return estimate.NOTHING_USED
    if exchange.first_byte_at is None and exchange.outcome not in ("ok", "client_gone"):
        return estimate.NOTHING_USED
    guessed = estimate.unmetered_usage(
        grant.estimate,
        num_events=(exchange.generated or 0) if exchange.is_stream else None,
        seconds=now - sent_at,
    )
    usage = exchange.usage
    if usage is None:
        return guessed
    completion = guessed.completion if usage.completion_tokens is None else usage.completion_tokens
    if exchange.is_stream and exchange.outcome != "ok":
        # Cut short: what an event near the cut says of the usage was true at its beginning.
        completion = max(completion, guessed.completion)
    prompt = guessed.prompt if usage.prompt_tokens is None else usage.prompt_tokens
    return estimate.Usage(prompt, completion, usage.cached_tokens or 0)


def record(exchange: RequestState, metrics: Metrics, access_log: AccessLog, now: float) -> None:
    """Count and log one finished exchange. Unknown token counts stay unknown: absent is not zero."""
    usage = exchange.usage or Usage()
    duration = now - exchange.started_at
    ttft = None if exchange.first_byte_at is None else exchange.first_byte_at - exchange.started_at
    metrics.finished.labels(exchange.surface.name, exchange.outcome).inc()
    # A name that nobody has loaded or sent anything for may be a client's invention, and becomes no label.
    is_known = exchange.num_attempts > 0 or exchange.route == "cold"
    if is_known and exchange.node is not None and exchange.resolved is not None:
        series = metrics.place(exchange.resolved, exchange.node)
        if exchange.outcome == "client_gone":
            series.client_gone.inc()
        if ttft is not None:
            series.ttft.observe(ttft)
        if usage.prompt_tokens:
            series.prompt_tokens.inc(usage.prompt_tokens)
        if usage.cached_tokens:
            series.cached_tokens.inc(usage.cached_tokens)
        if usage.completion_tokens:
            series.completion_tokens.inc(usage.completion_tokens)
            window = exchange.last_byte_at - exchange.first_byte_at if exchange.first_byte_at is not None else 0.0
            seconds = window if window >= MIN_RATE_WINDOW_S else duration
            series.tokens_per_second.observe(usage.completion_tokens / max(seconds, 1e-6))
    principal, translation = exchange.principal, exchange.translation
    if principal is not None and exchange.charged is not None:
        charged = exchange.charged
        metrics.charged(
            principal.account_id, principal.key_id, prompt_tokens=charged.prompt, completion_tokens=charged.completion
        )
    if exchange.trace is not None:
        end_trace(exchange.trace, exchange, usage, ttft_s=ttft, now=now)
    line = AccessRecord(
        id=exchange.request_id,
        method="POST",
        path=exchange.path,
        status=exchange.status,
        outcome=exchange.outcome,
        duration_ms=round(duration * 1000, 2),
        model=exchange.model,
        resolved=exchange.resolved if exchange.resolved != exchange.model else None,
        node=exchange.node,
        route=exchange.route,
        translated=translation.label if translation is not None else None,
        dropped=translation.dropped if translation is not None else (),
        stream=exchange.is_stream,
        attempts=exchange.num_attempts,
        resumes=exchange.num_resumes,
        ttft_ms=None if ttft is None else round(ttft * 1000, 2),
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
        finish=usage.finish,
        client=exchange.client,
        key=principal.key_id if principal is not None else None,
        account=principal.account_id if principal is not None else None,
        trace_id=exchange.trace_id,
        at=round(time.time(), 3),
        error=exchange.error,
    )
    access_log.write(line)
    if exchange.capture is not None:
        exchange.capture.end(line)
