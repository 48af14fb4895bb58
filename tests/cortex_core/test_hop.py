"""What a neuron says to a gateway beside the stream, and what a gateway sends to have a stream continued."""

from __future__ import annotations

import json

import msgspec
import pytest
from cortex_core.hop import (
    CLAIMS,
    SECRET_HEADER,
    STREAM_MARK,
    TOKENS_MARK,
    UNFINISHED_MARK,
    ChoiceTokens,
    LoggedTokens,
    StreamHead,
    TokenLogprobs,
    resume_body,
    resume_state,
    split_resume,
    stream_comment,
    tokens_comment,
    unfinished_comment,
)
from cortex_core.sse import SseDecoder, encode

HEAD = StreamHead("chatcmpl-1", 1_760_000_000, (7, 8))
LOGGED = LoggedTokens(0, [5, 6], None, 3, [TokenLogprobs(-0.5, [5, 9], [-0.5, None]), TokenLogprobs(None)])
MADE = [[LOGGED], [LoggedTokens(1, [7], "length")]]
REQUEST = b'{"model":"m"}'


def json_of(comment: bytes, mark: bytes) -> bytes:
    assert comment.startswith(mark) and comment.endswith(b"\n\n")
    return comment.removeprefix(mark)


def state_bytes() -> tuple[bytes, bytes]:
    batches = b"".join(json_of(tokens_comment(batch), TOKENS_MARK).rstrip() + b"," for batch in MADE)
    return json_of(stream_comment(HEAD), STREAM_MARK).rstrip(), batches


def test_what_stands_between_the_events_is_no_event() -> None:
    event = encode("a", event="x")
    said = [stream_comment(HEAD), event, tokens_comment(MADE[0]), event, unfinished_comment("e-1"), event]
    assert [seen.data for seen in SseDecoder().feed(b"".join(said))] == ["a"] * 3


def test_a_mark_that_a_model_writes_is_none() -> None:
    """In an event's data no line feed stands before a colon."""
    written = encode(TOKENS_MARK + b"[]\n")
    assert TOKENS_MARK not in written


def test_what_was_written_is_read_back_where_the_stream_goes_on() -> None:
    body, header = resume_body(*state_bytes(), REQUEST)
    state, request = split_resume(header.encode(), body)
    assert (state.head, list(state.batches), request) == (HEAD, MADE, REQUEST)
    written, length = resume_state(*state_bytes())
    assert written + REQUEST == body and length == header


def test_a_stream_that_had_only_begun_is_continued_from_its_head() -> None:
    head, _ = state_bytes()
    body, header = resume_body(head, b"", REQUEST)
    state, request = split_resume(header.encode(), body)
    assert (state.head, state.batches, request) == (HEAD, (), REQUEST)


def test_tokens_of_an_older_neuron_are_read_too() -> None:
    """It writes them without log-probabilities, and without what it has none of."""
    older = msgspec.json.decode(msgspec.json.encode(ChoiceTokens(1, [7], "stop", 2)), type=LoggedTokens)
    assert older == LoggedTokens(1, [7], "stop", 2, None)
    assert msgspec.json.decode(b"[0,[1]]", type=LoggedTokens) == LoggedTokens(0, [1])


@pytest.mark.parametrize("header", [b"", b"-1", b"1.0", b"0x10", b"99999", b" 5", b"5"])
def test_a_length_that_is_none_or_not_that_of_the_state_is_refused(header: bytes) -> None:
    body, _ = resume_body(*state_bytes(), REQUEST)
    with pytest.raises(ValueError):
        split_resume(header, body)


def test_a_state_that_was_cut_off_is_refused_though_it_could_be_read() -> None:
    state, length = resume_state(*state_bytes())
    assert split_resume(length.encode(), state)[1] == b""
    with pytest.raises(ValueError, match="bytes"):
        split_resume(str(len(state) + 1).encode(), state)


def test_an_engine_that_ended_is_named_in_the_same_line() -> None:
    assert unfinished_comment(None) == UNFINISHED_MARK + b"\n\n"
    named = unfinished_comment("e-1")
    assert named.count(b"\n") == 2 and json.loads(json_of(named, UNFINISHED_MARK)) == {"ended_engine": "e-1"}


def test_claims_are_headers_as_they_arrive_and_the_secret_is_what_proves_them() -> None:
    assert all(name == name.lower() for name in CLAIMS)
    assert SECRET_HEADER.encode() not in CLAIMS
