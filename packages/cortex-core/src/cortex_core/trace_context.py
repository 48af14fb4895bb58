"""W3C trace context (https://www.w3.org/TR/trace-context/): which trace a request belongs to, read from its headers.

Whatever a client sends, nothing here fails: headers that are not well-formed say nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import msgspec

TRACEPARENT = "traceparent"
TRACESTATE = "tracestate"
MAX_STATE_BYTES = 1024
"""The standard asks for 512 bytes at least; what is longer is left behind, the trace itself goes on."""
MAX_STATE_MEMBERS = 32

_PARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_STATE_MEMBER = re.compile(
    r"(?:[a-z][a-z0-9_\-*/]{0,255}|[a-z0-9][a-z0-9_\-*/]{0,240}@[a-z][a-z0-9_\-*/]{0,13})"
    r"=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]"
)


class TraceContext(msgspec.Struct, frozen=True):
    """trace_id: 32 hexadecimal digits; span_id: 16, of the span that the sender is in; state: `tracestate`, or ""."""

    trace_id: str
    span_id: str
    is_sampled: bool
    state: str = ""


def read_trace_context(headers: Iterable[tuple[bytes, bytes]]) -> TraceContext | None:
    """What a request's headers (names in lower case) say of its trace. None where they say nothing valid."""
    parents = []
    states = []
    for name, value in headers:
        if name == b"traceparent":
            parents.append(value)
        elif name == b"tracestate":
            states.append(value)
    if len(parents) != 1:
        return None
    match = _PARENT.fullmatch(parents[0].strip())
    if match is None:
        return None
    version, trace_id, span_id, flags, more = match.groups()
    if version == b"ff" or (version == b"00" and more) or not trace_id.strip(b"0") or not span_id.strip(b"0"):
        return None
    state = _read_state(b",".join(states)) if states else ""
    return TraceContext(trace_id.decode(), span_id.decode(), bool(int(flags, 16) & 1), state)


def write_traceparent(trace_id: str, span_id: str, *, is_sampled: bool) -> str:
    return f"00-{trace_id}-{span_id}-{'01' if is_sampled else '00'}"


def _read_state(value: bytes) -> str:
    """The members as one list; "" where it is too long, or one of them is none: half a state would be another one."""
    if len(value) > MAX_STATE_BYTES:
        return ""
    members = [member for part in value.decode("latin-1").split(",") if (member := part.strip(" \t"))]
    keys = {member.partition("=")[0] for member in members}
    if len(members) > MAX_STATE_MEMBERS or len(keys) != len(members):
        return ""
    return ",".join(members) if all(map(_STATE_MEMBER.fullmatch, members)) else ""
