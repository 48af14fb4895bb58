"""One inference request from accept to last byte, on every surface.

There is one path: streaming or not, warm or cold, in either dialect. What ends a request from outside (the client
hung up, the gateway shuts down, the neuron went silent) interrupts it wherever it is, so that no phase is without
a watch.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from functools import partial
from typing import TYPE_CHECKING, NoReturn

import aiohttp
from cortex_core.dialects.errors import error_body, headers_of, status_of
from cortex_core.errors import ApiError
from cortex_core.gateway_config import GatewaySection
from cortex_core.hop import RESUME_HEADER, resume_state
from multidict import CIMultiDict

from cortex_gateway.bodies.large_bodies import LargeBodies
from cortex_gateway.bodies.payload import Payload
from cortex_gateway.bodies.pool import BodyWorkers
from cortex_gateway.configuration.current import Current
from cortex_gateway.fleet.neuron import describe
from cortex_gateway.fleet.openai_server import OpenAIServer
from cortex_gateway.fleet.poller import Poller
from cortex_gateway.http.asgi import JSON_CONTENT_TYPE, SHORTCUT, Message, RawHeaders, Receive, Scope, Send, Shortcut
from cortex_gateway.http.body import BodyMemory, ClientGone, RequestBody
from cortex_gateway.http.headers import EVENT_STREAM_HEADERS, foreign_headers, identity_headers, request_headers
from cortex_gateway.http.request_id import CLIENT_GONE_STATUS
from cortex_gateway.identity.identity import Identity
from cortex_gateway.identity.principal import limit_headers
from cortex_gateway.observability.access_log import AccessLog
from cortex_gateway.observability.captures import Captures
from cortex_gateway.observability.metrics import Metrics, ModelSeries
from cortex_gateway.placement.placement import Lease, Placement
from cortex_gateway.relay.accounting import record, used
from cortex_gateway.relay.blame import Body
from cortex_gateway.relay.client_disconnect import DisconnectWatch
from cortex_gateway.relay.deaths import Deaths
from cortex_gateway.relay.errors import is_dead_connection, shutting_down, too_many_requests, upstream_failed
from cortex_gateway.relay.opening import StreamOpening
from cortex_gateway.relay.request_state import RequestState
from cortex_gateway.relay.retries import MAX_ATTEMPTS, MAX_RESUMES, BrokenStream, StaleRoute, Unanswered
from cortex_gateway.relay.spans import begin_attempt, end_attempt
from cortex_gateway.relay.upstream_response import AnswerRelay
from cortex_gateway.relay.upstream_timeout import UpstreamTimeout
from cortex_gateway.surfaces.surface import Surface
from cortex_gateway.translation.errors import UpstreamFault
from cortex_gateway.translation.translation import PassingThrough, Translation, is_translated

if TYPE_CHECKING:
    from cortex_gateway.observability.tracing import Tracing

log = logging.getLogger(__name__)


class Relay:
    """Carries requests of all surfaces; knows which are in flight."""

    def __init__(
        self,
        identity: Identity,
        placement: Placement,
        poller: Poller,
        metrics: Metrics,
        access_log: AccessLog,
        current: Current,
        captures: Captures,
        body_workers: BodyWorkers,
        tracing: Tracing | None = None,
    ) -> None:
        self._identity = identity
        self._placement = placement
        self._poller = poller
        self._metrics = metrics
        self._access_log = access_log
        self._current = current
        self._captures = captures
        self._tracing = tracing
        self._body_memory = BodyMemory(self._settings.max_body_memory_bytes)
        self._answers = AnswerRelay(self._own_headers, current)
        self._deaths = Deaths(poller, metrics)
        self._large_bodies = LargeBodies(body_workers)
        self._active: set[RequestState] = set()
        self._idle: asyncio.Event = asyncio.Event()
        self._idle.set()
        self.is_draining = False
        self.max_active: int | None = None
        """More requests at once are a 503: each may need a descriptor, and HTTP/2 brings many over one connection."""

    @property
    def _settings(self) -> GatewaySection:
        return self._current.config.gateway

    # ------------------------------------------------------------------------------------------ drain

    @property
    def num_active(self) -> int:
        return len(self._active)

    async def wait_idle(self) -> None:
        await self._idle.wait()

    def end_all(self) -> None:
        """End what is still running: streams with an error event, the others with a 503."""
        for exchange in list(self._active):
            exchange.interrupt(shutting_down())

    # ------------------------------------------------------------------------------------------ a request

    async def handle(self, surface: Surface, scope: Scope, receive: Receive, send: Send) -> None:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        exchange = RequestState(surface, scope, task, loop.time())
        settings = self._settings
        shortcut: Shortcut | None = scope.get("extensions", {}).get(SHORTCUT)
        self._body_memory.max_bytes = settings.max_body_memory_bytes
        if self._tracing is not None:
            exchange.trace = self._tracing.begin(scope, route=exchange.path, started_at=exchange.started_at)
            exchange.trace_id = exchange.trace.trace_id
        if (capture := self._captures.begin(scope)) is not None:
            exchange.capture = capture
            send = capture.watched(send)
        body = RequestBody(
            receive,
            max_bytes=settings.max_body_bytes,
            timeout_s=settings.body_timeout_s,
            memory=self._body_memory,
            shortcut=shortcut,
        )

        async def send_to_client(message: Message) -> None:
            """Blocks while the client does not read, and so does the neuron in the end: nothing piles up here."""
            exchange.is_sending = True
            try:
                await send(message)
            except OSError:  # A client that reads nothing for too long, `server.bind`; never a neuron's fault.
                raise ClientGone from None
            finally:
                exchange.is_sending = False

        self._active.add(exchange)
        self._idle.clear()
        try:
            await self._answer(exchange, body, scope["headers"], receive, shortcut, send_to_client, loop)
        except ClientGone:
            exchange.status, exchange.outcome = CLIENT_GONE_STATUS, "client_gone"
        finally:
            exchange.settle()
            body.release()
            if exchange.grant is not None:
                exchange.charged = used(exchange, loop.time())
                exchange.grant.settle(exchange.charged)
            self._active.discard(exchange)
            if not self._active:
                self._idle.set()
            record(exchange, self._metrics, self._access_log, loop.time())

    async def _answer(
        self,
        exchange: RequestState,
        body: RequestBody,
        headers: RawHeaders,
        receive: Receive,
        shortcut: Shortcut | None,
        send: Send,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        watch: DisconnectWatch | None = None
        try:
            try:
                if self.is_draining:
                    raise shutting_down()
                if self.max_active is not None and self.num_active > self.max_active:
                    raise too_many_requests(self.max_active)
                if not self._identity.is_off:
                    exchange.principal = await self._identity.authenticate(headers)
                payload = Payload(await body.read_pieces(headers))
                watch = DisconnectWatch(exchange, receive, shortcut)
                if not payload.is_quick:
                    await self._large_bodies.read(payload, exchange)
                if exchange.capture is not None:
                    if payload.facts is None:
                        await exchange.capture.came(payload.whole())
                    else:
                        exchange.capture.came_large(payload.num_bytes, payload.facts.shown)
                envelope = payload.envelope()
                exchange.model = envelope.model
                exchange.is_stream = bool(envelope.stream) and exchange.surface.can_stream
                if exchange.is_stream:
                    exchange.opening = StreamOpening(
                        send,
                        headers=partial(self._stream_headers, exchange),
                        ping=partial(self._ping, exchange),
                        hold_s=self._settings.stream_hold_s,
                        interval_s=self._settings.ping_interval_s,
                    )
                await self._route(exchange, payload, headers, send, loop)
            except asyncio.CancelledError:
                if exchange.interruption is None:
                    raise
                asyncio.current_task().uncancel()  # type: ignore[union-attr]
                raise exchange.interruption from None
        except ApiError as error:
            exchange.settle()
            await self._fail(exchange, error, body, send)
        except ClientGone:
            raise
        except Exception as exc:
            log.exception("request %s failed in the gateway", exchange.request_id)
            exchange.settle()
            exchange.outcome = "error"
            exchange.error = describe(exc)
            fault = ApiError("internal", "The gateway failed on this request.", code="internal_error")
            await self._fail(exchange, fault, body, send)
        finally:
            if watch is not None:
                watch.cancel()
            if exchange.opening is not None:
                await exchange.opening.close()

    async def _route(
        self,
        exchange: RequestState,
        payload: Payload,
        headers: RawHeaders,
        send: Send,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        assert exchange.model is not None
        model = exchange.resolved = self._placement.resolve(exchange.model)
        body = Body(model, payload.num_bytes)
        await self._deaths.check(body, payload)
        if exchange.principal is not None:
            exchange.grant = await self._identity.admit(
                exchange.principal, exchange.model, model, payload, is_metered=exchange.surface.generates
            )
        if not payload.is_quick:
            await self._large_bodies.turn(payload)
        hints = payload.hints(headers)
        while True:
            lease = None if exchange.num_resumes else self._placement.try_now(model, hints)
            if lease is None:
                wait_s = self._settings.load_wait_s
                if not exchange.is_stream:
                    wait_s = min(wait_s, self._settings.unstreamed_wait_s)
                lease = await self._placement.wait(
                    model,
                    hints,
                    wait_s=wait_s,
                    on_wait=exchange.waits,
                    is_resuming=exchange.num_resumes > 0,
                )
            with lease:
                if not (is_taken := self._deaths.is_taken(body, lease.neuron.name)):
                    exchange.node, exchange.route = lease.neuron.name, lease.route
                    exchange.num_attempts += 1
                    if exchange.capture is not None:
                        exchange.capture.attempt(lease.neuron.name, lease.route)
                    try:
                        async with self._deaths.watched(exchange, lease, body, payload):
                            await self._forward(exchange, lease, payload, headers, send, loop)
                        return
                    except StaleRoute:
                        lease.discard()
                        self._metrics.retries.labels(model, lease.neuron.name).inc()
                    except BrokenStream:
                        lease.discard()
                        self._metrics.resumes.labels(model, lease.neuron.name).inc()
                        await self._hold(exchange, send)
            if is_taken:
                await self._deaths.freed()
            else:
                await self._poller.refresh(lease.neuron.name)
            await self._deaths.check(body, payload)

    def _ping(self, exchange: RequestState) -> bytes:
        """What keeps a waiting stream alive; where it is wanted, with a word on what it waits for."""
        ping = exchange.surface.ping
        if self._settings.show_loading and exchange.resolved is not None:
            return self._placement.waiting_note(exchange.resolved) + ping
        return ping

    async def _hold(self, exchange: RequestState, send: Send) -> None:
        """Keep a client's broken stream alive until another neuron goes on with it."""
        await exchange.answer()
        exchange.num_resumes += 1
        exchange.opening = StreamOpening(
            send,
            headers=partial(self._stream_headers, exchange),
            ping=partial(self._ping, exchange),
            hold_s=self._settings.ping_interval_s,
            interval_s=self._settings.ping_interval_s,
            is_open=True,
        )
        log.warning("request %s: node %s was cut off, another goes on", exchange.request_id, exchange.node)

    async def _forward(
        self,
        exchange: RequestState,
        lease: Lease,
        payload: Payload,
        headers: RawHeaders,
        send: Send,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        series = self._metrics.place(lease.model, lease.neuron.name)
        series.requests.inc()
        if lease.route == "cold":
            series.cold_starts.inc()
        path, outgoing, request = await self._outgoing(exchange, lease, payload, headers)
        if exchange.trace is not None:
            begin_attempt(exchange.trace, exchange, lease, path, request)
        response: aiohttp.ClientResponse | None = None

        def cut() -> None:
            if response is not None:
                response.close()

        watch = UpstreamTimeout(
            exchange,
            lease.neuron,
            self._settings.upstream_idle_timeout_s,
            loop,
            silence_s=self._settings.stream_silence_s,
            cut=cut,
        )
        if exchange.sent_at is None:
            exchange.sent_at = loop.time()
        try:
            response = await lease.neuron.post(path, outgoing.data(), request)
            lease.answered(response.status, exchange)
            if exchange.trace is not None:
                exchange.trace.answered(response.status)
            series.duration.observe(loop.time() - exchange.started_at)
            await self._answers.relay(exchange, response, lease.neuron, send, loop)
        except (aiohttp.ClientError, OSError) as exc:
            settle = partial(self._broken_off, exchange, lease, series, exc, is_begun=response is not None)
            is_neuron = not isinstance(lease.neuron, OpenAIServer)
            if is_neuron and not exchange.has_answered and not isinstance(exc, aiohttp.ClientConnectorError):
                raise Unanswered(settle=settle) from exc
            settle()
        except UpstreamFault as fault:
            lease.failed()
            series.errors.inc()
            log.warning("request %s: node %s: %s", exchange.request_id, lease.neuron.name, fault)
            exchange.outcome = "upstream_failed"
            raise fault.error from None
        except asyncio.CancelledError:
            if isinstance(exchange.interruption, ApiError) and exchange.interruption.code == "upstream_timeout":
                lease.failed()
            raise
        finally:
            watch.cancel()
            if exchange.trace is not None:
                end_attempt(exchange.trace, exchange, sys.exc_info()[1])
            if response is not None:
                response.release() if response.content.at_eof() else response.close()

    def _broken_off(
        self, exchange: RequestState, lease: Lease, series: ModelSeries, exc: BaseException, *, is_begun: bool
    ) -> NoReturn:
        """A node could not be reached, or broke off. Raises where the request goes from here, or what ends it."""
        if exchange.stream is not None and exchange.stream.is_resumable and exchange.num_resumes < MAX_RESUMES:
            lease.failed()
            self._poller.nudge(lease.neuron.name)
            raise BrokenStream from exc
        if isinstance(exc, aiohttp.ClientConnectorError | aiohttp.ServerDisconnectedError | ConnectionError):
            self._poller.nudge(lease.neuron.name)
        if not is_begun and exchange.num_attempts < MAX_ATTEMPTS and is_dead_connection(exc):
            raise StaleRoute from exc
        lease.failed()
        series.errors.inc()
        log.warning("request %s: node %s: %s", exchange.request_id, lease.neuron.name, describe(exc))
        exchange.outcome = "upstream_failed"
        raise upstream_failed(exc) from exc

    async def _outgoing(
        self, exchange: RequestState, lease: Lease, payload: Payload, headers: RawHeaders
    ) -> tuple[str, Payload, CIMultiDict[str]]:
        """Path, body and headers of the request as this node understands it.

        Raises `ApiError` where the request is read here, to be translated, and is bad.
        """
        assert exchange.model is not None
        neuron = lease.neuron
        if isinstance(neuron, OpenAIServer):
            translation, outgoing = await self._translated(exchange, neuron, lease.neuron_model, payload)
            exchange.translation = translation
            request = foreign_headers(
                headers,
                request_id=exchange.request_id,
                is_translated=translation.label is not None,
                secrets=neuron.secret_headers,
                also=neuron.forward_headers,
            )
            return translation.path, outgoing, request
        exchange.translation = None
        principal = exchange.principal.upstream_headers if exchange.principal is not None else ()
        request = request_headers(
            headers,
            request_id=exchange.request_id,
            model=lease.neuron_model,
            principal=principal,
            secrets=neuron.secret_headers,
        )
        stream = exchange.stream
        if stream is not None and stream.head is not None:
            state, request[RESUME_HEADER] = resume_state(stream.head, bytes(stream.batches))
            payload = payload.behind(state)
        return exchange.surface.upstream_path, payload, request

    async def _translated(
        self, exchange: RequestState, neuron: OpenAIServer, model: str, payload: Payload
    ) -> tuple[Translation, Payload]:
        """model: as the server calls it. Raises `ApiError` where the request is bad, or cannot be said there."""
        assert exchange.model is not None
        surface, filters = exchange.surface, self._current.config.prompt_filters
        if not is_translated(surface):
            translation: Translation = PassingThrough(surface.upstream_path, b"", exchange.model)
            if model == exchange.model:
                return translation, payload
            return translation, await self._large_bodies.renamed(payload, model, exchange)
        return await self._large_bodies.translated(payload, model, exchange, filters, extensions=neuron.extensions)

    async def _fail(self, exchange: RequestState, error: ApiError, body: RequestBody, send: Send) -> None:
        """Say `error` in the surface's dialect: as a status while that is possible, else as the stream's last event."""
        surface = exchange.surface
        if exchange.outcome == "ok":
            exchange.outcome = "timeout" if error.kind == "timeout" else "rejected"
            if error.code == "shutting_down":
                exchange.outcome = "shutdown"
        exchange.error = exchange.error or f"{error.code or error.kind}: {error.message}"
        if exchange.outcome not in ("upstream_error", "upstream_failed"):
            self._metrics.rejections.labels(error.code or error.kind).inc()
        if await exchange.answer():
            exchange.status = status_of(error, surface.dialect)
            final = exchange.error_event(error)
            if exchange.is_stream:
                await send({"type": "http.response.body", "body": final, "more_body": False})
            return  # A body cut short: closing without the rest is the only way left to tell.
        status = exchange.status = status_of(error, surface.dialect)
        headers = self._own_headers(exchange)
        headers.append(JSON_CONTENT_TYPE)
        headers.extend((name.encode("ascii"), value.encode("ascii")) for name, value in headers_of(error).items())
        if self.is_draining:
            headers.append((b"connection", b"close"))
        exchange.response_started = True
        await body.respond(send, status, headers, error_body(error, surface.dialect, exchange.request_id))

    # ------------------------------------------------------------------------------------------ headers

    def _own_headers(self, exchange: RequestState) -> RawHeaders:
        headers = identity_headers(
            exchange.request_id,
            node=exchange.node,
            model=exchange.resolved,
            route=exchange.route or ("refused" if exchange.resolved is not None else None),
            translated=exchange.translation.label if exchange.translation is not None else None,
        )
        headers.extend(exchange.cors)
        if exchange.principal is not None:
            headers.extend(limit_headers(exchange.principal, exchange.surface.dialect, self._identity.clock))
        return headers

    def _stream_headers(self, exchange: RequestState) -> RawHeaders:
        """For a stream that opens before the neuron answers, and maybe before a node is known."""
        return [*EVENT_STREAM_HEADERS, *self._own_headers(exchange)]
