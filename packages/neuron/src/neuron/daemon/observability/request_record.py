"""Record of one inference request: measured as it goes, and at its end one log line and its metrics."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Protocol

from cortex_core.conversation import Request
from cortex_core.events import Usage
from cortex_core.serving.log_lines import RequestLines, shown
from cortex_core.trace_context import TraceContext
from prometheus_client import Histogram

from neuron.daemon.observability.metrics import Metrics
from neuron.daemon.text.prompts import Choice

logger = logging.getLogger("neuron.request")


class SpanSink(Protocol):
    """Where a request's spans go (`spans.RequestSpans`)."""

    def record(self, record: RequestRecord, outcome: str, *, status: int | None, total_s: float) -> str:
        """Returns the trace's id."""
        ...


class RequestRecord:
    """outcome: `ok`, `client_gone`, or an error's code. Times are seconds since arrival.

    dropped: names of the filters that took something out of the prompt. trace: what the request belongs to, if it says
    so. spans: set where telemetry is on. lines: whether a request that no model worked on has a log line of its own.
    """

    def __init__(
        self,
        metrics: Metrics,
        *,
        route: str,
        path: str,
        request_id: str,
        lines: RequestLines,
        trace: TraceContext | None = None,
        spans: SpanSink | None = None,
    ) -> None:
        self._metrics = metrics
        self._spans = spans
        self._lines = lines
        self._began = time.monotonic()
        self._last_token: float | None = None
        self._has_ended = False
        self._inter_token: Histogram | None = None
        self.route = route
        self.path = path
        self.trace = trace
        self.request: Request | None = None
        self.is_resumed = False
        self.request_id = request_id
        self.model = ""
        self.asked_model = ""
        self.principal: str | None = None
        self.stream = False
        self.dropped: tuple[str, ...] = ()
        self.num_choices = 1
        self.prompt_tokens = 0
        self.usage: Usage | None = None
        self.finish: list[str] = []
        self.queue_s: float | None = None
        self.first_token_s: float | None = None

    def found(self, model: str) -> None:
        """The model that serves it, by its id here."""
        self.model = model
        self._inter_token = self._metrics.inter_token.labels(model)

    def prepared(self, request: Request, choices: Sequence[Choice]) -> None:
        """What is asked, and how long its prompts are."""
        self.request = request
        self.asked_model, self.stream, self.dropped = request.model, request.stream, request.dropped
        self.num_choices = len(choices)
        self.prompt_tokens = sum(choice.prompt.num_tokens for choice in choices[:: request.num_choices])

    def seated(self) -> None:
        """The request has its seat."""
        self.queue_s = time.monotonic() - self._began
        self._metrics.queue_wait.labels(self.model).observe(self.queue_s)

    def tokens_came(self, num_tokens: int) -> None:
        """A batch in which the choice that got most got `num_tokens` tokens."""
        now = time.monotonic()
        if self._last_token is None:
            self.first_token_s = now - self._began
            self._metrics.time_to_first_token.labels(self.model).observe(self.first_token_s)
        elif self._inter_token is not None:
            self._inter_token.observe((now - self._last_token) / num_tokens)
        self._last_token = now

    @property
    def last_token_s(self) -> float | None:
        return None if self._last_token is None else self._last_token - self._began

    def end(self, outcome: str, *, status: int | None = None, detail: str = "") -> None:
        """Whatever happened; only the first call counts."""
        if self._has_ended:
            return
        self._has_ended = True
        total_s = time.monotonic() - self._began
        metrics, usage = self._metrics, self.usage
        metrics.requests.labels(self.model, self.route, outcome).inc()
        metrics.duration.labels(self.model, self.route).observe(total_s)
        if usage is not None:
            metrics.prompt_tokens.labels(self.model).inc(usage.prompt_tokens)
            metrics.completion_tokens.labels(self.model).inc(usage.completion_tokens)
            metrics.cached_tokens.labels(self.model).inc(usage.cached_tokens)
        trace_id = self.trace.trace_id if self.trace is not None else None
        if self._spans is not None:
            trace_id = self._spans.record(self, outcome, status=status, total_s=total_s)
        is_unworked = usage is None and self.queue_s is None
        if is_unworked and not self._lines.admits(outcome):
            return
        is_fine = outcome in ("ok", "client_gone")
        logger.log(
            logging.INFO if is_fine else logging.WARNING,
            "%s: %s req_id=%s model=%s asked=%s principal=%s stream=%d choices=%d prompt_tokens=%d "
            "completion_tokens=%d cached_tokens=%d queue_ms=%s ttft_ms=%s total_ms=%.0f finish=%s outcome=%s%s%s%s%s",
            self.route,
            "done" if is_fine else "request rejected" if usage is None else "failed",
            self.request_id,
            self.model or "-",
            _words(self.asked_model),
            self.principal or "-",
            self.stream,
            self.num_choices,
            usage.prompt_tokens if usage else self.prompt_tokens,
            usage.completion_tokens if usage else 0,
            usage.cached_tokens if usage else 0,
            _ms(self.queue_s),
            _ms(self.first_token_s),
            total_s * 1000,
            ",".join(self.finish) or "-",
            outcome,
            f" dropped={','.join(self.dropped)}" if self.dropped else "",
            f" trace_id={trace_id}" if trace_id is not None else "",
            f" status={status}" if status is not None else "",
            f" detail={_words(detail, 300)}" if detail else "",
        )


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.0f}"


def _words(text: str, limit: int = 128) -> str:
    return shown(text, limit) or "-"
