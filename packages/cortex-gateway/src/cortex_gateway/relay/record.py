"""The end of every request: its metrics, its one access line and, where there are any, its span and its capture."""

from __future__ import annotations

import time

from cortex_gateway.observability.access_log import AccessLog, AccessRecord
from cortex_gateway.observability.metrics import MIN_RATE_WINDOW_S, Metrics
from cortex_gateway.relay.events import Usage
from cortex_gateway.relay.exchange import Exchange
from cortex_gateway.relay.spans import end_trace


def record(exchange: Exchange, metrics: Metrics, access_log: AccessLog, now: float) -> None:
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
        metrics.charged(principal, exchange.charged)
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
