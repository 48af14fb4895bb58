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
from typing import NoReturn

import aiohttp
from cortex_core.dialects.errors import error_body, headers_of, status_of
from cortex_core.errors import ApiError
from cortex_core.hop import RESUME_HEADER, resume_state
from multidict import CIMultiDict

from cortex_gateway.bodies.large_bodies import LargeBodies
from cortex_gateway.bodies.payload import Payload
from cortex_gateway.bodies.pool import BodyWorkers
from cortex_gateway.configuration.current import Current
from cortex_gateway.fleet.neuron import describe
from cortex_gateway.fleet.openai_server import OpenAIServer
from cortex_gateway.fleet.poller import Poller
from cortex_gateway.http.asgi import JSON_CONTENT_TYPE, SHORTCUT, RawHeaders, Receive, Scope, Send, Shortcut
from cortex_gateway.http.body import BodyMemory, ClientGone, RequestBody
from cortex_gateway.http.client_writer import ClientWriter
from cortex_gateway.http.headers import foreign_headers, request_headers
from cortex_gateway.identity.identity import Identity
from cortex_gateway.identity.principal import limit_headers
from cortex_gateway.observability.metrics import ModelSeries
from cortex_gateway.placement.placement import Lease, Placement
from cortex_gateway.relay.accounting import Accounting
from cortex_gateway.relay.client_disconnect import DisconnectWatch
from cortex_gateway.relay.deaths import Deaths
from cortex_gateway.relay.errors import (
    is_dead_connection,
    is_unreached,
    shutting_down,
    too_many_requests,
    upstream_failed,
)
from cortex_gateway.relay.request_state import CLIENT_GONE_STATUS, RequestState
from cortex_gateway.relay.retries import MAX_ATTEMPTS, MAX_RESUMES, BrokenStream, NotServed, StaleRoute, Unanswered
from cortex_gateway.relay.spans import begin_attempt, end_attempt
from cortex_gateway.relay.upstream_response import relay_response
from cortex_gateway.relay.upstream_timeout import UpstreamTimeout
from cortex_gateway.surfaces.surface import Surface
from cortex_gateway.translation.errors import UpstreamFault
from cortex_gateway.translation.translation import PassingThrough, Translation, is_translated

logger = logging.getLogger(__name__)


class _Attempt:
    """A request at one node: response once its head is there."""

    __slots__ = ("_request", "response")

    def __init__(self, request: RequestState) -> None:
        self._request = request
        self.response: aiohttp.ClientResponse | None = None

    def leave(self) -> None:
        """The node does not answer any more: what can go elsewhere goes now."""
        request = self._request
        if not request.leaves():
            return
        if self.response is not None:
            self.response.close()
        elif request.task is not None:
            request.task.cancel()

    def end(self) -> None:
        """To be called while whatever was raised is being handled."""
        request, response = self._request, self.response
        if request.trace is not None:
            end_attempt(request.trace, request, sys.exc_info()[1])
        if response is not None:
            response.release() if response.content.at_eof() else response.close()


