from __future__ import annotations

from typing import Any

import pytest
from cortex_core.conversation import ToolChoice, ToolDefinition
from cortex_core.events import ReasoningDelta
from hypothesis import given, settings
from hypothesis import strategies as st
from neuron.daemon.prompt.model import TextModel
from neuron.protocol import FinishKind

from tests.neuron.daemon.output.harness import OSLO, XML, Answer, stream
from tests.neuron.daemon.prompt.checkpoints import WEATHER, ask


def test_a_call_without_arguments(model: TextModel) -> None:
    assert stream(model, '<tool_call>{"name": "now"}</tool_call>').calls == [("now", "{}")]
    assert stream(model, '<tool_call>{"name": "now", "arguments": null}</tool_call>').calls == [("now", "{}")]
    assert stream(model, "<tool_call><function=now></function></tool_call>").calls == [("now", "{}")]


@pytest.mark.parametrize("inner", ["</tool_call>", "<tool_call>", "<think>", "</think>", '\\"}}</tool_call>'])
def test_markers_inside_of_an_argument_are_text(model: TextModel, inner: str) -> None:
    answer = stream(model, f'<tool_call>{{"name": "w", "arguments": {{"code": "x {inner} y"}}}}</tool_call>ok')
    assert answer.arguments == [{"code": f"x {inner} y".replace("\\", "")}]
    assert answer.text == "ok"


def test_text_before_between_and_after_calls(model: TextModel) -> None:
    answer = stream(model, f"Let me look.\n\n{OSLO}\n{XML}\nThat was it.")
    assert answer.text == "Let me look.That was it."
    assert answer.arguments == [{"city": "Oslo", "days": 3}] * 2
    assert answer.reason == "tool_calls"


def test_white_space_around_calls_is_no_text(model: TextModel) -> None:
    answer = stream(model, f"\n\n{OSLO}\n\n{OSLO}\n")
    assert answer.text == ""
    assert len(answer.calls) == 2


def test_without_a_call_white_space_stays(model: TextModel) -> None:
    assert stream(model, "a  \n b \n").text == "a  \n b \n"


def test_a_missing_closing_marker(model: TextModel) -> None:
    unclosed = OSLO.removesuffix("\n</tool_call>")
    assert stream(model, unclosed).arguments == [{"city": "Oslo", "days": 3}]
    answer = stream(model, f"{unclosed}\n{OSLO}")
    assert len(answer.calls) == 2
    answer = stream(model, f"{unclosed}\nDone.")
    assert (len(answer.calls), answer.text, answer.reason) == (1, "Done.", "tool_calls")


def test_without_parallel_calls_only_the_first_counts(model: TextModel) -> None:
    request = ask(tools=(WEATHER,), parallel_tool_calls=False)
    choice = model.event_stream(request, model.render(request)[0])
    ids = model.tokenizer.encode(f"{OSLO}\n{OSLO}\nmore")
    events = choice.feed(ids)
    assert choice.is_done
    assert choice.completion_tokens < len(ids)
    assert choice.feed(ids) == []
    answer = Answer(events + choice.finish("stop"))
    assert (len(answer.calls), answer.text, answer.reason) == (1, "", "tool_calls")


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\nget_weather(Oslo)\n</tool_call>",
        '<tool_call>{"function": "get_weather"}</tool_call>',
        '<tool_call>{"name": 3, "arguments": {}}</tool_call> and more',
        "<tool_call></tool_call>",
        "<tool_call>\n",
        '<tool_call>{"na',
        "<tool_call><func",
        "<tool_call><b>bold</b></tool_call>",
        "I write \n<tool_call> for a call and </tool_call> after it.",
    ],
)
def test_what_is_no_call_stays_text_verbatim(model: TextModel, text: str) -> None:
    answer = stream(model, text)
    assert answer.text == text
    assert answer.calls == []
    assert answer.reason == "stop"


def test_a_call_after_something_that_was_none(model: TextModel) -> None:
    answer = stream(model, f"<tool_call>nonsense</tool_call>\n{OSLO}")
    assert answer.text == "<tool_call>nonsense</tool_call>"
    assert len(answer.calls) == 1


@pytest.mark.parametrize("text", [OSLO, XML])
def test_a_call_cut_by_the_limit_is_length(model: TextModel, text: str) -> None:
    ids = model.tokenizer.encode(text)
    for size in range(1, len(ids)):
        answer = stream(model, model.tokenizer.decode(ids[:size]), kind="length")
        assert answer.reason == "length"
        assert len(answer.calls) <= 1
        if answer.calls and answer.calls[0][1]:
            assert '{"city": "Oslo", "days": 3}'.startswith(answer.calls[0][1])


