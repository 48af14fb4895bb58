"""Responses of nodes on their way to the client: events as they come, JSON in one piece, refusals, translated ones.

Where the request has to go elsewhere, an exception of `retries` says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import aiohttp
from cortex_core.dialects.limits import MAX_WHOLE_ANSWER_BYTES
from cortex_core.errors import ApiError
from cortex_core.hop import FINGERPRINT_HEADER

from cortex_gateway.fleet.openai_server import OpenAIServer
from cortex_gateway.http.asgi import JSON_CONTENT_TYPE, RawHeaders
from cortex_gateway.http.framing import EVENT_STREAM_HEADERS
from cortex_gateway.http.headers import response_headers
from cortex_gateway.placement.placement import Lease
from cortex_gateway.relay.accounting import generated_tokens
from cortex_gateway.relay.blame import MOST_DEATHS
from cortex_gateway.relay.errors import (
    REFUSALS_ELSEWHERE,
    as_api_error,
    blames_request,
    ended_engine,
    gateway_refused,
    is_refusal_of_gateway,
    is_stale_route,
)
from cortex_gateway.relay.request_state import RequestState
from cortex_gateway.relay.retries import MAX_ATTEMPTS, MAX_RESUMES, BrokenStream, NotServed, StaleRoute, go_elsewhere
from cortex_gateway.relay.sse_relay import ForeignStream, SseRelay, scan_usage
from cortex_gateway.translation.answer_stream import AnswerStream
from cortex_gateway.translation.errors import RETRY_BUSY_S, UpstreamFault, retry_advice, retry_seconds
from cortex_gateway.translation.translation import Translation, WholeAnswer

logger = logging.getLogger(__name__)

MAX_BUFFERED_ANSWER = 2**20
MAX_LOGGED_ERROR = 600


async def relay_response(
    request: RequestState,
    response: aiohttp.ClientResponse,
    lease: Lease,
    *,
    ping_interval_s: float,
    has_other: Callable[[], bool],
) -> None:
    """ping_interval_s: of a server that sends no pings of its own. has_other: whether another node can be asked.

    Raises what ends the request (`ApiError`, `ClientGone`, `aiohttp.ClientError`) or sends it elsewhere.
    """
    if response.status >= 400:
        await _refusal(request, response, lease, has_other)
        return
    is_events = response.headers.get("content-type", "").startswith("text/event-stream")
    translation, writer = request.translation, request.writer
    if translation is not None and not request.is_stream:
        answer = translation.whole(is_events=is_events)
        if answer is not None:
            await _translated(request, response, answer)
            return
    stream = _stream_of(request, translation, is_events=is_events)
    first = b""
    if translation is not None and stream is not None:
        # Such a server sends no pings: the gateway's go on until there is something to say.
        while not first:
            chunk = await response.content.readany()
            first = stream.feed(chunk) if chunk else stream.flush()
            if not chunk:
                break
    has_started = await writer.quiet()
    if stream is not None:
        _compare(request, response, lease)
        if not has_started:
            await writer.start(response.status, _stream_headers(request, response))
            if not first:
                await writer.flush()
        request.stream = stream
        if translation is not None:
            writer.keep_alive(ping_interval_s, ping_interval_s)
        await _events(request, response, stream, first)
    elif has_started:
        request.outcome = "upstream_failed"
        raise ApiError("internal", "The neuron did not answer with a stream.", code="upstream_malformed_response")
    else:
        await _whole(request, response)


def _compare(request: RequestState, response: aiohttp.ClientResponse, lease: Lease) -> None:
    """What a stream goes on with may be served otherwise than what it began with: then it is known."""
    fingerprint = response.headers.get(FINGERPRINT_HEADER)
    if request.num_resumes and (fingerprint is None or fingerprint != request.fingerprint):
        logger.warning(
            "request %s: goes on at node %s, which serves %s otherwise (%s) than where it began (%s): it may differ",
            request.request_id,
            lease.neuron.name,
            request.resolved,
            fingerprint or "unknown",
            request.fingerprint or "unknown",
        )
        request.is_mixed = True
    elif not request.num_resumes:
        request.fingerprint = fingerprint


def _stream_of(request: RequestState, translation: Translation | None, *, is_events: bool) -> AnswerStream | None:
    """How the answer is read where it is a stream: one that goes on, one that passes, or one that is translated."""
    if translation is not None and translation.label is not None:
        return translation.stream(is_events=is_events)
    if not is_events:
        return None
    if translation is None and request.stream is not None:
        request.stream.rejoin()
        return request.stream
    return SseRelay(is_hop=translation is None)


async def _events(request: RequestState, response: aiohttp.ClientResponse, stream: AnswerStream, data: bytes) -> None:
    """The hot loop: one read, one write, nothing decoded but where it is translated.

    data: what came of reads before.
    """
    request.has_begun = True
    writer = request.writer
    feed = stream.feed
    readany = response.content.readany
    now = request.loop.time
    try:
        if data:
            request.last_byte_at = now()
            request.answers(request.last_byte_at)
            await writer.write(data)
        while chunk := await readany():
            data = feed(chunk)
            request.last_byte_at = now()
            if not data:
                continue
            if not request.has_answered and stream.holds_answer(data):
                request.answers(request.last_byte_at)
            await writer.write(data)
    except ForeignStream:
        raise ApiError(
            "internal", "The neuron did not go on with the stream.", code="upstream_malformed_response"
        ) from None
    finally:
        request.usage = stream.usage()
        if request.grant is not None:
            request.generated = generated_tokens(stream)
    if stream.is_unfinished and request.num_resumes < MAX_RESUMES:
        go_elsewhere(request, BrokenStream(), ended_engine(stream.unfinished_mark))
    last_error = stream.last_error
    if last_error:
        request.is_blamed = blames_request(last_error)
    request.settle()
    await writer.quiet()
    last = stream.flush()
    request.usage = stream.usage()
    await writer.end(last)


async def _translated(request: RequestState, response: aiohttp.ClientResponse, answer: WholeAnswer) -> None:
    """An answer that is put together here, from a stream or from one that is not."""
    num_bytes = 0
    while chunk := await response.content.readany():
        request.last_byte_at = request.loop.time()
        if not request.has_answered:
            request.answers(request.last_byte_at)
        num_bytes += len(chunk)
        if num_bytes > MAX_WHOLE_ANSWER_BYTES:
            raise UpstreamFault(ApiError("internal", "The server's answer is too large.", status=502))
        answer.feed(chunk)
    data = answer.body()
    request.usage = answer.usage()
    await request.writer.answer(200, [JSON_CONTENT_TYPE, *request.own_headers()], data)


async def _whole(request: RequestState, response: aiohttp.ClientResponse) -> None:
    writer, headers = request.writer, _answer_headers(request, response)
    length = response.content_length
    if length is not None and length <= MAX_BUFFERED_ANSWER:
        data = await response.read()
        request.last_byte_at = request.loop.time()
        request.answers(request.last_byte_at)
        request.usage = scan_usage(data)
        await writer.answer(response.status, headers, data)
        return
    if length is not None:
        headers.append((b"content-length", b"%d" % length))
    request.has_begun = True
    await writer.start(response.status, headers)
    tail = b""
    while chunk := await response.content.readany():
        request.last_byte_at = request.loop.time()
        if not request.has_answered:
            request.answers(request.last_byte_at)
        tail = (tail + chunk)[-4096:]
        await writer.write(chunk)
    request.usage = scan_usage(tail)
    await writer.end()


async def _refusal(
    request: RequestState, response: aiohttp.ClientResponse, lease: Lease, has_other: Callable[[], bool]
) -> None:
    """An error of the neuron: its status, headers and body pass if they are in an API's shape."""
    neuron = lease.neuron
    pieces, num_bytes = [], 0
    while num_bytes < MAX_BUFFERED_ANSWER and (piece := await response.content.readany()):
        pieces.append(piece)
        num_bytes += len(piece)
    data = b"".join(pieces)[:MAX_BUFFERED_ANSWER]
    is_neuron = not isinstance(neuron, OpenAIServer)
    is_refused = is_neuron and is_refusal_of_gateway(response.status, data)
    engine = ended_engine(data) if is_neuron else None
    if is_refused or is_stale_route(response.status, data):
        if request.stream is not None and request.num_resumes < MAX_RESUMES:
            go_elsewhere(request, BrokenStream(), engine)
        if request.num_attempts < (MAX_ATTEMPTS if engine is None else MOST_DEATHS):
            go_elsewhere(request, StaleRoute(), engine)
    request.is_blamed = is_neuron and blames_request(data)
    advice = retry_advice(response.headers)
    if response.status == 429 and not is_neuron:
        lease.rest(retry_seconds(advice) or RETRY_BUSY_S)
    if response.status in REFUSALS_ELSEWHERE and not request.is_blamed and _may_ask_another(request) and has_other():
        logger.warning(
            "request %s: node %s answered %d, another is asked", request.request_id, neuron.name, response.status
        )
        request.has_been_refused = True
        raise NotServed if request.stream is None else BrokenStream
    data = neuron.without_secrets(data)
    snippet = data[:MAX_LOGGED_ERROR].decode("utf-8", "replace")
    request.outcome = "upstream_error"
    request.error = snippet
    logger.warning("request %s: node %s answered %d: %s", request.request_id, request.node, response.status, snippet)
    if is_refused:
        raise gateway_refused()
    if request.translation is not None:
        raise request.translation.refused(response.status, data, advice)
    is_json = response.headers.get("content-type", "").startswith("application/json")
    if await request.writer.quiet() or not is_json:
        raise as_api_error(response.status, data, response.headers.get("retry-after"))
    await request.writer.answer(response.status, _answer_headers(request, response), data)


def _may_ask_another(request: RequestState) -> bool:
    if request.stream is not None:
        return request.num_resumes < MAX_RESUMES
    return request.num_attempts < MAX_ATTEMPTS + request.num_moves


def _answer_headers(request: RequestState, response: aiohttp.ClientResponse) -> RawHeaders:
    headers = response_headers(response.raw_headers, is_foreign=request.translation is not None)
    headers.extend(request.own_headers())
    return headers


def _stream_headers(request: RequestState, response: aiohttp.ClientResponse) -> RawHeaders:
    """Beside the answer's own, what keeps a stream flowing through proxies."""
    headers = _answer_headers(request, response)
    named = {name for name, _ in headers} | {b"content-type"}
    headers.extend(pair for pair in EVENT_STREAM_HEADERS if pair[0] not in named)
    return headers
