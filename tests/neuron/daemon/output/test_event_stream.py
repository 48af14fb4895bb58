from __future__ import annotations

import math
from typing import Any

import pytest
from cortex_core.conversation import Limits, RawPrompt, Reasoning, Request
from cortex_core.events import Event, Finish, ReasoningDelta, TextDelta, TokenLogprob
from hypothesis import given, settings
from hypothesis import strategies as st
from neuron.daemon.output.event_stream import EventStream
from neuron.daemon.prompt.model import TextModel
from neuron.protocol import FinishKind, Logprobs

from tests.neuron.daemon.prompt.checkpoints import WEATHER, ask, byte_level_json, load, sentencepiece_model

WORDS = st.lists(
    st.sampled_from(["hello", " world", "\n", "🇩🇪", "ü", "STOP", "ST", "<think>", "</think>", "12", " ", "東京"]),
    max_size=14,
).map("".join)


def choice_of(model: TextModel, request: Request) -> EventStream:
    return model.event_stream(request, model.render(request)[0])


def run(
    model: TextModel, text: str, request: Request, *, kind: FinishKind = "stop", step: int = 1, top: int = 0
) -> tuple[EventStream, list[Event]]:
    stream = choice_of(model, request)
    ids = model.tokenizer.encode(text)
    events: list[Event] = []
    for at in range(0, len(ids), step):
        group = ids[at : at + step]
        logprobs = None
        if request.logprobs is not None:
            logprobs = [Logprobs(-0.5, list(range(top)), [-1.0 - i for i in range(top)]) for _ in group]
        events += stream.feed(group, logprobs)
    return stream, events + stream.finish(kind)


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def reasoning_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, ReasoningDelta))


def logprobs_of(events: list[Event]) -> list[TokenLogprob]:
    return [entry for event in events if isinstance(event, TextDelta) for entry in event.logprobs]


# ---------------------------------------------------------------- text and the end


def test_each_token_is_a_delta_and_the_end_is_one_finish(qwen: TextModel) -> None:
    stream, events = run(qwen, "hello world", ask(limits=Limits()))
    assert text_of(events) == "hello world"
    assert len(events) > 2
    assert events[-1] == Finish(0, "stop")
    assert stream.completion_tokens == len(qwen.tokenizer.encode("hello world"))
    assert stream.reasoning_tokens == 0


@pytest.mark.parametrize(("kind", "reason"), [("stop", "stop"), ("length", "length"), ("grammar", "stop")])
def test_finish_reasons(qwen: TextModel, kind: FinishKind, reason: str) -> None:
    assert run(qwen, "hello", ask(), kind=kind)[1][-1] == Finish(0, reason)  # type: ignore[arg-type]


def test_an_empty_answer_is_only_a_finish(qwen: TextModel) -> None:
    assert choice_of(qwen, ask()).finish("stop") == [Finish(0, "stop")]


def test_the_choice_is_written_on_every_event(qwen: TextModel) -> None:
    request = ask()
    stream = qwen.event_stream(request, qwen.render(request)[0], 3)
    events = [*stream.feed(qwen.tokenizer.encode("hi")), *stream.finish("stop")]
    assert {getattr(event, "choice") for event in events} == {3}  # noqa: B009


def test_no_delta_splits_a_character(qwen: TextModel) -> None:
    _, events = run(qwen, "flags 🇩🇪 and 👩‍👩‍👧!", ask())
    assert text_of(events) == "flags 🇩🇪 and 👩‍👩‍👧!"
    assert not any("\ufffd" in event.text or not event.text for event in events if isinstance(event, TextDelta))


def test_special_tokens_in_the_output_are_silent(qwen: TextModel) -> None:
    assert text_of(run(qwen, "a<|im_start|>b", ask())[1]) == "ab"


# ---------------------------------------------------------------- stop strings


def test_a_stop_string_ends_the_output_before_it(qwen: TextModel) -> None:
    request = ask(limits=Limits(stop=("30 =", "never")))
    stream, events = run(qwen, "12 + 30 = 42", request)
    assert text_of(events) == "12 + "
    assert events[-1] == Finish(0, "stop_sequence", "30 =")
    assert stream.is_done
    assert stream.completion_tokens < len(qwen.tokenizer.encode("12 + 30 = 42"))


def test_a_stop_string_on_the_last_token_beats_the_limit(qwen: TextModel) -> None:
    assert run(qwen, "ab", ask(limits=Limits(stop=("b",))), kind="length")[1][-1] == Finish(0, "stop_sequence", "b")