def test_an_unknown_tool_is_passed_on_but_an_excluded_one_is_not(model: TextModel) -> None:
    assert stream(model, OSLO.replace("get_weather", "get_wether")).calls[0][0] == "get_wether"
    request = ask(
        tools=(WEATHER, ToolDefinition("other", None, {})), tool_choice=ToolChoice("auto", allowed=("other",))
    )
    for text in (OSLO, XML):
        answer = stream(model, text, request)
        assert (answer.calls, answer.text) == ([], text)


@pytest.mark.parametrize("fields", [{}, {"tools": (WEATHER,), "tool_choice": ToolChoice("none")}])
def test_without_tools_markers_mean_nothing(model: TextModel, fields: dict[str, Any]) -> None:
    answer = stream(model, OSLO, ask(**fields))
    assert (answer.text, answer.calls, answer.reason) == (OSLO, [], "stop")


def test_a_thought_then_an_answer(model: TextModel) -> None:
    answer = stream(model, "<think>\nhm, 12\n\n30\n</think>\n\nIt is 42.")
    assert (answer.reasoning, answer.text) == ("hm, 12\n\n30", "It is 42.")


def test_a_tool_call_inside_of_a_thought_stays_a_thought(model: TextModel) -> None:
    answer = stream(model, f"<think>I could {OSLO} now</think>No.")
    assert (answer.reasoning, answer.text, answer.calls) == (f"I could {OSLO} now", "No.", [])


def test_an_empty_thought_leaves_no_event(model: TextModel) -> None:
    answer = stream(model, "<think>\n\n</think>\n\nhi")
    assert not any(isinstance(event, ReasoningDelta) for event in answer.events)
    assert answer.text == "hi"


def test_thoughts_between_calls(model: TextModel) -> None:
    answer = stream(model, f"<think>a</think>\n{OSLO}\n<think>b</think>\n{OSLO}")
    assert (answer.reasoning, answer.text, len(answer.calls)) == ("ab", "", 2)


def test_a_stray_closing_marker_is_not_shown(model: TextModel) -> None:
    assert stream(model, "well</think>, yes").text == "well, yes"


# ---------------------------------------------------------------- any chunking

JSON_TEXT = st.sampled_from(
    ['{"name": "w", ', '"arguments": {"a": "b\\"', "}}", "</tool", '"x": [1, {}]', "{", '"', ",", "}"]
)
PIECES = st.one_of(
    st.sampled_from([OSLO, XML, "<think>", "</think>", "<tool_call>", "</tool_call>", "\n", " ", "<function=w>"]),
    st.sampled_from(["<parameter=city>\n", "\n</parameter>", "</function>", "hello 🇩🇪", "STOP", "ST", "<", "</"]),
    JSON_TEXT,
    st.text(alphabet='ab<>{}"\\\n ü🇩', max_size=6),
)


@settings(max_examples=250, deadline=None)
@given(
    st.lists(PIECES, max_size=12).map("".join),
    st.lists(st.integers(1, 9), min_size=1, max_size=5).map(tuple),
    st.sampled_from(["stop", "length"]),
    st.booleans(),
    st.booleans(),
)
def test_events_do_not_depend_on_the_chunking(
    qwen: TextModel,
    spelled: TextModel,
    text: str,
    sizes: tuple[int, ...],
    kind: FinishKind,
    has_stop: bool,
    is_spelled: bool,
) -> None:
    from cortex_core.conversation import Limits

    model = spelled if is_spelled else qwen
    request = ask(tools=(WEATHER,), limits=Limits(stop=("STOP", "b\n")) if has_stop else Limits())
    one_by_one = stream(model, text, request, kind=kind)
    assert stream(model, text, request, kind=kind, sizes=sizes).key() == one_by_one.key()
    assert stream(model, text, request, kind=kind, sizes=(10_000,)).key() == one_by_one.key()


@settings(max_examples=150, deadline=None)
@given(st.lists(PIECES, max_size=10).map("".join))
def test_markers_as_text_and_as_tokens_agree(qwen: TextModel, spelled: TextModel, text: str) -> None:
    assert stream(qwen, text).key() == stream(spelled, text).key()
