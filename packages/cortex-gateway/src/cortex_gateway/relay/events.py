"""Server-sent events on their way through: whole events, unchanged, minus the one block that is for the gateway.

A neuron that is told `x-cortex-hop: 1` writes `: cortex-usage {…}` as a block of its own just before a stream's
last event, so that streams are metered whose client did not ask for usage. No client ever sees it.
"""

from __future__ import annotations

import re

import msgspec

USAGE_MARK = b": cortex-usage "
MAX_HELD_BYTES = 2**20
"""An event that grows beyond this is passed on in pieces: a relay must not hold what it need not."""


class Usage(msgspec.Struct, frozen=True):
    """Tokens of one request; None is unknown, which is not 0."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None


_usage_decoder = msgspec.json.Decoder(Usage)
_COUNT = re.compile(
    rb'"((?:prompt|completion|cached|input|output|cache_read_input|cache_creation_input)_tokens)"\s*:\s*(\d{1,12})'
)


class EventRelay:
    """Incremental: `feed` what was read, send what comes back. Any chunking gives the same bytes in total.

    An event is held until it is whole, so that a stream that breaks in the middle of one can still be ended with
    a well-formed error event.
    """

    __slots__ = ("_before_last", "_held", "_last", "_usage")

    def __init__(self) -> None:
        self._held = b""
        self._last = b""
        self._before_last = b""
        self._usage: Usage | None = None

    def feed(self, chunk: bytes) -> bytes:
        if self._held:
            chunk = self._held + chunk
            self._held = b""
        if not chunk.endswith(b"\n\n"):
            end = _end_of_last_event(chunk)
            if len(chunk) - end > MAX_HELD_BYTES:
                end = len(chunk)
            self._held = chunk[end:]
            chunk = chunk[:end]
        if USAGE_MARK in chunk:
            chunk = self._lift_usage(chunk)
        if chunk:
            self._before_last = self._last
            self._last = chunk
        return chunk

    def flush(self) -> bytes:
        """What a stream that ended properly still holds: a last event without its blank line."""
        held, self._held = self._held, b""
        return held

    def usage(self) -> Usage:
        """From the neuron's block, else (an older neuron) from the last events, if they carried any."""
        if self._usage is not None:
            return self._usage
        return scan_usage(self._before_last + self._last)

    def _lift_usage(self, chunk: bytes) -> bytes:
        start = chunk.find(USAGE_MARK)
        while start >= 0:
            if start > 0 and chunk[start - 1] != 0x0A:
                start = chunk.find(USAGE_MARK, start + 1)
                continue
            end = chunk.find(b"\n\n", start)
            end = len(chunk) if end < 0 else end + 2
            try:
                self._usage = _usage_decoder.decode(chunk[start + len(USAGE_MARK) : end])
            except msgspec.DecodeError:
                self._usage = None
            chunk = chunk[:start] + chunk[end:]
            start = chunk.find(USAGE_MARK, start)
        return chunk


def _end_of_last_event(chunk: bytes) -> int:
    line_feeds = chunk.rfind(b"\n\n")
    with_returns = chunk.rfind(b"\r\n\r\n")
    return max(line_feeds + 2 if line_feeds >= 0 else 0, with_returns + 4 if with_returns >= 0 else 0)


def scan_usage(tail: bytes) -> Usage:
    """The last count of each kind in a piece of JSON. Quotes inside strings are escaped, so text cannot match."""
    if b'_tokens"' not in tail:
        return Usage()
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
    )
