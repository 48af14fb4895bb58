"""Attributes of a request's spans: whose fault an end was, and what is no fault at all."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from cortex_core.errors import ApiError
from cortex_gateway.http.body import ClientGone
from cortex_gateway.relay.request_state import RequestState
from cortex_gateway.relay.retries import Unanswered
from cortex_gateway.relay.spans import end_attempt, end_trace
from cortex_gateway.translation.answer_stream import Usage

from tests.cortex_gateway.relay.harness import request_state


class Trace:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.fault: str | None = "not told"
        self.told: dict[str, Any] = {}
        self.attributes: dict[str, Any] = {}

    def attempt_ended(self, fault: str | None, *, first_byte_at: float | None) -> None:
        self.fault = fault

    def end(self, attributes: dict[str, Any], **told: Any) -> None:
        self.attributes, self.told = attributes, told


def fault_of(request: RequestState, raised: BaseException | None) -> str | None:
    trace: Any = Trace()
    end_attempt(trace, request, raised)
    found: str | None = trace.fault
    return found


def ended(**fields: Any) -> Trace:
    request = request_state()
    for name, value in fields.items():
        setattr(request, name, value)
    trace: Any = Trace()
    end_trace(trace, request, Usage(7, 5, None, ("stop",)), ttft_s=0.5, now=9.0)
    assert isinstance(trace, Trace)
    return trace


async def test_a_client_that_left_is_no_fault_of_the_node() -> None:
    request = request_state()
    assert fault_of(request, None) is None and fault_of(request, ClientGone()) is None
    request.interruption = ClientGone()
    assert fault_of(request, asyncio.CancelledError()) is None
    request.interruption = ApiError("timeout", "silent", code="upstream_timeout")
    assert fault_of(request, asyncio.CancelledError()) == "upstream_timeout"


async def test_a_node_that_did_not_answer_broke_a_stream_or_none() -> None:
    request = request_state()
    assert fault_of(request, Unanswered()) == "stale_route"
    stream: Any = object()
    request.stream = stream
    assert fault_of(request, Unanswered()) == "broken_stream"


async def test_faults_are_words_out_of_few() -> None:
    request = request_state()
    assert fault_of(request, ApiError("overloaded", "full of secrets")) == "overloaded"
    assert fault_of(request, ConnectionResetError("by 10.0.0.1")) == "ConnectionResetError"


@pytest.mark.parametrize(
    ("fields", "error_type", "error"),
    [
        ({"status": 200}, None, None),
        ({"outcome": "client_gone", "status": 499}, None, None),
        ({"outcome": "rejected", "status": 400, "error": "bad: x"}, None, "bad: x"),
        ({"outcome": "rejected", "status": 503, "error": "no_room: of m"}, "no_room", "no_room: of m"),
        ({"outcome": "upstream_error", "status": 500, "error": "quotes a prompt"}, "500", None),
        ({"outcome": "error", "status": 500, "error": "KeyError: x"}, "error", "KeyError: x"),
    ],
)
async def test_an_error_of_the_client_is_none_of_ours_and_what_a_neuron_quotes_is_not_told(
    fields: dict[str, Any], error_type: str | None, error: str | None
) -> None:
    trace = ended(**fields)
    assert (trace.told["error_type"], trace.told["error"]) == (error_type, error)


async def test_what_is_unknown_is_left_out_and_no_zero() -> None:
    attributes = ended(first_byte_at=None, resolved="org/name").attributes
    assert attributes["gen_ai.response.model"] is None, "nothing answered"
    assert attributes["gen_ai.usage.cache_read.input_tokens"] is None and attributes["cortex.resumes"] is None
    assert attributes["gen_ai.usage.output_tokens"] == 5
    assert ended(first_byte_at=1.0, resolved="org/name").attributes["gen_ai.response.model"] == "org/name"
