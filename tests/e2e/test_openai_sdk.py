"""The official `openai` SDK against a fleet of two with the demo model: right answers, typed errors."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import openai
import pytest

from tests.e2e.fleet_process import MODEL

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CLOCK: dict[str, Any] = {
    "type": "function",
    "function": {"name": "get_time", "description": "Current time", "parameters": {"type": "object", "properties": {}}},
}
PAGE_SIZE = 16
"""Tokens: whole pages are cached, and the opening of an answer is not in the next prompt."""
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAf"
    "FcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def ask(client: openai.OpenAI, text: str, **settings: Any) -> Any:
    return client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": text}], **{"max_completion_tokens": 300, **settings}
    )


def test_a_plain_question_gets_the_right_answer(openai_client: openai.OpenAI) -> None:
    answer = ask(openai_client, "What is 12+30?")
    assert "42" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == MODEL
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.choices[0].message.tool_calls is None


def test_a_streamed_answer_equals_the_plain_one(openai_client: openai.OpenAI) -> None:
    plain = ask(openai_client, "Count from 1 to 12.")
    chunks = list(ask(openai_client, "Count from 1 to 12.", stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == plain.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content == ""
    assert [c.choices[0].finish_reason for c in chunks if c.choices].count("stop") == 1
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == plain.usage.completion_tokens
    assert all(c.usage is None for c in chunks[:-1])
    assert len({c.id for c in chunks}) == 1
    assert sum(1 for c in chunks if c.choices and c.choices[0].delta.content) > 5


def test_a_stream_without_include_usage_carries_none(openai_client: openai.OpenAI) -> None:
    chunks = list(ask(openai_client, "What is 2+2?", stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


def test_tool_choice_auto_calls_the_weather_tool_and_uses_its_result(openai_client: openai.OpenAI) -> None:
    question = "What is the weather in Oslo?"
    first = ask(openai_client, question, tools=[WEATHER])
    assert first.choices[0].finish_reason == "tool_calls"
    (tool_call,) = first.choices[0].message.tool_calls
    assert tool_call.function.name == "get_weather"
    assert json.loads(tool_call.function.arguments) == {"city": "Oslo"}
    second = openai_client.chat.completions.create(
        model=MODEL,
        max_completion_tokens=200,
        tools=[WEATHER],
        messages=[
            {"role": "user", "content": question},
            first.choices[0].message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": tool_call.id, "content": '{"temperature": 14, "condition": "cloudy"}'},
        ],
    )
    assert second.choices[0].finish_reason == "stop"
    assert "14" in second.choices[0].message.content


def test_streamed_tool_arguments_concatenate_to_json(openai_client: openai.OpenAI) -> None:
    chunks = list(ask(openai_client, "What is the weather in Lima?", tools=[WEATHER], stream=True))
    parts = [call for c in chunks for call in (c.choices[0].delta.tool_calls or [])]
    assert parts[0].function.name == "get_weather" and parts[0].id
    assert {part.index for part in parts} == {0}
    assert json.loads("".join(part.function.arguments or "" for part in parts)) == {"city": "Lima"}
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_tool_choice_required_and_named_are_enforced(openai_client: openai.OpenAI) -> None:
    required = ask(openai_client, "What is 12+30?", tools=[WEATHER, CLOCK], tool_choice="required")
    assert required.choices[0].finish_reason == "tool_calls"
    assert required.choices[0].message.tool_calls[0].function.name in ("get_weather", "get_time")
    named = ask(
        openai_client,
        "What is 12+30?",
        tools=[WEATHER, CLOCK],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
    )
    function = named.choices[0].message.tool_calls[0].function
    assert function.name == "get_weather"
    jsonschema.validate(json.loads(function.arguments), WEATHER["function"]["parameters"])


def test_tool_choice_none_never_calls(openai_client: openai.OpenAI) -> None:
    answer = ask(openai_client, "What is the weather in Oslo?", tools=[WEATHER], tool_choice="none")
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].finish_reason in ("stop", "length")


def test_json_schema_output_validates(openai_client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    answer = ask(
        openai_client,
        "Give me a JSON object with the name Ada and age 36.",
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}},
    )
    value = json.loads(answer.choices[0].message.content)
    jsonschema.validate(value, schema)
    assert value == {"name": "Ada", "age": 36}
    loose = ask(openai_client, "Give me a JSON object.", response_format={"type": "json_object"})
    assert isinstance(json.loads(loose.choices[0].message.content), dict)


def test_output_ends_before_a_stop_sequence(openai_client: openai.OpenAI) -> None:
    full = ask(openai_client, "Count from 1 to 20.").choices[0].message.content
    assert "15" in full
    stopped = ask(openai_client, "Count from 1 to 20.", stop=["15", "never"])
    assert stopped.choices[0].message.content == full[: full.index("15")]
    assert stopped.choices[0].finish_reason == "stop"
    streamed = ask(openai_client, "Count from 1 to 20.", stop="15", stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in streamed) == full[: full.index("15")]


def test_max_tokens_ends_with_length(openai_client: openai.OpenAI) -> None:
    answer = ask(openai_client, "Count from 1 to 50.", max_completion_tokens=7)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 7


def test_logprobs_belong_to_the_text(openai_client: openai.OpenAI) -> None:
    answer = ask(openai_client, "What is 12+30?", logprobs=True, top_logprobs=3)
    entries = answer.choices[0].logprobs.content
    text = b"".join(bytes(entry.bytes) for entry in entries).decode()
    assert text.startswith(answer.choices[0].message.content)
    for entry in entries:
        assert entry.logprob <= 0 and len(entry.top_logprobs) == 3
        ranked = [top.logprob for top in entry.top_logprobs]
        assert ranked == sorted(ranked, reverse=True)
        assert entry.top_logprobs[0].logprob >= entry.logprob


def test_n_gives_n_choices_and_a_summed_usage(openai_client: openai.OpenAI) -> None:
    one = ask(openai_client, "What is 12+30?", temperature=0)
    two = ask(openai_client, "What is 12+30?", n=2, temperature=0)
    assert [choice.index for choice in two.choices] == [0, 1]
    assert all("42" in choice.message.content for choice in two.choices)
    assert two.usage.completion_tokens == 2 * one.usage.completion_tokens
    assert two.usage.prompt_tokens == one.usage.prompt_tokens


def test_a_seed_makes_sampling_reproducible(openai_client: openai.OpenAI) -> None:
    def sample(seed: int) -> str:
        answer = ask(openai_client, "Write a poem.", temperature=2.0, seed=seed, max_completion_tokens=40)
        return str(answer.choices[0].message.content)

    assert sample(7) == sample(7)
    assert len({sample(seed) for seed in range(4)}) > 1


def test_reasoning_comes_in_its_own_field_and_only_when_asked(openai_client: openai.OpenAI) -> None:
    plain = ask(openai_client, "What is 12+30?").choices[0].message
    assert not getattr(plain, "reasoning_content", None)
    answer = ask(openai_client, "What is 12+30?", extra_body={"chat_template_kwargs": {"enable_thinking": True}})
    message = answer.choices[0].message
    assert message.reasoning_content and "<think>" not in message.content
    assert "42" in message.content
    assert 0 < answer.usage.completion_tokens_details.reasoning_tokens < answer.usage.completion_tokens


def test_cached_prompt_tokens_are_reported_on_the_second_turn(openai_client: openai.OpenAI) -> None:
    padding = "This is a long shared preamble about nothing in particular. " * 20
    messages: list[Any] = [{"role": "system", "content": padding}, {"role": "user", "content": "What is 3+4?"}]
    openai_client.chat.completions.create(model=MODEL, messages=messages, max_completion_tokens=20)
    again = openai_client.chat.completions.create(model=MODEL, messages=messages, max_completion_tokens=20)
    assert again.usage.prompt_tokens_details.cached_tokens > 100
    assert again.usage.prompt_tokens_details.cached_tokens < again.usage.prompt_tokens


def test_completions_take_a_raw_prompt(openai_client: openai.OpenAI) -> None:
    prompt = "<|im_start|>user\nWhat is 12+30?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    answer = openai_client.completions.create(model=MODEL, prompt=prompt, max_tokens=40, temperature=0)
    assert "42" in answer.choices[0].text
    chunks = list(
        openai_client.completions.create(model=MODEL, prompt=prompt, max_tokens=40, temperature=0, stream=True)
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text


def test_models_are_listed_and_retrieved(openai_client: openai.OpenAI) -> None:
    assert MODEL in [model.id for model in openai_client.models.list()]
    model = openai_client.models.retrieve(MODEL)
    assert model.id == MODEL and model.object == "model" and model.created > 0


def test_N11_a_turn_whose_reasoning_was_left_out_finds_the_cached_prompt_of_the_turn_before(
    openai_client: openai.OpenAI,
) -> None:
    """Clients send answers back without their reasoning: what counts is the prompt that both turns begin with."""
    # Long enough for the gateway to know it again: prompts are compared in blocks of 1 KiB, and there are two neurons.
    story = " ".join(f"Number {i} of the eleventh list is {i * 7}." for i in range(60))
    history = [{"role": "user", "content": f"{story} What is 12+30?"}]
    thinking = {"chat_template_kwargs": {"enable_thinking": True}}
    settings: dict[str, Any] = {"model": MODEL, "max_completion_tokens": 100, "extra_body": thinking}
    first = openai_client.chat.completions.create(messages=history, **settings)
    assert first.choices[0].message.reasoning_content
    history += [{"role": "assistant", "content": first.choices[0].message.content}, {"role": "user", "content": "Why?"}]
    second = openai_client.chat.completions.create(messages=history, **settings)
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached >= first.usage.prompt_tokens - 2 * PAGE_SIZE


def test_N9_an_image_is_refused_by_name_on_a_text_model(openai_client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        openai_client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": PIXEL}}]}],
        )
    assert caught.value.code == "vision_unsupported" and "image" in caught.value.message


def test_a_wrong_model_is_a_not_found_error(openai_client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        openai_client.chat.completions.create(model="no/such", messages=[{"role": "user", "content": "hi"}])
    assert caught.value.code == "model_not_found" and caught.value.request_id
    with pytest.raises(openai.NotFoundError):
        openai_client.models.retrieve("no/such")


def test_a_prompt_that_is_too_long_is_refused_with_its_numbers(openai_client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(openai_client, "1 2 3 4 5 6 7 8 " * 20_000)
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_schema_is_refused_before_anything_runs(openai_client: openai.OpenAI, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(
            openai_client,
            "hi",
            stream=stream,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "wrong"}}},
        )
    assert "schema" in (caught.value.param or "") + caught.value.message


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"n": 0}, "n"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"tool_choice": {"type": "function", "function": {"name": "absent"}}, "tools": [WEATHER]}, "tool_choice"),
        ({"extra_body": {"messages": "hello"}}, "messages"),
    ],
)
def test_a_value_out_of_range_names_its_field(
    openai_client: openai.OpenAI, settings: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(openai_client, "hi", **settings)
    assert param in (caught.value.param or ""), caught.value
