"""Events pass unchanged under any chunking, and the usage block never does."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from cortex_core.hop import MARK_END, TOKENS_MARK
from cortex_gateway.relay.sse_relay import MAX_HELD_BYTES, SseRelay, Usage, scan_usage
from hypothesis import given
from hypothesis import strategies as st

from tests.cortex_gateway.fake_neuron import ANTHROPIC_EVENTS, JSON_ANSWER, OPENAI_END, OPENAI_EVENTS, USAGE_BLOCK

EVENTS = [
    *OPENAI_EVENTS,
    *ANTHROPIC_EVENTS,
    b"data: with returns\r\n\r\n",
    b"data: two\ndata: lines\n\n",
    b"data: : cortex-usage in the middle of a line\n\n",
]


def relay(stream: bytes, cuts: list[int]) -> tuple[list[bytes], SseRelay]:
    events = SseRelay()
    borders = [0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]
    out = [events.feed(stream[a:b]) for a, b in pairwise(borders) if a < b]
    return [*out, events.flush()], events


@given(st.lists(st.sampled_from(EVENTS), max_size=8), st.lists(st.integers(0, 5000), max_size=20), st.integers(0, 8))
def test_any_chunking_gives_the_same_bytes_without_the_usage_block(
    chosen: list[bytes], cuts: list[int], position: int
) -> None:
    position = min(position, len(chosen))
    stream = b"".join([*chosen[:position], USAGE_BLOCK, *chosen[position:], OPENAI_END])
    out, events = relay(stream, cuts)
    assert b"".join(out) == b"".join([*chosen, OPENAI_END])
    assert events.usage() == Usage(prompt_tokens=11, completion_tokens=7, cached_tokens=3)


@given(st.binary(max_size=400), st.lists(st.integers(0, 400), max_size=20))
def test_any_bytes_without_a_block_pass_unchanged(stream: bytes, cuts: list[int]) -> None:
    out, _ = relay(stream, cuts)
    assert b"".join(out) == stream


@given(st.lists(st.sampled_from(EVENTS), min_size=1, max_size=6), st.lists(st.integers(0, 5000), max_size=20))
def test_only_whole_events_are_passed_on(chosen: list[bytes], cuts: list[int]) -> None:
    out, _ = relay(b"".join(chosen), cuts)
    assert all(piece.endswith((b"\n\n", b"\r\n\r\n")) for piece in out if piece)


def test_a_whole_event_is_passed_on_at_once() -> None:
    events = SseRelay()
    for event in EVENTS:
        assert events.feed(event) == event


def test_a_whole_event_is_not_kept_back_by_the_beginning_of_the_next() -> None:
    events = SseRelay()
    assert events.feed(b"data: 1\n\nda") == b"data: 1\n\n"
    assert events.feed(b"ta: 2\n\n") == b"data: 2\n\n"


def test_an_endless_event_is_not_held_for_ever() -> None:
    events = SseRelay()
    piece = b"x" * (MAX_HELD_BYTES // 2 + 1)
    assert events.feed(piece) == b""
    assert events.feed(piece) == piece + piece


def test_without_a_block_usage_is_read_from_the_last_events() -> None:
    events = SseRelay()
    events.feed(b'data: {"choices":[],"usage":{"prompt_tokens": 5,"completion_tokens":6}}\n\n')
    events.feed(OPENAI_END)
    assert events.usage() == Usage(prompt_tokens=5, completion_tokens=6)


def test_without_any_usage_it_is_unknown_and_not_zero() -> None:
    events = SseRelay()
    events.feed(OPENAI_EVENTS[1])
    assert events.usage() == Usage()
    assert events.usage().completion_tokens is None


def test_a_broken_block_is_removed_all_the_same() -> None:
    events = SseRelay()
    assert events.feed(b": cortex-usage nonsense\n\n" + OPENAI_END) == OPENAI_END
    assert events.usage() == Usage()


def test_usage_of_both_dialects_is_found_and_text_is_not_taken_for_it() -> None:
    assert scan_usage(JSON_ANSWER) == Usage(prompt_tokens=11, completion_tokens=7, cached_tokens=3)
    anthropic = b'{"content":[{"text":"\\"input_tokens\\": 9"}],"usage":{"input_tokens":3,"output_tokens":4}}'
    assert scan_usage(anthropic) == Usage(prompt_tokens=3, completion_tokens=4)
    cached = b'{"input_tokens":5,"cache_creation_input_tokens":2,"cache_read_input_tokens":16,"output_tokens":6}'
    assert scan_usage(cached) == Usage(prompt_tokens=23, completion_tokens=6, cached_tokens=16)
    assert scan_usage(b'{"completion_tokens_details":{"reasoning_tokens":4}}') == Usage()


# ---------------------------------------------------------------------------------------------- streams that go on

HEAD = b'{"id":"chatcmpl-1","created":5,"seeds":[7]}'
WRITES = [
    b"data: one\n\n",
    b"data: two\n\ndata: three\n\n",
    b": ping\n\n",
    b'data: {"text": ": cortex-tokens [[0,[1]]]"}\n\n',
    b"data: : cortex-usage {}\n\n",
    b"",
]


def marked(writes: list[bytes]) -> bytes:
    marks = [b"%s\n: cortex-tokens [[0,[%d]]]\n\n" % (write, index) for index, write in enumerate(writes)]
    return b": cortex-stream " + HEAD + b"\n\n" + b"".join(marks)


@given(st.lists(st.sampled_from(WRITES), max_size=8), st.lists(st.integers(0, 5000), max_size=20))
def test_no_mark_is_passed_on_and_every_one_is_booked(writes: list[bytes], cuts: list[int]) -> None:
    out, events = relay(marked(writes) + USAGE_BLOCK + OPENAI_END, cuts)
    assert b"".join(out) == b"".join(writes) + OPENAI_END
    assert events.head == HEAD
    assert bytes(events.batches) == b"".join(b"[[0,[%d]]]," % index for index in range(len(writes)))
    assert events.usage() == Usage(prompt_tokens=11, completion_tokens=7, cached_tokens=3)


@given(
    st.lists(st.sampled_from(WRITES), min_size=1, max_size=8),
    st.lists(st.integers(0, 5000), max_size=20),
    st.integers(0, 5000),
)
def test_wherever_a_stream_is_cut_off_what_was_sent_is_what_is_booked(
    writes: list[bytes], cuts: list[int], end: int
) -> None:
    stream = marked(writes)[: len(b": cortex-stream " + HEAD) + 2 + end]
    out, events = relay(stream, cuts)
    num_booked = bytes(events.batches).count(b"]],")
    sent = b"".join(out[:-1])
    assert sent == b"".join(writes[:num_booked])
    assert events.is_resumable


def test_a_stream_without_a_head_cannot_be_resumed() -> None:
    events = SseRelay()
    events.feed(OPENAI_EVENTS[0])
    assert not events.is_resumable


def test_another_neuron_goes_on_behind_what_was_booked() -> None:
    events = SseRelay()
    first = events.feed(marked(WRITES[:1]) + b"data: two\n\nda")
    events.rejoin()
    assert events.is_resumable
    second = events.feed(marked(WRITES[1:2])) + events.feed(USAGE_BLOCK + OPENAI_END) + events.flush()
    assert first + second == b"".join(WRITES[:2]) + OPENAI_END


def test_a_write_that_is_too_much_to_hold_passes_and_no_mark_after_it_does() -> None:
    events = SseRelay()
    large = b"data: " + b"x" * 2 * MAX_HELD_BYTES + b"\n\n"
    stream = marked([b"data: one\n\n", large, b"data: two\n\n"]) + USAGE_BLOCK + OPENAI_END
    size = MAX_HELD_BYTES // 8
    out = b"".join([events.feed(stream[at : at + size]) for at in range(0, len(stream), size)]) + events.flush()
    assert out == b"data: one\n\n" + large + b"data: two\n\n" + OPENAI_END
    assert not events.is_resumable and events.usage().prompt_tokens == 11


def test_a_neuron_that_gives_up_says_so() -> None:
    events = SseRelay()
    events.feed(marked(WRITES[:2]) + b": cortex-unfinished\n\ndata: {}\n\n")
    assert events.is_unfinished


class Counted(bytes):
    """Counts the bytes that are copied out of it, and gives copies that count on."""

    num_copied = 0

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        if isinstance(found, bytes):
            Counted.num_copied += len(found)
            return Counted(found)
        return found

    def __add__(self, other: bytes) -> Counted:
        Counted.num_copied += len(self) + len(other)
        return Counted(super().__add__(other))


@pytest.mark.parametrize(
    "unit", [USAGE_BLOCK, USAGE_BLOCK + OPENAI_END, b": cortex-usage {}\n\n", b"x: cortex-usage \n\n"]
)
def test_H13_the_work_for_a_write_grows_with_its_bytes(unit: bytes) -> None:
    counts = []
    for factor in (1, 2):
        Counted.num_copied = 0
        lifted = SseRelay()._lift_usage(Counted(unit * (500 * factor)))
        counts.append(Counted.num_copied)
        kept = unit.replace(USAGE_BLOCK, b"").removeprefix(b": cortex-usage {}\n\n")
        assert lifted == kept * (500 * factor)
    assert counts[1] <= 2.1 * counts[0] + 1


def test_H13_writes_with_many_marks_are_the_same_as_one_by_one() -> None:
    write = b"data: a\n\n" + TOKENS_MARK + b"[[0,[5]]]" + MARK_END
    together, single = SseRelay(), SseRelay()
    head = b': cortex-stream {"id":"c","created":1,"seeds":[1]}\n\n'
    out = together.feed(head + write * 300)
    assert out == b"".join([single.feed(head), *(single.feed(write) for _ in range(300))])
    assert together.batches == single.batches


@given(st.lists(st.integers(0, 400), max_size=10))
def test_H13_what_a_foreign_server_writes_in_comments_is_a_comment(cuts: list[int]) -> None:
    stream = b"".join(
        (
            b': cortex-stream {"id":"c","created":1,"seeds":[1]}\n\n',
            b"data: a\n\n" + TOKENS_MARK + b"[[0,[5]]]" + MARK_END,
            b": cortex-unfinished\n\n",
            USAGE_BLOCK,
            OPENAI_END,
        )
    )
    events = SseRelay(is_hop=False)
    borders = [0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]
    out = b""
    for a, b in pairwise(borders):
        if a < b:
            out += events.feed(stream[a:b])
            assert not events.is_resumable and not events.is_unfinished
    assert out + events.flush() == stream
    assert (events.head, events.batches, events.usage().prompt_tokens) == (None, b"", 11)