class Relay:
    """Carries requests of all surfaces; knows which are in flight.

    max_active: more requests at once are a 503, for each may need a descriptor, and HTTP/2 brings many over one
    connection; None for any number.
    """

    def __init__(
        self,
        identity: Identity,
        placement: Placement,
        poller: Poller,
        accounting: Accounting,
        body_workers: BodyWorkers,
        current: Current,
    ) -> None:
        self._identity = identity
        self._placement = placement
        self._poller = poller
        self._accounting = accounting
        self._metrics = accounting.metrics
        self._current = current
        self._body_memory = BodyMemory(current.config.gateway.max_body_memory_bytes)
        self._deaths = Deaths(poller, accounting.metrics)
        self._large_bodies = LargeBodies(body_workers)
        self._active: set[RequestState] = set()
        self._idle: asyncio.Event = asyncio.Event()
        self._idle.set()
        self.is_draining = False
        self.max_active: int | None = None

    # ------------------------------------------------------------------------------------------ drain

    @property
    def num_active(self) -> int:
        return len(self._active)

    async def wait_idle(self) -> None:
        await self._idle.wait()

    def end_all(self) -> None:
        """End what is still running: streams with an error event, the others with a 503."""
        for request in list(self._active):
            request.interrupt(shutting_down())

    # ------------------------------------------------------------------------------------------ a request

    async def handle(self, surface: Surface, scope: Scope, receive: Receive, send: Send, cors: RawHeaders) -> None:
        """cors: what the door wants on every answer."""
        settings = self._current.config.gateway
        shortcut: Shortcut | None = scope.get("extensions", {}).get(SHORTCUT)
        self._body_memory.max_bytes = settings.max_body_memory_bytes
        capture, send = self._accounting.capture(scope, send)
        body = RequestBody(
            receive,
            max_bytes=settings.max_body_bytes,
            timeout_s=settings.body_timeout_s,
            memory=self._body_memory,
            shortcut=shortcut,
        )
        request = RequestState(surface, scope, body, ClientWriter(send), cors)
        self._accounting.begin(request, scope, capture)
        self._active.add(request)
        self._idle.clear()
        try:
            await self._answer(request, receive, shortcut)
        except ClientGone:
            request.status, request.outcome = CLIENT_GONE_STATUS, "client_gone"
        finally:
            request.settle()
            request.writer.before_end = None  # or they would hold on to each other
            body.release()
            self._active.discard(request)
            if not self._active:
                self._idle.set()
            self._accounting.end(request)

    async def _answer(self, request: RequestState, receive: Receive, shortcut: Shortcut | None) -> None:
        watch: DisconnectWatch | None = None
        try:
            try:
                if self.is_draining:
                    raise shutting_down()
                if self.max_active is not None and self.num_active > self.max_active:
                    raise too_many_requests(self.max_active)
                if not self._identity.is_off:
                    await self._authenticate(request)
                request.payload = Payload(await request.body.read_pieces(request.headers))
                if shortcut is not None:
                    shortcut.on_disconnect(request.client_left)
                else:
                    watch = DisconnectWatch(receive, request.client_left)
                await self._read(request)
                await self._route(request)
            except asyncio.CancelledError:
                if request.interruption is None:
                    raise
                asyncio.current_task().uncancel()  # type: ignore[union-attr]
                raise request.interruption from None
        except ApiError as error:
            request.settle()
            await self._fail(request, error)
        except ClientGone:
            raise
        except Exception as exc:
            logger.exception("request %s failed in the gateway", request.request_id)
            request.settle()
            request.outcome = "error"
            request.error = describe(exc)
            fault = ApiError("internal", "The gateway failed on this request.", code="internal_error")
            await self._fail(request, fault)
        finally:
            if shortcut is not None:
                shortcut.on_disconnect(None)
            elif watch is not None:
                watch.cancel()
            await request.writer.quiet()

    async def _authenticate(self, request: RequestState) -> None:
        principal = request.principal = await self._identity.authenticate(request.headers)
        if principal is not None:
            if not self._current.config.entitlements.share_prefixes:
                request.cache_salt = principal.cache_salt
            request.priority = principal.priority(request.headers)
            request.limit_headers = partial(limit_headers, principal, request.surface.dialect, self._identity.clock)

    async def _read(self, request: RequestState) -> None:
        """What the body says of itself. A stream that waits is kept alive from here on."""
        payload, surface, writer = request.payload, request.surface, request.writer
        if not payload.is_quick:
            await self._large_bodies.read(payload, request)
        if request.capture is not None:
            if payload.facts is None:
                await request.capture.came(payload.whole())
            else:
                request.capture.came_large(payload.num_bytes, payload.facts.shown)
        envelope = payload.envelope()
        request.model = envelope.model
        if envelope.stream and surface.can_stream:
            request.is_stream = True
            writer.framing = surface.framing
            settings = self._current.config.gateway
            self._keep_alive(request, settings.stream_hold_s)

    def _keep_alive(self, request: RequestState, first_s: float) -> None:
        request.writer.keep_alive(
            first_s,
            self._current.config.gateway.ping_interval_s,
            headers=request.own_headers,
            note=partial(self._waiting_note, request),
        )

    def _waiting_note(self, request: RequestState) -> bytes:
        """Where it is wanted: what the stream waits for."""
        if self._current.config.gateway.show_loading and request.resolved is not None:
            return self._placement.waiting_note(request.resolved)
        return b""

    async def _route(self, request: RequestState) -> None:
        """Ask one node after another, as long as there is reason to."""
        assert request.model is not None
        model = request.resolved = self._placement.resolve(request.model)
        has_awaited = bool(self._deaths.suspects)
        if has_awaited:
            await self._deaths.check(request)
        if request.principal is not None:
            has_awaited = True
            request.grant = await self._identity.admit(
                request.principal, request.model, model, request.payload, is_metered=request.surface.generates
            )
        if has_awaited and not request.payload.is_quick:  # else the turn in which it was read still lasts
            await self._large_bodies.turn(request.payload)
        while True:
            lease = await self._lease(request, model)
            with lease:
                node = lease.neuron.name
                is_taken = bool(self._deaths.suspects) and self._deaths.is_taken(request, node)
                if not is_taken:
                    try:
                        await self._try(request, lease)
                        return
                    except StaleRoute as stale:
                        if not isinstance(stale, NotServed):
                            lease.discard()
                        self._metrics.retries.labels(model, node).inc()
                    except BrokenStream:
                        lease.discard()
                        self._metrics.resumes.labels(model, node).inc()
                        await self._hold(request)
            if is_taken:
                await self._deaths.freed(request)
            else:
                await self._turn_from(request, node)
            if self._deaths.suspects:
                await self._deaths.check(request)

    async def _turn_from(self, request: RequestState, node: str) -> None:
        """The node has failed the request. Where another is to be asked, nobody waits to know why; else look again."""
        if request.is_lost or request.has_been_refused:
            request.avoid |= {node}
            self._poller.nudge(node)
        else:
            await self._poller.refresh(node)

    def _has_other(self, request: RequestState) -> bool:
        """Whether a node that has not failed the request, nor has it now, serves its model."""
        assert request.resolved is not None and request.node is not None
        avoid = request.avoid | {request.node}
        return self._placement.has_other(request.resolved, avoid, neurons_only=request.stream is not None)

    async def _lease(self, request: RequestState, model: str) -> Lease:
        is_resuming, is_moving = request.num_resumes > 0, request.num_moves + request.num_resumes > 0
        lease = None if is_moving else self._placement.try_now(model, request, request.avoid)
        if lease is not None:
            return lease
        settings = self._current.config.gateway
        wait_s = settings.load_wait_s
        if not request.is_stream:
            wait_s = min(wait_s, settings.unstreamed_wait_s)
        return await self._placement.wait(
            model,
            request,
            wait_s=wait_s,
            on_wait=request.waits,
            avoid=request.avoid,
            is_moving=is_moving,
            neurons_only=is_resuming,
        )

    async def _hold(self, request: RequestState) -> None:
        """Keep a client's broken stream alive until another neuron goes on with it."""
        await request.writer.quiet()
        request.num_resumes += 1
        self._keep_alive(request, self._current.config.gateway.ping_interval_s)
        logger.warning("request %s: node %s was cut off, another goes on", request.request_id, request.node)

    # ------------------------------------------------------------------------------------------ an attempt

    async def _try(self, request: RequestState, lease: Lease) -> None:
        """One node is asked. Raises `StaleRoute` and `BrokenStream` where the request goes elsewhere."""
        request.begin_attempt(lease.neuron.name, lease.route)
        if self._deaths.suspects:
            self._deaths.begin(request, lease)
        sent_at = request.loop.time()
        try:
            await self._forward(request, lease)
            if request.trial is not None:
                request.trial.answered()
            if request.is_blamed:
                await self._deaths.found(request, lease)
        except Unanswered as unanswered:
            await self._deaths.ended(request, lease, unanswered, request.loop.time() - sent_at)
        finally:
            if request.trial is not None:
                self._deaths.end(request)

    async def _forward(self, request: RequestState, lease: Lease) -> None:
        series = self._metrics.places[lease.model, lease.neuron.name]
        series.requests.inc()
        if lease.route == "cold":
            series.cold_starts.inc()
        path, outgoing, headers = await self._outgoing(request, lease)
        if request.trace is not None:
            begin_attempt(request.trace, request, lease, path, headers)
        attempt = _Attempt(request)
        settings, has_other = self._current.config.gateway, partial(self._has_other, request)
        timeout = UpstreamTimeout(request, lease.neuron, settings, leave=attempt.leave, has_other=has_other)
        if request.sent_at is None:
            request.sent_at = request.loop.time()
        lease.on_lost = attempt.leave
        try:
            response = attempt.response = await lease.neuron.post(path, outgoing.data(), headers)
            lease.answered(response.status, request)
            if request.trace is not None:
                request.trace.answered(response.status)
            series.duration.observe(request.loop.time() - request.started_at)
            interval_s = settings.ping_interval_s
            await relay_response(request, response, lease, ping_interval_s=interval_s, has_other=has_other)
        except (aiohttp.ClientError, OSError) as exc:
            self._failed(request, lease, series, exc, is_begun=attempt.response is not None)
        except UpstreamFault as fault:
            lease.failed()
            series.errors.inc()
            logger.warning("request %s: node %s: %s", request.request_id, lease.neuron.name, fault)
            request.outcome = "upstream_failed"
            raise fault.error from None
        except asyncio.CancelledError:
            self._cancelled(request, lease)
            raise
        finally:
            lease.on_lost = None
            timeout.cancel()
            attempt.end()

    def _failed(
        self, request: RequestState, lease: Lease, series: ModelSeries, exc: BaseException, *, is_begun: bool
    ) -> NoReturn:
        """The connection to a node failed. Raises where the request goes from here, or what ends it; `Unanswered` where
        the process may have ended under it."""
        if request.is_lost:
            self._raise_lost(request, exc)
        settle = partial(self._broken_off, request, lease, series, exc, is_begun=is_begun)
        is_neuron = not isinstance(lease.neuron, OpenAIServer)
        if is_neuron and not request.has_answered and not is_unreached(exc):
            raise Unanswered(settle=settle) from exc
        settle()

    def _cancelled(self, request: RequestState, lease: Lease) -> None:
        """The request was interrupted, from outside or because it leaves its node: then raises as `_raise_lost`."""
        if request.is_lost and request.interruption is None:
            asyncio.current_task().uncancel()  # type: ignore[union-attr]
            self._raise_lost(request, None)
        if isinstance(request.interruption, ApiError) and request.interruption.code == "upstream_timeout":
            lease.failed()

    @staticmethod
    def _raise_lost(request: RequestState, cause: BaseException | None) -> NoReturn:
        """The request has left a node that does not answer any more."""
        logger.warning("request %s: node %s is lost, another is asked", request.request_id, request.node)
        raise (StaleRoute if request.stream is None else BrokenStream) from cause

    def _broken_off(
        self, request: RequestState, lease: Lease, series: ModelSeries, exc: BaseException, *, is_begun: bool
    ) -> NoReturn:
        """A node could not be reached, or broke off. Raises where the request goes from here, or what ends it."""
        if request.stream is not None and request.stream.is_resumable and request.num_resumes < MAX_RESUMES:
            lease.failed()
            self._poller.nudge(lease.neuron.name)
            raise BrokenStream from exc
        if is_unreached(exc) or isinstance(exc, aiohttp.ServerDisconnectedError | ConnectionError):
            self._poller.nudge(lease.neuron.name)
        if not is_begun and request.num_attempts < MAX_ATTEMPTS and is_dead_connection(exc):
            raise StaleRoute from exc
        lease.failed()
        series.errors.inc()
        logger.warning("request %s: node %s: %s", request.request_id, lease.neuron.name, describe(exc))
        if is_unreached(exc) and request.num_attempts < MAX_ATTEMPTS + request.num_moves and self._has_other(request):
            request.has_been_refused = True
            raise (NotServed if request.stream is None else BrokenStream) from exc
        request.outcome = "upstream_failed"
        raise upstream_failed(exc) from exc

    async def _outgoing(self, request: RequestState, lease: Lease) -> tuple[str, Payload, CIMultiDict[str]]:
        """Path, body and headers of the request as this node understands it.

        Raises `ApiError` where the request is read here, to be translated, and is bad.
        """
        assert request.model is not None
        neuron, payload = lease.neuron, request.payload
        if isinstance(neuron, OpenAIServer):
            translation, outgoing = await self._translated(request, neuron, lease.neuron_model)
            request.translation = translation
            foreign = foreign_headers(
                request.headers,
                request_id=request.request_id,
                is_translated=translation.label is not None,
                secrets=neuron.secret_headers,
                also=neuron.forward_headers,
            )
            return translation.path, outgoing, foreign
        request.translation = None
        principal = request.principal.upstream_headers if request.principal is not None else ()
        headers = request_headers(
            request.headers,
            request_id=request.request_id,
            model=lease.neuron_model,
            principal=principal,
            secrets=neuron.secret_headers,
            cache_salt=request.cache_salt,
            priority=request.priority,
        )
        stream = request.stream
        if stream is not None and stream.head is not None:
            state, headers[RESUME_HEADER] = resume_state(stream.head, bytes(stream.batches))
            payload = payload.behind(state)
        return request.surface.upstream_path, payload, headers

    async def _translated(self, request: RequestState, neuron: OpenAIServer, model: str) -> tuple[Translation, Payload]:
        """model: as the server calls it. Raises `ApiError` where the request is bad, or cannot be said there."""
        assert request.model is not None
        surface, payload = request.surface, request.payload
        if not is_translated(surface):
            translation: Translation = PassingThrough(surface.upstream_path, b"", request.model)
            if model == request.model:
                return translation, payload
            return translation, await self._large_bodies.renamed(payload, model, request)
        filters = self._current.config.prompt_filters
        return await self._large_bodies.translated(payload, model, request, filters, extensions=neuron.extensions)

    # ------------------------------------------------------------------------------------------ failing

    async def _fail(self, request: RequestState, error: ApiError) -> None:
        """Say `error` in the surface's dialect: as a status while that is possible, else as the stream's last event."""
        dialect, writer = request.surface.dialect, request.writer
        if request.outcome == "ok":
            request.outcome = "timeout" if error.kind == "timeout" else "rejected"
            if error.code == "shutting_down":
                request.outcome = "shutdown"
        request.error = request.error or f"{error.code or error.kind}: {error.message}"
        if request.outcome not in ("upstream_error", "upstream_failed"):
            self._metrics.rejections.labels(error.code or error.kind).inc()
        status = request.status = status_of(error, dialect)
        if await writer.quiet():
            last = request.failure(error)
            if last is not None:
                await writer.end(last)
            return  # A body cut short: closing without the rest is the only way left to tell.
        headers = request.own_headers()
        headers.append(JSON_CONTENT_TYPE)
        headers.extend((name.encode("ascii"), value.encode("ascii")) for name, value in headers_of(error).items())
        if self.is_draining:
            headers.append((b"connection", b"close"))
        body = error_body(error, dialect, request.request_id)
        await writer.answer(status, headers, body, unread=request.body)