def test_half_a_stop_string_at_the_end_is_text(qwen: TextModel) -> None:
    assert text_of(run(qwen, "all ST", ask(limits=Limits(stop=("STOP",))))[1]) == "all ST"


def test_thoughts_are_not_searched_for_stop_strings(qwen: TextModel) -> None:
    _, events = run(qwen, "<think>STOP</think>go STOP", ask(limits=Limits(stop=("STOP",))))
    assert (reasoning_of(events), text_of(events)) == ("STOP", "go ")


# ---------------------------------------------------------------- reasoning


def opener(model: TextModel, tmp_path: Any) -> TextModel:
    load(tmp_path, tokenizer_json=model.tokenizer_json)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[-1].content }}[A]<think>\n")
    return TextModel.load(tmp_path)


@pytest.mark.parametrize("tokenizer", ["tokens", "text"])
def test_F31_think_blocks_in_all_combinations(qwen: TextModel, tmp_path: Any, tokenizer: str) -> None:
    base = qwen if tokenizer == "tokens" else load(tmp_path / "spelled", tokenizer_json=byte_level_json(()))
    opened = opener(base, tmp_path / "opened")
    shown = {
        "absent": (base, "hello", "", "hello"),
        "whole": (base, "<think>\na\n</think>\n\nhello", "a", "hello"),
        "truncated": (base, "<think>\na b", "a b", ""),
        "after blanks": (base, "\n<think>a</think>hello", "a", "hello"),
        "opened by the prompt": (opened, "a\n</think>\n\nhello", "a", "hello"),
        "opened, truncated": (opened, "a", "a", ""),
        "opened, opened again": (opened, "<think>\na</think>hello", "a", "hello"),
        "twice": (base, "<think>a</think>x<think>b</think>y", "ab", "xy"),
    }
    for name, (model, text, reasoning, content) in shown.items():
        for step in (1, 100):
            _, events = run(model, text, ask(), step=step)
            assert (reasoning_of(events), text_of(events)) == (reasoning, content), name


def test_N20_invisible_reasoning_is_dropped_but_counted(qwen: TextModel) -> None:
    request = ask(reasoning=Reasoning(mode="on", visible=False))
    stream, events = run(qwen, "<think>\nhm hm\n</think>\n\nyes", request)
    assert events[-2:] == [TextDelta(0, events[-2].text), Finish(0, "stop")]  # type: ignore[union-attr]
    assert reasoning_of(events) == ""
    assert text_of(events) == "yes"
    thought = qwen.tokenizer.encode("<think>\nhm hm\n</think>")
    assert stream.reasoning_tokens == len(thought)
    assert stream.completion_tokens == len(qwen.tokenizer.encode("<think>\nhm hm\n</think>\n\nyes"))


def test_a_raw_completion_knows_no_markers(qwen: TextModel) -> None:
    request = Request(model="tiny", prompts=(RawPrompt(text="x"),), tools=(WEATHER,))
    text = '<think>a</think>\n<tool_call>{"name": "w"}</tool_call>'
    assert text_of(run(qwen, text, request)[1]) == text


# ---------------------------------------------------------------- logprobs


def test_logprobs_ride_with_their_text(qwen: TextModel) -> None:
    _, events = run(qwen, "hello 🇩🇪 world", ask(logprobs=2), top=5)
    entries = logprobs_of(events)
    assert b"".join(bytes(entry.bytes or ()) for entry in entries) == "hello 🇩🇪 world".encode()
    assert all(len(entry.top) == 2 for entry in entries)
    assert entries[0].top[0].logprob == -1.0
    assert entries[0].logprob == -0.5
    lone = next(entry for entry in entries if entry.token == "\ufffd")
    assert lone.bytes is not None
    assert len(lone.bytes) >= 1
    for event in events:
        if isinstance(event, TextDelta):
            assert event.text


@settings(max_examples=200, deadline=None)
@given(WORDS, st.integers(1, 7), st.booleans(), st.booleans())
def test_logprobs_cover_exactly_the_text(
    qwen: TextModel, text: str, step: int, has_tools: bool, is_length: bool
) -> None:
    request = ask(logprobs=0, tools=(WEATHER,) if has_tools else ())
    _, events = run(qwen, text, request, step=step, kind="length" if is_length else "stop")
    entries = logprobs_of(events)
    covered = b"".join(bytes(entry.bytes or ()) for entry in entries).decode("utf-8", "replace")
    assert covered.replace("\n", "").replace(" ", "") == text_of(events).replace("\n", "").replace(" ", "")
    if "<think>" not in text and "</think>" not in text:
        assert covered == text_of(events).lstrip() or covered.lstrip() == text_of(events)


