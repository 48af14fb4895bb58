"""Server-sent events on their way through: whole events, unchanged, minus the comments that are for the gateway.

See `cortex_core.hop`: a neuron's comments say which tokens the events came from, so that another neuron can go on
where this one was cut off, and what a stream used, so that it is metered though its client did not ask.
"""

from __future__ import annotations

import re

import msgspec
from cortex_core.errors import ApiError
from cortex_core.hop import MARK_END, STREAM_MARK, TOKENS_MARK, UNFINISHED_MARK, USAGE_MARK

from cortex_gateway.translation.answer_stream import Usage

MAX_HELD_BYTES = 2**20
"""What grows beyond this is passed on in pieces: a relay must not hold what it need not."""


_usage_decoder = msgspec.json.Decoder(Usage)
_COUNT = re.compile(
    rb'"((?:prompt|completion|cached|input|output|cache_read_input|cache_creation_input)_tokens)"\s*:\s*(\d{1,12})'
)
_FINISH = re.compile(rb'"(?:finish|stop)_reason"\s*:\s*"([a-z_]{1,32})"')
_FINISH_WORDS = {"end_turn": "stop", "max_tokens": "length", "tool_use": "tool_calls"}
"""Anthropic's words in `cortex_core.events`'; the others are the same."""
USAGE_TAIL = 64 * 1024
"""Of each of a stream's last two writes, what is searched for its usage."""
_FINISH_TAIL = 4096
"""The reason is among the last things of an answer, and all of a long one need not be searched for it."""


class ForeignStream(Exception):
    """A neuron that was asked to go on with a stream began another one."""


