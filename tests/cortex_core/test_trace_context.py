"""W3C trace context: what is well-formed is read, anything else says nothing and harms nothing."""

from __future__ import annotations

import pytest
from cortex_core.trace_context import TraceContext, read_trace_context, write_traceparent
from hypothesis import given
from hypothesis import strategies as st

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def read(*parents: bytes, states: tuple[bytes, ...] = ()) -> TraceContext | None:
    headers = [(b"host", b"x"), *((b"traceparent", value) for value in parents)]
    return read_trace_context([*headers, *((b"tracestate", value) for value in states)])


@pytest.mark.parametrize("is_sampled", [True, False])
def test_what_is_written_is_read(is_sampled: bool) -> None:
    written = write_traceparent(TRACE, SPAN, is_sampled=is_sampled)
    assert read(written.encode()) == TraceContext(TRACE, SPAN, is_sampled)


def test_a_later_version_is_read_as_far_as_it_is_known() -> None:
    context = read(f"cc-{TRACE}-{SPAN}-09-what-the-future-brings".encode())
    assert context == TraceContext(TRACE, SPAN, is_sampled=True)


@pytest.mark.parametrize(
    "value",
    [
        "",
        "00",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE}-{SPAN}-01-more",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE}-{SPAN}-0g",
        f"00-{TRACE}x-{SPAN}-01",
        "00-" + "1" * 100_000,
    ],
)
def test_what_is_not_well_formed_says_nothing(value: str) -> None:
    assert read(value.encode()) is None


def test_two_parents_are_none() -> None:
    value = write_traceparent(TRACE, SPAN, is_sampled=True).encode()
    assert read(value, value) is None
    assert read() is None


def test_the_state_of_several_headers_is_one_list() -> None:
    parent = write_traceparent(TRACE, SPAN, is_sampled=True).encode()
    context = read(parent, states=(b"rojo=00f067aa0ba902b7 , ", b"1tenant@vendor=a b!"))
    assert context is not None and context.state == "rojo=00f067aa0ba902b7,1tenant@vendor=a b!"


@pytest.mark.parametrize(
    "state",
    [
        b"Upper=1",
        b"a=1,a=2",
        b"novalue",
        b"a=\xff",
        b"a=b=c",
        b"a=" + b"x" * 300,
        b",".join([b"k%d=v" % i for i in range(33)]),
    ],
)
def test_a_bad_state_is_left_behind_and_the_trace_goes_on(state: bytes) -> None:
    context = read(write_traceparent(TRACE, SPAN, is_sampled=True).encode(), states=(state,))
    assert context is not None and context.state == ""


@given(st.lists(st.tuples(st.sampled_from([b"traceparent", b"tracestate"]), st.binary(max_size=80)), max_size=4))
def test_nothing_a_client_sends_raises(headers: list[tuple[bytes, bytes]]) -> None:
    context = read_trace_context(headers)
    assert context is None or len(context.trace_id) == 32
