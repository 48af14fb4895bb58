"""Server-sent events: encode them, and decode them from a byte stream cut anywhere.

The decoder follows the event stream interpretation of the HTML standard (section 9.2.6): CRLF, LF and CR line
ends, an optional byte order mark, comments, multi-line data, `event`, `id` and `retry`. Beyond it, comments can
be asked for (cortex carries metering in them) and one event may not grow beyond a bound.
"""

from __future__ import annotations

import msgspec

DEFAULT_MAX_EVENT_BYTES = 16 * 1024 * 1024

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class SseEvent(msgspec.Struct, frozen=True):
    """One dispatched event. `event` None means the default, `message`; `id` is the last one seen on the stream.

    retry: reconnection time in milliseconds, where this event's block carried one.
    """

    data: str
    event: str | None = None
    id: str | None = None
    retry: int | None = None


class SseComment(msgspec.Struct, frozen=True):
    """A line that started with a colon, without that colon and one following space."""

    text: str


class SseError(Exception):
    """A byte stream that cannot be decoded as events."""


class SseEventTooLarge(SseError):
    """One event (its lines without their ends) exceeds `limit` bytes."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"a server-sent event is larger than {limit} bytes")
        self.limit = limit


def encode(data: bytes | str, *, event: str | None = None, id: str | None = None, retry: int | None = None) -> bytes:
    """One event block, blank line included. Data of several lines (CRLF, CR or LF) becomes several data fields.

    Raises `ValueError` where `event` or `id` holds a line end or NUL: they cannot be represented.
    """
    payload = data.encode() if isinstance(data, str) else data
    lines = []
    if event is not None:
        lines.append(b"event: " + _field_value("event", event))
    if id is not None:
        lines.append(b"id: " + _field_value("id", id))
    if retry is not None:
        lines.append(b"retry: %d" % retry)
    lines.extend(b"data: " + line for line in _lines(payload))
    return b"\n".join(lines) + b"\n\n"


def encode_comment(text: str) -> bytes:
    """A comment block, blank line included: keeps a connection alive, seen by no event handler."""
    return b"".join(b": " + line + b"\n" for line in _lines(text.encode())) + b"\n"


def _field_value(name: str, value: str) -> bytes:
    if any(forbidden in value for forbidden in "\r\n\0"):
        raise ValueError(f"the {name} of a server-sent event cannot hold a line end or NUL")
    return value.encode()


def _lines(payload: bytes) -> list[bytes]:
    if b"\r" in payload:
        payload = payload.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return payload.split(b"\n")


class SseDecoder:
    """Feed it chunks as they come; it returns the events (and comments, if asked) completed by each.

    The events of a stream do not depend on how it is cut. An event larger than `max_event_bytes` raises
    `SseEventTooLarge` from the call after the one that returned the events before it (from the same call when
    there were none), and from every call afterwards.
    """

    def __init__(self, *, max_event_bytes: int = DEFAULT_MAX_EVENT_BYTES, with_comments: bool = False) -> None:
        self._max_event_bytes = max_event_bytes
        self._with_comments = with_comments
        self._pending: list[bytes] = []  # pieces of the line that has not ended yet
        self._pending_bytes = 0
        self._block_bytes = 0  # bytes of the finished lines of the current block
        self._at_start = True  # a byte order mark may still come
        self._skip_line_feed = False  # the last byte was CR: a LF right after it belongs to the same line end
        self._data: list[str] = []
        self._event: str | None = None
        self._retry: int | None = None
        self._last_id: str | None = None
        self._error: SseEventTooLarge | None = None

    def feed(self, chunk: bytes) -> list[SseEvent | SseComment]:
        """Decode one chunk. Raises `SseEventTooLarge`."""
        if self._error is not None:
            raise self._error
        out: list[SseEvent | SseComment] = []
        chunk = self._strip_start(chunk)
        if not chunk:
            return out
        if self._skip_line_feed and chunk.startswith(b"\n"):
            chunk = chunk[1:]
        self._skip_line_feed = chunk.endswith(b"\r") if chunk else False
        *ended, rest = _lines(chunk)
        for piece in ended:
            if self._overflows(piece):
                return self._fail(out)
            line = piece
            if self._pending:
                line = b"".join((*self._pending, piece))
                self._pending.clear()
            self._pending_bytes = 0
            self._line(line, out)
        if rest:
            if self._overflows(rest):
                return self._fail(out)
            self._pending.append(rest)
            self._pending_bytes += len(rest)
        return out

    def flush(self) -> list[SseEvent | SseComment]:
        """The stream has ended: dispatch a last event that lacks its blank line.

        The standard discards it; but servers that close right after `data: [DONE]` exist. Call it once.
        """
        if self._error is not None:
            raise self._error
        out: list[SseEvent | SseComment] = []
        if self._pending:
            line = b"".join(self._pending)
            self._pending.clear()
            self._pending_bytes = 0
            self._line(line, out)
        self._line(b"", out)
        return out

    def _strip_start(self, chunk: bytes) -> bytes:
        """Drop a byte order mark, which may itself be cut; hold back what may still become one."""
        if not self._at_start or not chunk:
            return chunk
        head = b"".join((*self._pending, chunk))
        if len(head) < len(_BYTE_ORDER_MARK) and _BYTE_ORDER_MARK.startswith(head):
            self._pending = [head]
            return b""
        self._at_start = False
        self._pending.clear()
        return head.removeprefix(_BYTE_ORDER_MARK)

    def _overflows(self, piece: bytes) -> bool:
        return self._block_bytes + self._pending_bytes + len(piece) > self._max_event_bytes

    def _fail(self, out: list[SseEvent | SseComment]) -> list[SseEvent | SseComment]:
        self._error = SseEventTooLarge(self._max_event_bytes)
        self._pending.clear()
        self._data.clear()
        if not out:
            raise self._error
        return out

    def _line(self, line: bytes, out: list[SseEvent | SseComment]) -> None:
        if not line:
            self._dispatch(out)
            return
        self._block_bytes += len(line)
        name, colon, raw = line.partition(b":")
        value = raw.removeprefix(b" ").decode(errors="replace")
        if not name and colon:
            if self._with_comments:
                out.append(SseComment(value))
        elif name == b"data":
            self._data.append(value)
        elif name == b"event":
            self._event = value
        elif name == b"id":
            if "\0" not in value:
                self._last_id = value
        elif name == b"retry" and value.isascii() and value.isdigit() and len(value) < 19:
            self._retry = int(value)

    def _dispatch(self, out: list[SseEvent | SseComment]) -> None:
        self._block_bytes = 0
        if self._data:
            data = "\n".join(self._data)
            out.append(SseEvent(data, self._event or None, self._last_id, self._retry))
            self._data = []
        self._event = None
        self._retry = None
