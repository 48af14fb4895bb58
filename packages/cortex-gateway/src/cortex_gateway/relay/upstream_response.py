"""A node's answer on its way to the client: events as they come, JSON in one piece, refusals, translated ones.

It says by an exception where the request has to go elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import aiohttp
from cortex_core.dialects.limits import MAX_WHOLE_ANSWER_BYTES
from cortex_core.errors import ApiError

from cortex_gateway.configuration.current import Current
from cortex_gateway.fleet.neuron import NeuronClient
from cortex_gateway.fleet.openai_server import OpenAIServer
from cortex_gateway.http.asgi import JSON_CONTENT_TYPE, RawHeaders, Send
from cortex_gateway.http.headers import EVENT_STREAM_HEADERS, response_headers
from cortex_gateway.relay.accounting import generated_tokens
from cortex_gateway.relay.blame import MOST_DEATHS
from cortex_gateway.relay.errors import (
    as_api_error,
    blames_request,
    ended_engine,
    gateway_refused,
    is_refusal_of_gateway,
    is_stale_route,
)
from cortex_gateway.relay.request_state import RequestState
from cortex_gateway.relay.retries import MAX_ATTEMPTS, MAX_RESUMES, BrokenStream, StaleRoute, go_elsewhere
from cortex_gateway.relay.silence import PingedSend
from cortex_gateway.relay.sse_relay import ForeignStream, SseRelay, scan_usage
from cortex_gateway.translation.answer_stream import AnswerStream
from cortex_gateway.translation.errors import UpstreamFault, retry_advice
from cortex_gateway.translation.translation import WholeAnswer

log = logging.getLogger(__name__)

MAX_BUFFERED_ANSWER = 2**20
MAX_LOGGED_ERROR = 600


class AnswerRelay:
    """own_headers: what the gateway adds to every answer."""

    def __init__(self, own_headers: Callable[[RequestState], RawHeaders], current: Current) -> None:
        self._own_headers = own_headers
        self._current = current

    async def relay(
        self,
        exchange: RequestState,
        response: aiohttp.ClientResponse,
        neuron: NeuronClient,
        send: Send,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        """Raises what ends the exchange (`ApiError`, `ClientGone`, `aiohttp.ClientError`) or sends it elsewhere."""
        if response.status >= 400:
            await self._refusal(exchange, response, neuron, send)
            return
        translation = exchange.translation
        is_events = response.headers.get("content-type", "").startswith("text/event-stream")
        events: AnswerStream | None = SseRelay(is_hop=translation is None) if is_events else None
        first = b""
        if translation is not None:
            if not exchange.is_stream and (answer := translation.whole(is_events=is_events)) is not None:
                await self._translated(exchange, response, answer, send, loop)
                return
            if translation.label is not None:
                events = translation.stream(is_events=is_events)
            if events is not None:
                # Such a server sends no pings: the gateway's go on until there is something to say.
                while not first:
                    chunk = await response.content.readany()
                    first = events.feed(chunk) if chunk else events.flush()
                    if not chunk:
                        break
        elif is_events and exchange.stream is not None:
            events = exchange.stream
            events.rejoin()
        is_open = await exchange.answer()
        if events is not None:
            if not is_open:
                headers = self._answer_headers(exchange, response)
                for name, value in EVENT_STREAM_HEADERS[1:]:
                    if not any(given == name for given, _ in headers):
                        headers.append((name, value))
                exchange.status = response.status
                exchange.response_started = True
                await send({"type": "http.response.start", "status": response.status, "headers": headers})
            exchange.stream = events
            if translation is None:
                await self._events(exchange, response, events, first, send, loop)
                return
            interval_s = self._current.config.gateway.ping_interval_s
            pinged = PingedSend(send, exchange.surface.ping, interval_s, loop)
            try:
                await self._events(exchange, response, events, first, pinged, loop)
            finally:
                await pinged.stop()
        elif is_open:
            exchange.outcome = "upstream_failed"
            raise ApiError("internal", "The neuron did not answer with a stream.", code="upstream_malformed_response")
        else:
            await self._whole(exchange, response, send, loop)

    async def _events(
        self,
        exchange: RequestState,
        response: aiohttp.ClientResponse,
        events: AnswerStream,
        data: bytes,
        send: Send,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        """The hot loop: one read, one write, nothing decoded but where it is translated.

        data: what came of reads before.
        """
        exchange.status = 200
        exchange.response_started = True
        feed = events.feed
        readany = response.content.readany
        now = loop.time
        try:
            if data:
                exchange.last_byte_at = now()
                exchange.answers(exchange.last_byte_at)
                await send({"type": "http.response.body", "body": data, "more_body": True})
            while chunk := await readany():
                data = feed(chunk)
                exchange.last_byte_at = now()
                if not data:
                    continue
                if not exchange.has_answered and not data.startswith((b":", b"event: ping")):
                    exchange.answers(exchange.last_byte_at)
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except ForeignStream:
            raise ApiError(
                "internal", "The neuron did not go on with the stream.", code="upstream_malformed_response"
            ) from None
        finally:
            exchange.usage = events.usage()
            if exchange.grant is not None:
                exchange.generated = generated_tokens(events)
        if events.is_unfinished and exchange.num_resumes < MAX_RESUMES:
            go_elsewhere(exchange, BrokenStream(), ended_engine(events.unfinished_mark))
        exchange.is_blamed = blames_request(events.last_error)
        exchange.settle()
        last = events.flush()
        exchange.usage = events.usage()
        await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _translated(
        self,
        exchange: RequestState,
        response: aiohttp.ClientResponse,
        answer: WholeAnswer,
        send: Send,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        """An answer that is put together here, from a stream or from one that is not."""
        num_bytes = 0
        while chunk := await response.content.readany():
            exchange.last_byte_at = loop.time()
            if not exchange.has_answered:
                exchange.answers(exchange.last_byte_at)
            num_bytes += len(chunk)
            if num_bytes > MAX_WHOLE_ANSWER_BYTES:
                raise UpstreamFault(ApiError("internal", "The server's answer is too large.", status=502))
            answer.feed(chunk)
        data = answer.body()
        exchange.usage = answer.usage()
        exchange.status = 200
        exchange.settle()
        exchange.response_started = True
        headers = [JSON_CONTENT_TYPE, *self._own_headers(exchange), (b"content-length", b"%d" % len(data))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": data, "more_body": False})

    async def _whole(
        self, exchange: RequestState, response: aiohttp.ClientResponse, send: Send, loop: asyncio.AbstractEventLoop
    ) -> None:
        headers = self._answer_headers(exchange, response)
        length = response.content_length
        if length is not None and length <= MAX_BUFFERED_ANSWER:
            data = await response.read()
            exchange.last_byte_at = loop.time()
            exchange.answers(exchange.last_byte_at)
            exchange.usage = scan_usage(data)
            exchange.status = response.status
            exchange.settle()
            exchange.response_started = True
            headers.append((b"content-length", b"%d" % len(data)))
            await send({"type": "http.response.start", "status": response.status, "headers": headers})
            await send({"type": "http.response.body", "body": data, "more_body": False})
            return
        if length is not None:
            headers.append((b"content-length", b"%d" % length))
        exchange.status = response.status
        exchange.response_started = True
        await send({"type": "http.response.start", "status": response.status, "headers": headers})
        tail = b""
        while chunk := await response.content.readany():
            exchange.last_byte_at = loop.time()
            if not exchange.has_answered:
                exchange.answers(exchange.last_byte_at)
            tail = (tail + chunk)[-4096:]
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        exchange.usage = scan_usage(tail)
        exchange.settle()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _refusal(
        self,
        exchange: RequestState,
        response: aiohttp.ClientResponse,
        neuron: NeuronClient,
        send: Send,
    ) -> None:
        """An error of the neuron: its status, headers and body pass if they are in an API's shape."""
        pieces, num_bytes = [], 0
        while num_bytes < MAX_BUFFERED_ANSWER and (piece := await response.content.readany()):
            pieces.append(piece)
            num_bytes += len(piece)
        data = b"".join(pieces)[:MAX_BUFFERED_ANSWER]
        is_refused = not isinstance(neuron, OpenAIServer) and is_refusal_of_gateway(response.status, data)
        engine = None if isinstance(neuron, OpenAIServer) else ended_engine(data)
        if is_refused or is_stale_route(response.status, data):
            if exchange.stream is not None and exchange.num_resumes < MAX_RESUMES:
                go_elsewhere(exchange, BrokenStream(), engine)
            if exchange.num_attempts < (MAX_ATTEMPTS if engine is None else MOST_DEATHS):
                go_elsewhere(exchange, StaleRoute(), engine)
        exchange.is_blamed = not isinstance(neuron, OpenAIServer) and blames_request(data)
        translation = exchange.translation
        data = neuron.without_secrets(data)
        snippet = data[:MAX_LOGGED_ERROR].decode("utf-8", "replace")
        exchange.outcome = "upstream_error"
        exchange.error = snippet
        log.warning("request %s: node %s answered %d: %s", exchange.request_id, exchange.node, response.status, snippet)
        if is_refused:
            raise gateway_refused()
        if translation is not None:
            raise translation.refused(response.status, data, retry_advice(response.headers))
        is_json = response.headers.get("content-type", "").startswith("application/json")
        is_open = await exchange.answer()
        if is_open or not is_json:
            raise as_api_error(response.status, data, response.headers.get("retry-after"))
        headers = self._answer_headers(exchange, response)
        exchange.status = response.status
        exchange.settle()
        exchange.response_started = True
        headers.append((b"content-length", b"%d" % len(data)))
        await send({"type": "http.response.start", "status": response.status, "headers": headers})
        await send({"type": "http.response.body", "body": data, "more_body": False})

    def _answer_headers(self, exchange: RequestState, response: aiohttp.ClientResponse) -> RawHeaders:
        headers = response_headers(response.raw_headers, is_foreign=exchange.translation is not None)
        headers.extend(self._own_headers(exchange))
        return headers