def test_the_token_that_holds_a_stop_string_partly_is_the_last(qwen: TextModel) -> None:
    ids = qwen.tokenizer.encode("hello")
    if len(ids) == len("hello"):
        pytest.skip("the tiny tokenizer has no longer token here")
    _, events = run(qwen, "hello world", ask(logprobs=0, limits=Limits(stop=("o world",))))
    assert text_of(events) == "hell"
    assert b"".join(bytes(entry.bytes or ()) for entry in logprobs_of(events)).startswith(b"hell")


def test_impossible_logprobs_are_finite(qwen: TextModel) -> None:
    stream = choice_of(qwen, ask(logprobs=1))
    events = stream.feed(qwen.tokenizer.encode("1"), [Logprobs(0.001, [5], [-math.inf])])
    entry = logprobs_of(events)[0]
    assert entry.logprob == 0.0
    assert entry.top[0].logprob == -9999.0


def test_reasoning_carries_no_logprobs(qwen: TextModel) -> None:
    _, events = run(qwen, "<think>\na\n</think>\n\nb", ask(logprobs=0))
    assert [entry.token for entry in logprobs_of(events)] == ["b"]


# ---------------------------------------------------------------- echo


def test_echo_begins_with_the_prompt(qwen: TextModel) -> None:
    request = Request(model="tiny", prompts=(RawPrompt(text="hello world"),), echo=True, logprobs=1)
    prompt = qwen.render(request)[0]
    stream = qwen.event_stream(request, prompt)
    given = [Logprobs(-1.0 - i, [7], [-0.25]) for i in range(prompt.num_tokens - 1)]
    (delta,) = stream.begin(given)
    assert isinstance(delta, TextDelta)
    assert delta.text == "hello world"
    assert math.isnan(delta.logprobs[0].logprob)
    assert [entry.logprob for entry in delta.logprobs[1:]] == [entry.logprob for entry in given]
    assert delta.logprobs[1].top[0].logprob == -0.25
    assert choice_of(qwen, ask(echo=True)).begin() == []


# ---------------------------------------------------------------- any chunking, other tokenizers


@settings(max_examples=200, deadline=None)
@given(WORDS, st.integers(2, 9), st.booleans(), st.booleans())
def test_deltas_merge_to_the_same_under_any_chunking(
    qwen: TextModel, text: str, step: int, has_stop: bool, has_logprobs: bool
) -> None:
    request = ask(limits=Limits(stop=("STOP", "12\n")) if has_stop else Limits(), logprobs=0 if has_logprobs else None)
    first, alone = run(qwen, text, request)
    second, grouped = run(qwen, text, request, step=step)
    assert text_of(alone) == text_of(grouped)
    assert reasoning_of(alone) == reasoning_of(grouped)
    assert logprobs_of(alone) == logprobs_of(grouped)
    assert alone[-1] == grouped[-1]
    assert first.completion_tokens == second.completion_tokens
    assert first.reasoning_tokens == second.reasoning_tokens


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_sentencepiece_answers(tmp_path: Any, model_type: str) -> None:
    load(tmp_path, template="mistral")
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(model_type))
    model = TextModel.load(tmp_path)
    assert text_of(run(model, "hello 🇩🇪 world", ask())[1]) == "hello 🇩🇪 world"
    raw = Request(model="tiny", prompts=(RawPrompt(text="x"),))
    assert text_of(run(model, "hello", raw)[1]) == " hello"
    _, events = run(model, "hello 🇩🇪 world", ask(logprobs=0))
    assert b"".join(bytes(entry.bytes or ()) for entry in logprobs_of(events)) == " hello 🇩🇪 world".encode()


def test_the_demo_model_reads_its_own_markup(demo: TextModel) -> None:
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    text = f"<think>\nweather\n</think>\n\n{call}"
    request = ask(tools=(WEATHER,), reasoning=Reasoning(mode="on"))
    stream, events = run(demo, text, request)
    assert reasoning_of(events) == "weather"
    assert events[-1] == Finish(0, "tool_calls")
    assert stream.completion_tokens == len(demo.tokenizer.encode(text))
