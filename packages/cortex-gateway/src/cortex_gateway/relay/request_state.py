"""State of one inference request: filled as it goes, counted and logged exactly once at its end."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from cortex_core.errors import ApiError
from cortex_core.trace_context import read_trace_context

from cortex_gateway.bodies.payload import Payload
from cortex_gateway.http.asgi import RawHeaders, Scope
from cortex_gateway.http.body import ClientGone, RequestBody
from cortex_gateway.http.client_writer import ClientWriter, no_headers
from cortex_gateway.http.headers import identity_headers
from cortex_gateway.identity.estimate import MeteredTokens
from cortex_gateway.identity.identity import Grant
from cortex_gateway.identity.principal import Principal
from cortex_gateway.placement.decision import Hold, Load, RouteReason
from cortex_gateway.placement.session_hints import RequestHints
from cortex_gateway.surfaces.surface import Surface
from cortex_gateway.translation.answer_stream import AnswerStream, Usage
from cortex_gateway.translation.translation import Translation

if TYPE_CHECKING:
    from cortex_gateway.observability.captures import Capture
    from cortex_gateway.observability.tracing import RequestTrace
    from cortex_gateway.relay.blame import Body, Trial

Outcome = Literal["ok", "rejected", "upstream_error", "upstream_failed", "timeout", "client_gone", "shutdown", "error"]

CLIENT_GONE_STATUS = 499
"""Not an HTTP status: what the log and the metrics call a client that hung up (nginx's convention)."""

MAX_MOVES = 8
"""Of one request, from nodes that were lost."""

NOTHING_CAME = Payload([b""])


def new_request_id() -> str:
    return "req_" + os.urandom(12).hex()


class RequestState:
    """One inference request and its answer. Times are seconds on the loop's clock.

    headers, body, payload: as the client sent them; payload is empty until all of the body has come. writer: to the
    client. cors, limit_headers: what goes on every answer, for pages of other origins and of a key's limits.

    principal is the key that asks (None: anonymous), grant what it holds of the key's limits, charged what it was
    charged with in the end; sent_at is when the request first went to a neuron; generated the tokens of a stream
    that the client was sent.

    avoid: nodes that have failed it. is_lost: the node of this attempt does not answer any more, and the request leaves
    it; num_moves: how often it did. has_been_refused: the node could not be reached or would not, and another is to be
    asked.

    cache_salt: requests with different ones share no cached prefix, and none is routed by what the other has asked.
    priority: one of `hop.PRIORITIES`, as far as the key allows it.

    fingerprint: of the node that began a stream, as it says. is_mixed: it goes on where another one is said, or none.

    stream: what has been relayed of a stream, over all the neurons that wrote it; None before the first byte.
    translation: how a server that is no neuron is asked, where one is. trace: its spans, where telemetry is on;
    trace_id: of the trace that it belongs to, by its spans or by what the client says. capture: notes what is said,
    where exchanges are captured. has_begun: a node has begun to answer. has_answered: the node of this attempt has sent
    something of an answer, beyond what opens a stream and pings. known_as, trial: where processes have ended under the
    same body before; waits_since: it waits for a turn. is_blamed: a neuron found that it ends its engine.
    """

    __slots__ = (
        "_hints",
        "avoid",
        "body",
        "cache_salt",
        "capture",
        "charged",
        "client",
        "cors",
        "error",
        "fingerprint",
        "first_byte_at",
        "generated",
        "grant",
        "has_answered",
        "has_been_refused",
        "has_begun",
        "headers",
        "interruption",
        "is_blamed",
        "is_lost",
        "is_mixed",
        "is_stream",
        "known_as",
        "last_byte_at",
        "limit_headers",
        "loop",
        "model",
        "node",
        "num_attempts",
        "num_moves",
        "num_resumes",
        "outcome",
        "path",
        "payload",
        "principal",
        "priority",
        "request_id",
        "resolved",
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
        "waits_since",
        "writer",
    )

    def __init__(
        self, surface: Surface, scope: Scope, body: RequestBody, writer: ClientWriter, cors: RawHeaders
    ) -> None:
        """Belongs to the task that makes it."""
        self.surface = surface
        self.loop = asyncio.get_running_loop()
        self.task = asyncio.current_task()
        self.request_id = new_request_id()
        self.path: str = scope["path"]
        self.client: str | None = scope["client"][0] if scope.get("client") else None
        self.headers: RawHeaders = scope["headers"]
        self.body = body
        self.writer = writer
        writer.before_end = self.settle
        self.payload = NOTHING_CAME
        self.started_at = self.loop.time()
        self.first_byte_at: float | None = None
        self.last_byte_at = self.started_at
        self.model: str | None = None
        self.resolved: str | None = None
        self.principal: Principal | None = None
        self.grant: Grant | None = None
        self.cache_salt = ""
        self.priority = "normal"
        self.limit_headers: Callable[[], RawHeaders] = no_headers
        self.sent_at: float | None = None
        self.generated: int | None = None
        self.charged: MeteredTokens | None = None
        self.node: str | None = None
        self.route: str | None = None
        self.num_attempts = 0
        self.num_moves = 0
        self.avoid: frozenset[str] = frozenset()
        self.is_lost = False
        self.has_been_refused = False
        self.has_answered = False
        self.has_begun = False
        self.is_blamed = False
        self.known_as: Body | None = None
        self.trial: Trial | None = None
        self.waits_since: float | None = None
        self.num_resumes = 0
        self.fingerprint: str | None = None
        self.is_mixed = False
        self.is_stream = False
        self.trace_id: str | None = None
        self.trace: RequestTrace | None = None
        self.capture: Capture | None = None
        self.cors = cors
        for name, _ in self.headers:
            if name == b"traceparent":
                context = read_trace_context(self.headers)
                self.trace_id = context.trace_id if context is not None else None
        self.status = 0
        self.outcome: Outcome = "ok"
        self.error: str | None = None
        self.usage: Usage | None = None
        self.stream: AnswerStream | None = None
        self.translation: Translation | None = None
        self.interruption: ApiError | ClientGone | None = None
        self._hints: RequestHints | None = None

    # ------------------------------------------------------------------------------------------ what it says of itself

    @property
    def queue_key(self) -> str | None:
        """Whose turn it is where requests wait for one another: the account's, or of whoever asks from one address."""
        return self.client if self.principal is None else f"account:{self.principal.account_id}"

    @property
    def shown_bytes(self) -> int:
        """How much of the body is wanted for a capture."""
        return 0 if self.capture is None else self.capture.max_request_bytes

    def session(self) -> str | None:
        return self._found_hints().session()

    def prompt(self) -> bytes:
        return self._found_hints().prompt()

    def _found_hints(self) -> RequestHints:
        if self._hints is None:
            self._hints = self.payload.hints(self.headers)
        return self._hints

    def own_headers(self) -> RawHeaders:
        """What the gateway adds to every answer."""
        headers = identity_headers(
            self.request_id,
            node=self.node,
            model=self.resolved,
            route=self.route or ("refused" if self.resolved is not None else None),
            translated=self.translation.label if self.translation is not None else None,
        )
        headers.extend(self.cors)
        headers.extend(self.limit_headers())
        return headers

    # ------------------------------------------------------------------------------------------ what becomes of it

    def waits(self, decision: Hold | Load, route: RouteReason) -> None:
        """The request waits for a node: what its headers say if they go out before a neuron answers."""
        self.node, self.route = decision.node, route
        if self.trace is not None:
            self.trace.waits(*described(decision))

    def begin_attempt(self, node: str, route: str) -> None:
        """It goes to this node now."""
        self.node, self.route = node, route
        self.num_attempts += 1
        self.has_answered = self.has_been_refused = self.is_lost = False
        if self.capture is not None:
            self.capture.attempt(node, route)

    def answers(self, now: float) -> None:
        """A piece of the answer itself has come."""
        self.has_answered = True
        if self.first_byte_at is None:
            self.first_byte_at = now
        if self.trial is not None:
            self.trial.answered()

    def failure(self, error: ApiError) -> bytes | None:
        """The end of a stream that has begun; None where an answer can only break off."""
        own = None if self.stream is None else self.stream.fail(error)
        framed = self.writer.framing.failure
        if own is not None or framed is None:
            return own
        return framed(error, self.request_id)

    def interrupt(self, reason: ApiError | ClientGone) -> None:
        """End the request from outside, wherever it is: the handler sees `reason` raised. The first reason wins."""
        if self.interruption is None and self.task is not None:
            self.interruption = reason
            self.task.cancel()

    def leaves(self) -> bool:
        """The node of this attempt does not answer any more. Whether the request can go elsewhere: nothing of an answer
        has come, or a stream that another neuron can go on with."""
        is_resumable = self.stream is not None and self.stream.is_resumable
        if self.task is None or self.interruption is not None or self.is_lost or self.num_moves >= MAX_MOVES:
            return False
        if self.has_answered and not is_resumable:
            return False
        self.is_lost = True
        self.num_moves += 1
        return True

    def client_left(self) -> None:
        self.interrupt(ClientGone())

    def settle(self) -> None:
        """From here on nothing interrupts: the last bytes are on their way."""
        self.task = None


def described(decision: Hold | Load) -> tuple[str, dict[str, str | tuple[str, ...] | None]]:
    """What a request waits for, as a trace tells it: a word, and its attributes."""
    if isinstance(decision, Load):
        return "load", {"cortex.node": decision.node, "cortex.evicted": decision.victims or None}
    return "hold", {"cortex.node": decision.node, "cortex.reason": decision.reason}