class SseRelay:
    """Incremental: `feed` what was read, send what comes back. Any chunking gives the same bytes in total.

    An event is held until it is whole, so that a stream that breaks in the middle of one can still be ended with
    a well-formed error event. Of a stream whose writes are marked, a write is held until its mark is there; then
    `head` is set, and `batches` is what belongs to everything that was sent, as `hop.resume_body` takes it. The last
    write has no mark: it is held to the end of the stream. Of a stream without marks, `num_events` says how much there
    was.

    is_hop: it is a neuron that writes, and its comments are for the gateway. Of any other server they are comments.
    """

    __slots__ = (
        "_before_last",
        "_held",
        "_is_first",
        "_is_hop",
        "_is_marked",
        "_last",
        "_num_rejoined",
        "_usage",
        "batches",
        "head",
        "num_events",
    )

    def __init__(self, *, is_hop: bool = True) -> None:
        self.head: bytes | None = None
        self.batches = bytearray()
        self.num_events = 0
        self._held = b""
        self._last = b""
        self._before_last = b""
        self._usage: Usage | None = None
        self._is_hop = is_hop
        self._is_first = is_hop
        self._is_marked = False
        self._num_rejoined = 0

    def rejoin(self) -> None:
        """Another neuron goes on: what was held of the last one's is dropped, as its tokens are not in `batches`."""
        self._held = b""
        self._is_first = True
        self._is_marked = False
        self._num_rejoined = len(self.batches)

    def holds_answer(self, data: bytes) -> bool:
        """A stream that is kept waiting is opened in its dialect's words, and pinged: where writes are marked, tokens
        make an answer."""
        if self._is_marked:
            return bool(self.batches[self._num_rejoined :].strip(b"[],"))
        return not data.startswith((b":", b"event: ping"))

    @property
    def is_resumable(self) -> bool:
        """Whether another neuron could go on from what was sent."""
        return self._is_marked or (self._is_first and self.head is not None)

    @property
    def is_unfinished(self) -> bool:
        """At the end of the stream: the neuron gave up, and says that another one may go on."""
        return self._is_marked and self._held.startswith(UNFINISHED_MARK)

    def feed(self, chunk: bytes) -> bytes:
        """Raises `ForeignStream` after `rejoin`."""
        if self._held:
            chunk = self._held + chunk
            self._held = b""
        if self._is_first:
            chunk = self._open(chunk)
            if self._is_first:
                return b""
        if self._is_marked:
            return self._feed_marked(chunk)
        if not chunk.endswith(b"\n\n"):
            end = _end_of_last_event(chunk)
            if len(chunk) - end > MAX_HELD_BYTES:
                end = len(chunk)
            self._held = chunk[end:]
            chunk = chunk[:end]
        if self.head is not None and TOKENS_MARK in chunk:
            chunk = self._without_marks(chunk)  # A write was too much to hold; what follows is marked all the same.
        if self._is_hop and USAGE_MARK in chunk:
            chunk = self._lift_usage(chunk)
        if chunk:
            self.num_events += chunk.count(b"\n\n")
            self._before_last = self._last
            self._last = chunk
        return chunk

    @property
    def unfinished_mark(self) -> bytes:
        return self._held.partition(MARK_END)[0]

    @property
    def last_error(self) -> bytes:
        """At the end of the stream: the error that it ends with, in the shapes that neurons give it; else nothing."""
        last = (self._last[-USAGE_TAIL:] + self._held).rstrip(b"\n").rpartition(b"\n\n")[2]
        return last if last.startswith((b"event: error", b'data: {"error":')) else b""

    def flush(self) -> bytes:
        """What a stream that ended properly still holds: a last event without its blank line, or the last write."""
        held, self._held = self._held, b""
        if self._is_marked and held:
            self._last = held = self._lift_usage(held)
        return held

    def fail(self, error: ApiError) -> None:
        """Whole events have been sent: any error event can follow."""

    def usage(self) -> Usage:
        """From the neuron's block, else (an older neuron) from the last events, if they carried any."""
        if self._usage is not None:
            return self._usage
        return scan_usage(self._before_last[-USAGE_TAIL:] + self._last[-USAGE_TAIL:])

    def _open(self, chunk: bytes) -> bytes:
        """Take the head off the first bytes, if they are one."""
        if chunk.startswith(STREAM_MARK):
            end = chunk.find(MARK_END)
            if end < 0:
                self._held = chunk
                return b""
            head = chunk[len(STREAM_MARK) : end]
            if self.head not in (None, head):
                raise ForeignStream
            self.head = head
            self._is_marked = True
            chunk = chunk[end + 2 :]
        elif STREAM_MARK.startswith(chunk):
            self._held = chunk
            return b""
        elif self.head is not None:
            raise ForeignStream
        self._is_first = False
        return chunk

    def _feed_marked(self, chunk: bytes) -> bytes:
        """Everything up to the last whole mark; what follows waits for its own."""
        end = chunk.rfind(TOKENS_MARK)
        stop = chunk.find(MARK_END, end + 1)
        if end >= 0 and stop < 0:
            end = chunk.rfind(TOKENS_MARK, 0, end)
            stop = chunk.find(MARK_END, end + 1)
        if end < 0:
            if len(chunk) > MAX_HELD_BYTES:
                self._is_marked = False  # Too much for one write: from here on it only passes.
                return chunk
            self._held = chunk
            return b""
        self._held = chunk[stop + 2 :]
        data = self._without_marks(chunk[:end])
        self.batches += chunk[end + len(TOKENS_MARK) : stop]
        self.batches += b","
        return data

    def _without_marks(self, chunk: bytes) -> bytes:
        """Several writes in one read: book their marks in order, keep their events."""
        if TOKENS_MARK not in chunk:
            return chunk
        first, *marked = chunk.split(TOKENS_MARK)
        events = [first]
        for part in marked:
            batch, _, rest = part.partition(MARK_END)
            self.batches += batch
            self.batches += b","
            events.append(rest)
        return b"".join(events)

    def _lift_usage(self, chunk: bytes) -> bytes:
        events: list[bytes] = []
        done = 0
        start = chunk.find(USAGE_MARK)
        while start >= 0:
            if start > done and chunk[start - 1] != 0x0A:
                start = chunk.find(USAGE_MARK, start + 1)
                continue
            end = chunk.find(b"\n\n", start)
            end = len(chunk) if end < 0 else end + 2
            try:
                self._usage = _usage_decoder.decode(chunk[start + len(USAGE_MARK) : end])
            except msgspec.DecodeError:
                self._usage = None
            events.append(chunk[done:start])
            done = end
            start = chunk.find(USAGE_MARK, end)
        return b"".join((*events, chunk[done:])) if events else chunk


def _end_of_last_event(chunk: bytes) -> int:
    line_feeds = chunk.rfind(b"\n\n")
    with_returns = chunk.rfind(b"\r\n\r\n")
    return max(line_feeds + 2 if line_feeds >= 0 else 0, with_returns + 4 if with_returns >= 0 else 0)


def scan_usage(tail: bytes) -> Usage:
    """The last count of each kind in a piece of JSON. Quotes inside strings are escaped, so text cannot match."""
    finish = tuple(_FINISH_WORDS.get(word, word) for word in map(bytes.decode, _FINISH.findall(tail[-_FINISH_TAIL:])))
    if b'_tokens"' not in tail:
        return Usage(finish=finish)
    counts = {name: int(count) for name, count in _COUNT.findall(tail)}
    cached = counts.get(b"cache_read_input_tokens")
    if cached is None:
        prompt = counts.get(b"prompt_tokens", counts.get(b"input_tokens"))
        cached = counts.get(b"cached_tokens")
    else:  # Anthropic counts what came out of a cache, or went into one, beside the input.
        prompt = counts.get(b"input_tokens", 0) + cached + counts.get(b"cache_creation_input_tokens", 0)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=counts.get(b"completion_tokens", counts.get(b"output_tokens")),
        cached_tokens=cached,
        finish=finish,
    )
