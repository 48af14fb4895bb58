"""What an outside server answers costs no more than in proportion to its bytes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cortex_core.dialects import limits
from cortex_core.dialects.openai_chat_client import AnswerReader, StreamReader, error_of
from cortex_core.dialects.openai_chat_client.object_scan import ObjectScan
from cortex_core.events import Failure, TextDelta, ToolCallArguments, ToolCallEnd, ToolCallStart
from cortex_core.sse import SseDecoder
from hypothesis import given
from hypothesis import strategies as st

from tests.cortex_core.dialects.event_streams import fragments, json_values
from tests.counting import assert_linear, copied, peak_bytes, steps


def chunk(*calls: dict[str, Any], index: int = 0, **delta: Any) -> bytes:
    choice = {"index": index, "delta": {**delta, **({"tool_calls": list(calls)} if calls else {})}}
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


def call(index: int, arguments: str, name: str | None = None) -> dict[str, Any]:
    return {"index": index, "id": f"c{index}", "function": {"name": name, "arguments": arguments}}


def test_calls_that_are_mixed_are_not_read_again_with_each_fragment() -> None:
    decoded: list[int] = []

    def mixed(n: int) -> int:
        from cortex_core.dialects.openai_chat_client import stream

        decode = stream._decode

        def counted(text: Any) -> Any:
            decoded.append(len(text))
            return decode(text)

        reader = StreamReader()
        reader.feed(chunk(call(0, '{"k": "', "f"), call(1, "{}", "g")))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stream, "_decode", counted)
            decoded.clear()
            taken = steps(lambda: [reader.feed(chunk(call(0, "abcd"))) for _ in range(n)])
            events = reader.feed(chunk(call(0, '"}')))
        assert [type(event) for event in events] == [ToolCallArguments, ToolCallEnd, ToolCallStart, ToolCallArguments]
        return taken + sum(decoded)

    assert_linear(mixed, 300)


@given(st.data())
def test_the_end_of_an_object_is_seen_under_any_cut(data: st.DataObject) -> None:
    value = data.draw(st.dictionaries(st.text(max_size=3), json_values, max_size=4))
    text = json.dumps(value, ensure_ascii=data.draw(st.booleans()))
    scan = ObjectScan()
    for piece in data.draw(fragments(text[:-1])):
        scan.feed(piece)
        assert not scan.has_ended
    scan.feed(text[-1])
    assert scan.has_ended
    scan.feed(data.draw(st.sampled_from(["", " ", "\n\t"])))
    assert scan.has_ended
    scan.feed("x")
    assert not scan.has_ended


def test_an_object_that_grows_is_looked_at_once() -> None:
    def grown(n: int) -> int:
        def work(text: Any) -> None:
            scan = ObjectScan()
            for _ in range(n):
                scan.feed(text('{"a": ["\\"'))

        return copied(work) + steps(lambda: work(str))

    assert_linear(grown, 300)


def test_a_server_with_more_choices_than_anybody_asks_for_is_done() -> None:
    reader = StreamReader()
    events = [
        event for n in range(limits.MAX_FOREIGN_CHOICES + 10) for event in reader.feed(chunk(index=n, content="a"))
    ]
    assert len(events) == limits.MAX_FOREIGN_CHOICES + 1
    assert isinstance(events[-1], Failure) and reader.is_done


def test_an_answer_that_grows_without_end_is_given_up() -> None:
    reader = AnswerReader()
    piece = bytes(2**20)
    events = [event for _ in range(limits.MAX_WHOLE_ANSWER_BYTES // len(piece)) for event in reader.feed(piece)]
    assert events == []
    (failure,) = reader.feed(b"x")
    assert isinstance(failure, Failure) and failure.error.status == 502
    assert reader.feed(b"x") == [] and reader.end() == []


@pytest.mark.parametrize(
    "message",
    [
        "9" * 300_000,
        "maximum context length is " + "9" * 300_000,
        "> 9" * 100_000,
        "requested about " * 20_000,
        "resulted in " + "1 " * 100_000,
        ("9" * 12 + " ") * 20_000,
    ],
)
def test_words_of_an_error_are_searched_once(message: str) -> None:
    """Digits without end took time in the square of their number, and 4,300 of them raised."""
    error = error_of(400, json.dumps({"error": {"message": message}}).encode())
    assert error.code is None


def test_an_event_in_small_pieces_is_copied_once() -> None:
    def dripped(n: int) -> int:
        decoder = SseDecoder()
        return steps(lambda: [decoder.feed(piece) for piece in (b"data: x", *[b"ab"] * n, b"\n\n")])

    assert_linear(dripped, 500)
    assert_linear(lambda n: peak_bytes(lambda: dripped(n)), 2000)


def test_H13_what_is_too_much_to_be_read_at_once_is_a_failure() -> None:
    """Of a stream and of an answer in one piece: too many bytes, and too many values in few bytes."""
    many = b'{"choices":[' + b",".join([b"{}"] * (limits.MAX_FOREIGN_CONTAINERS + 1)) + b"]}"
    long = b'{"choices":[{"delta":{"content":"' + b"x" * limits.MAX_FOREIGN_EVENT_BYTES + b'"}}]}'
    for document in (many, long):
        reader = StreamReader()
        (failure,) = [*reader.feed(b"data: " + document + b"\n\n"), *reader.end()]
        assert isinstance(failure, Failure) and reader.is_done
    answer = AnswerReader()
    answer.feed(many)
    (failure,) = answer.end()
    assert isinstance(failure, Failure) and failure.error.status == 502
    assert str(limits.MAX_FOREIGN_CONTAINERS) in failure.error.message


def test_H13_a_long_text_in_one_piece_is_read() -> None:
    text = "x" * 600_000  # of 150,000 tokens
    reader = StreamReader()
    chunk = {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": "stop"}]}
    (delta, *_) = reader.feed(b"data: " + json.dumps(chunk).encode() + b"\n\n")
    assert isinstance(delta, TextDelta) and delta.text == text


def test_H13_an_error_that_nobody_wrote_is_not_looked_into() -> None:
    said = b'{"error": {"message": "no", "code": "c"}, "x": "%b"}'
    assert error_of(400, said % b"").message == "no"
    assert error_of(400, said % (b"x" * limits.MAX_FOREIGN_ERROR_BYTES)).message == "The upstream server answered 400"
