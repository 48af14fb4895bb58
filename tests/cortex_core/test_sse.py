"""The SSE codec: what it decodes does not depend on how the stream was cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
from cortex_core.sse import (
    SseComment,
    SseDecoder,
    SseEvent,
    SseEventTooLarge,
    encode,
    encode_comment,
)
from hypothesis import given
from hypothesis import strategies as st

WIRE_PIECES = (
    b"data",
    b"event",
    b"id",
    b"retry",
    b":",
    b" ",
    b"\n",
    b"\r",
    b"\r\n",
    b"\n\n",
    b"\xef\xbb\xbf",
    b"12",
    b"\0",
    "größe→🙂".encode(),
    b"\xff",
    b"[DONE]",
)
wire = st.lists(st.one_of(st.sampled_from(WIRE_PIECES), st.binary(max_size=4)), max_size=40).map(b"".join)


def decode(chunks: list[bytes], **options: object) -> list[SseEvent | SseComment]:
    decoder = SseDecoder(**options)  # type: ignore[arg-type]
    out: list[SseEvent | SseComment] = []
    for chunk in chunks:
        out += decoder.feed(chunk)
    return out + decoder.flush()


def cut(stream: bytes, borders: list[int]) -> list[bytes]:
    marks = sorted({0, len(stream), *(border % (len(stream) + 1) for border in borders)})
    return [stream[start:end] for start, end in pairwise(marks)]


@given(wire, st.lists(st.integers(min_value=0), max_size=30))
def test_events_are_the_same_under_any_chunking(stream: bytes, borders: list[int]) -> None:
    whole = decode([stream], with_comments=True)
    assert decode(cut(stream, borders), with_comments=True) == whole
    assert decode([stream[i : i + 1] for i in range(len(stream))], with_comments=True) == whole


@given(wire, st.lists(st.integers(min_value=0), max_size=30), st.integers(min_value=1, max_value=12))
def test_the_size_bound_strikes_at_the_same_event_under_any_chunking(
    stream: bytes, borders: list[int], limit: int
) -> None:
    def outcome(chunks: list[bytes]) -> tuple[list[SseEvent | SseComment], bool]:
        decoder = SseDecoder(max_event_bytes=limit)
        out: list[SseEvent | SseComment] = []
        try:
            for chunk in chunks:
                out += decoder.feed(chunk)
            out += decoder.flush()
        except SseEventTooLarge:
            return out, True
        return out, False

    assert outcome(cut(stream, borders)) == outcome([stream])


@given(
    st.lists(
        st.tuples(
            st.text(st.characters(exclude_characters="\r", exclude_categories=["Cs"])),
            st.none() | st.text(st.characters(exclude_characters="\r\n\0", exclude_categories=["Cs"]), min_size=1),
        )
    )
)
def test_what_is_encoded_is_decoded(events: list[tuple[str, str | None]]) -> None:
    stream = b"".join(encode(data, event=name) for data, name in events)
    assert decode([stream]) == [SseEvent(data, name) for data, name in events]


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        (b"data: a\n\n", [SseEvent("a")]),
        (b"data:a\ndata: b\n\n", [SseEvent("a\nb")]),
        (b"data:  two spaces\n\n", [SseEvent(" two spaces")]),
        (b"data\n\n", [SseEvent("")]),
        (b"event: x\r\ndata: a\r\n\r\n", [SseEvent("a", "x")]),
        (b"event: x\rdata: a\r\rdata: b\r\r", [SseEvent("a", "x"), SseEvent("b")]),
        (b"event: lost\n\ndata: a\n\n", [SseEvent("a")]),
        (b"id: 7\ndata: a\n\ndata: b\n\n", [SseEvent("a", id="7"), SseEvent("b", id="7")]),
        (b"id: 7\0\ndata: a\n\n", [SseEvent("a")]),
        (b"retry: 1500\ndata: a\n\n", [SseEvent("a", retry=1500)]),
        (b"retry: 15x\ndata: a\n\n", [SseEvent("a")]),
        (b"\xef\xbb\xbfdata: a\n\n", [SseEvent("a")]),
        (b"data: \xff\n\n", [SseEvent("\ufffd")]),
        (b": comment\nunknown: field\ndata: a\n\n", [SseEvent("a")]),
        (b"data: [DONE]", [SseEvent("[DONE]")]),
    ],
)
def test_the_standard_is_followed(stream: bytes, events: list[SseEvent]) -> None:
    assert decode([stream]) == events


def test_a_carriage_return_at_the_end_of_a_chunk_dispatches_at_once_and_swallows_the_line_feed() -> None:
    decoder = SseDecoder()
    assert decoder.feed(b"data: a\r\n\r") == [SseEvent("a")]
    assert decoder.feed(b"\ndata: b\n\n") == [SseEvent("b")]


def test_comments_are_seen_only_when_asked_for() -> None:
    stream = b": ping\n\n:cortex-usage {}\ndata: [DONE]\n\n"
    assert decode([stream]) == [SseEvent("[DONE]")]
    assert decode([stream], with_comments=True) == [
        SseComment("ping"),
        SseComment("cortex-usage {}"),
        SseEvent("[DONE]"),
    ]
    assert decode([encode_comment("a\nb")], with_comments=True) == [SseComment("a"), SseComment("b")]


def test_an_oversized_event_raises_after_the_events_before_it_and_ever_after() -> None:
    decoder = SseDecoder(max_event_bytes=10)
    assert decoder.feed(b"data: abcd\n\ndata: abcde\n\n") == [SseEvent("abcd")]
    with pytest.raises(SseEventTooLarge) as caught:
        decoder.feed(b"")
    assert caught.value.limit == 10
    with pytest.raises(SseEventTooLarge):
        decoder.flush()


def test_a_line_that_never_ends_is_not_buffered_beyond_the_bound() -> None:
    decoder = SseDecoder(max_event_bytes=100)
    with pytest.raises(SseEventTooLarge):
        for _ in range(11):
            decoder.feed(b"0123456789")


@pytest.mark.parametrize("name", ["a\nb", "a\rb", "a\0b"])
def test_an_event_name_that_cannot_be_represented_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="line end"):
        encode("x", event=name)
    with pytest.raises(ValueError, match="line end"):
        encode("x", id=name)
