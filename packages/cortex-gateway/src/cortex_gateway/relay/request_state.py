"""What is known of one request: filled as it goes, counted and logged exactly once at its end."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Literal

from cortex_core.errors import ApiError
from cortex_core.trace_context import read_trace_context

from cortex_gateway.http.admission import admission_of
from cortex_gateway.http.asgi import RawHeaders, Scope
from cortex_gateway.http.body import ClientGone
from cortex_gateway.http.request_id import new_request_id
from cortex_gateway.identity.estimate import Usage as Charge
from cortex_gateway.identity.identity import Grant
from cortex_gateway.identity.principal import Principal
from cortex_gateway.placement.decision import Hold, Load, RouteReason
from cortex_gateway.relay.opening import StreamOpening
from cortex_gateway.surfaces.surface import Surface
from cortex_gateway.translation.answer_stream import AnswerStream, Usage
from cortex_gateway.translation.translation import Translation

if TYPE_CHECKING:
    from cortex_gateway.observability.captures import Capture
    from cortex_gateway.observability.tracing import RequestTrace
    from cortex_gateway.relay.blame import Trial

Outcome = Literal["ok", "rejected", "upstream_error", "upstream_failed", "timeout", "client_gone", "shutdown", "error"]


class RequestState:
    """One inference request and its answer. Times are seconds on the loop's clock.

    principal is the key that asks (None: anonymous), grant what it holds of the key's limits, charged what it was
    charged with in the end; sent_at is when the request first went to a neuron; generated the tokens of a stream
    that the client was sent.

    opening: keeps a client's stream alive while no neuron answers. stream: what has been relayed of a stream, over all
    the neurons that wrote it; None before the first byte. translation: how a server that is no neuron is asked, where
    one is. is_sending: something is on its way to the client, who may be slow. trace: its spans, where telemetry is on;
    trace_id: of the trace that it belongs to, by its spans or by what the client says. capture: notes what is said,
    where exchanges are captured. has_answered: the node of this attempt has sent something of an answer, beyond pings.
    trial: where processes have ended under the same body before. is_blamed: a neuron found that it ends its engine.
    """

    __slots__ = (
        "capture",
        "charged",
        "client",
        "cors",
        "error",
        "first_byte_at",
        "generated",
        "grant",
        "has_answered",
        "interruption",
        "is_blamed",
        "is_sending",
        "is_stream",
        "last_byte_at",
        "model",
        "node",
        "num_attempts",
        "num_resumes",
        "opening",
        "outcome",
        "path",
        "principal",
        "request_id",
        "resolved",
        "response_started",
        "route",
        "sent_at",
        "started_at",
        "status",
        "stream",
        "surface",
        "task",
        "trace",
        "trace_id",
        "translation",
        "trial",
        "usage",
    )

    def __init__(self, surface: Surface, scope: Scope, task: asyncio.Task[None], now: float) -> None:
        self.surface = surface
        self.task: asyncio.Task[None] | None = task
        self.request_id = new_request_id()
        self.path: str = scope["path"]
        self.client: str | None = scope["client"][0] if scope.get("client") else None
        self.started_at = now
        self.first_byte_at: float | None = None
        self.last_byte_at = now
        self.model: str | None = None
        self.resolved: str | None = None
        self.principal: Principal | None = None
        self.grant: Grant | None = None
        self.sent_at: float | None = None
        self.generated: int | None = None
        self.charged: Charge | None = None
        self.node: str | None = None
        self.route: str | None = None
        self.num_attempts = 0
        self.has_answered = False
        self.is_blamed = False
        self.trial: Trial | None = None
        self.num_resumes = 0
        self.is_stream = False
        self.is_sending = False
        self.trace_id: str | None = None
        self.trace: RequestTrace | None = None
        self.capture: Capture | None = None
        self.cors: RawHeaders = admission_of(scope).cors
        for name, _ in scope["headers"]:
            if name == b"traceparent":
                context = read_trace_context(scope["headers"])
                self.trace_id = context.trace_id if context is not None else None
        self.status = 0
        self.outcome: Outcome = "ok"
        self.error: str | None = None
        self.usage: Usage | None = None
        self.response_started = False
        self.opening: StreamOpening | None = None
        self.stream: AnswerStream | None = None
        self.translation: Translation | None = None
        self.interruption: ApiError | ClientGone | None = None

    @property
    def queue_key(self) -> str | None:
        """Whose turn it is where requests wait for one another: the account's, or of whoever asks from one address."""
        return self.client if self.principal is None else f"account:{self.principal.account_id}"

    @property
    def shown_bytes(self) -> int:
        return 0 if self.capture is None else self.capture.max_request_bytes

    def answers(self, now: float) -> None:
        """A piece of the answer itself has come."""
        self.has_answered = True
        if self.first_byte_at is None:
            self.first_byte_at = now
        if self.trial is not None:
            self.trial.answered()

    def interrupt(self, reason: ApiError | ClientGone) -> None:
        """End the request from outside, wherever it is: the handler sees `reason` raised. The first reason wins."""
        if self.interruption is None and self.task is not None:
            self.interruption = reason
            self.task.cancel()

    async def answer(self) -> bool:
        """There is something to send: stop the pings. True if the status line has gone out already."""
        is_open = self.opening is not None and await self.opening.close()
        return is_open or self.response_started

    def waits(self, decision: Hold | Load, route: RouteReason) -> None:
        """The request waits for a node: what its headers say if they go out before a neuron answers."""
        self.node, self.route = decision.node, route
        if self.trace is not None:
            self.trace.waits(*described(decision))

    def error_event(self, error: ApiError) -> bytes:
        """The end of a stream that has begun."""
        own = None if self.stream is None else self.stream.fail(error)
        return own if own is not None else self.surface.error_event(error, self.request_id)

    def settle(self) -> None:
        """From here on nothing interrupts: the last bytes are on their way."""
        self.task = None


def described(decision: Hold | Load) -> tuple[str, dict[str, str | tuple[str, ...] | None]]:
    """What a request waits for, as a trace tells it: a word, and its attributes."""
    if isinstance(decision, Load):
        return "load", {"cortex.node": decision.node, "cortex.evicted": decision.victims or None}
    return "hold", {"cortex.node": decision.node, "cortex.reason": decision.reason}
