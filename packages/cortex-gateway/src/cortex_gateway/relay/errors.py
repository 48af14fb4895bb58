"""Errors as clients read them when a neuron, or the gateway, cannot finish. Details go to the log (G8)."""

from __future__ import annotations

import re

import aiohttp
import msgspec
from cortex_core.dialects.limits import MAX_FOREIGN_ERROR_BYTES
from cortex_core.errors import ENDED_ENGINE, REQUEST_KILLS_ENGINE, ApiError

from cortex_gateway.fleet.neuron import GATEWAY_REFUSALS, refusal


def shutting_down() -> ApiError:
    return ApiError("overloaded", "The gateway is shutting down; ask again.", code="shutting_down", retry_after=5)


def too_many_requests(max_active: int) -> ApiError:
    return ApiError(
        "overloaded",
        f"The gateway has {max_active} requests under way and cannot take another; ask again.",
        code="requests_full",
        retry_after=1,
        extras={"max_requests": max_active},
    )


def is_dead_connection(exc: BaseException) -> bool:
    """Whether the request met a connection that the neuron had just closed: it was never read there."""
    return isinstance(exc, aiohttp.ServerDisconnectedError | ConnectionResetError | BrokenPipeError) or (
        isinstance(exc, aiohttp.ClientOSError) and not isinstance(exc, aiohttp.ClientConnectorError)
    )


def is_unreached(exc: BaseException) -> bool:
    """Whether no connection came about: nothing was sent."""
    return isinstance(exc, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError)


REFUSALS_ELSEWHERE = (429, 500, 502, 503, 529)
"""What a node refuses with, where another one may answer."""

_STALE_CODES = (b"model_not_found", b"engine_restarting", b"model_loading", b"model_unloading")


def is_stale_route(status: int, body: bytes) -> bool:
    """Whether a neuron refused because the model is not (or not yet) where our last poll saw it."""
    return status in (404, 503, 529) and any(b'"%s"' % code in body for code in _STALE_CODES)


_BLAME = tuple(b'code":"%s"' % code for code in (REQUEST_KILLS_ENGINE.encode(), b"engine_fault"))


def blames_request(body: bytes) -> bool:
    """Whether a neuron says in an error that the request ends its engine, also one that calls it by its older name."""
    return any(code in body for code in _BLAME)


_ENDED_ENGINE = re.compile(rb'"%s":"([0-9a-z-]{1,64})"' % ENDED_ENGINE.encode())


def ended_engine(error: bytes) -> str | None:
    """The engine that ended while it held the request, where a neuron gives that as the reason of its error."""
    found = _ENDED_ENGINE.search(error)
    return None if found is None else found[1].decode()


_GATEWAY_REFUSALS = tuple(b'"%s"' % code.encode() for code in sorted(GATEWAY_REFUSALS))


def is_refusal_of_gateway(status: int, body: bytes) -> bool:
    """Whether a neuron refused the gateway, and not what its client asks."""
    return status in (401, 403, 421) and any(code in body for code in _GATEWAY_REFUSALS)


def gateway_refused() -> ApiError:
    return ApiError(
        "internal",
        "The neuron refuses this gateway; the gateway's operator can read why.",
        code="neuron_refuses_gateway",
        status=502,
    )


def upstream_failed(exc: BaseException) -> ApiError:
    what = "could not be reached" if is_unreached(exc) else "did not finish its answer"
    return ApiError(
        "internal",
        f"The neuron {what}; ask again.",
        code="upstream_connection_error",
        retry_after=1,
        status=502,
    )


class _Named(msgspec.Struct):
    param: str | None = None


class _Envelope(msgspec.Struct):
    error: _Named


_decode_envelope = msgspec.json.Decoder(_Envelope).decode


def _param(body: bytes) -> str | None:
    """The field that an OpenAI envelope names; Anthropic's has it in the message."""
    if len(body) > MAX_FOREIGN_ERROR_BYTES:
        return None
    try:
        return _decode_envelope(body).error.param
    except (msgspec.DecodeError, RecursionError):
        return None


def as_api_error(status: int, body: bytes, retry_after: str | None) -> ApiError:
    """A neuron's error in our words, where its own cannot be passed on as they are."""
    refused = refusal(status, body, retry_after=retry_after)
    message = refused.message if refused.kind is not None else f"The neuron answered with status {status}."
    match status:
        case 400 | 415 | 422:
            return ApiError("invalid_request", message, code=refused.kind, param=_param(body), status=status)
        case 404:
            return ApiError("not_found", message, code=refused.kind or "not_found")
        case 405:
            return ApiError("method_not_allowed", message)
        case 413:
            return ApiError("request_too_large", message, code=refused.kind)
        case 429:
            return ApiError("rate_limit", message, code=refused.kind, retry_after=refused.retry_after)
        case 503 | 529:
            return ApiError("overloaded", message, code=refused.kind, retry_after=refused.retry_after or 2)
        case 504:
            return ApiError("timeout", message, code=refused.kind, retry_after=refused.retry_after)
        case _:
            return ApiError("internal", message, code=refused.kind or "upstream_error", status=status)
