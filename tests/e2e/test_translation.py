"""Official SDKs through translation: our own neuron's chat route stands in for a server that speaks nothing else."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import openai
import pytest

from tests.e2e.fleet_of_neurons import Daemon
from tests.e2e.fleet_process import MODEL

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: Any = {"name": "get_weather", "description": "Current weather in a city", "input_schema": CITY}
WEATHER_FUNCTION: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "Current weather in a city",
    "parameters": CITY,
    "strict": None,
}
FOUND = '{"temperature": 14, "condition": "cloudy"}'


@pytest.fixture(scope="module")
def claude(translator: Daemon) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=translator.url, api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def gpt(translator: Daemon) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{translator.url}/v1", api_key="none", max_retries=0, timeout=120)


def user(text: str) -> Any:
    return {"role": "user", "content": text}


# ---------------------------------------------------------------------------------------------- Anthropic


def test_a_message_and_its_stream(claude: anthropic.Anthropic) -> None:
    settings: dict[str, Any] = {"model": MODEL, "max_tokens": 300, "messages": [user("What is 12+30?")]}
    raw = claude.messages.with_raw_response.create(**settings)
    assert raw.headers["x-cortex-translated"] == "messages->chat"
    answer = raw.parse()
    assert [block.type for block in answer.content] == ["text"] and "42" in answer.content[0].text
    assert (answer.model, answer.stop_reason) == (MODEL, "end_turn")
    with claude.messages.stream(**settings) as stream:
        pieces = list(stream.text_stream)
        final = stream.get_final_message()
    assert "".join(pieces) == final.content[0].text == answer.content[0].text
    assert final.usage.output_tokens == answer.usage.output_tokens
    counted = claude.messages.count_tokens(model=MODEL, messages=settings["messages"])
    usage = final.usage
    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_tool_loop_of_messages(claude: anthropic.Anthropic, is_streamed: bool) -> None:
    def ask(messages: list[Any]) -> Any:
        settings: dict[str, Any] = {"model": MODEL, "max_tokens": 300, "tools": [WEATHER], "messages": messages}
        if not is_streamed:
            return claude.messages.create(**settings)
        with claude.messages.stream(**settings) as stream:
            return stream.get_final_message()

    question = user("What is the weather in Oslo?")
    first = ask([question])
    use = first.content[-1]
    assert first.stop_reason == "tool_use" and (use.name, use.input) == ("get_weather", {"city": "Oslo"})
    second = ask(
        [
            question,
            {"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in first.content]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use.id, "content": FOUND}]},
        ]
    )
    assert second.stop_reason == "end_turn" and "14" in second.content[0].text


def test_thinking_is_shown_when_asked_for_and_round_trips(claude: anthropic.Anthropic) -> None:
    settings: dict[str, Any] = {
        "model": MODEL,
        "max_tokens": 2000,
        "thinking": {"type": "enabled", "budget_tokens": 1024},
    }
    answer = claude.messages.create(messages=[user("What is 12+30?")], **settings)
    assert [block.type for block in answer.content] == ["thinking", "text"] and answer.content[0].signature
    replayed = {"role": "assistant", "content": [block.model_dump() for block in answer.content]}
    with claude.messages.stream(
        messages=[user("What is 12+30?"), replayed, user("What is 20+5?")], **settings
    ) as stream:
        assert "25" in stream.get_final_message().content[-1].text
    plain = claude.messages.create(model=MODEL, max_tokens=300, messages=[user("What is 12+30?")])
    assert [block.type for block in plain.content] == ["text"]


def test_the_end_by_length_is_named(claude: anthropic.Anthropic) -> None:
    answer = claude.messages.create(model=MODEL, max_tokens=5, messages=[user("Count from 1 to 50.")])
    assert answer.stop_reason == "max_tokens" and answer.usage.output_tokens == 5


def test_errors_are_typed_in_both_dialects(claude: anthropic.Anthropic, gpt: openai.OpenAI) -> None:
    with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: \d+ tokens > \d+ maximum"):
        claude.messages.create(model=MODEL, max_tokens=5, messages=[user("1 2 3 4 5 6 7 8 " * 20_000)])
    with pytest.raises(openai.BadRequestError) as long:
        gpt.responses.create(model=MODEL, input="1 2 3 4 5 6 7 8 " * 20_000)
    assert (long.value.code, long.value.param) == ("context_length_exceeded", "input")
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(model="no/such", max_tokens=5, messages=[user("hi")])
    with pytest.raises(openai.BadRequestError) as schema:
        gpt.responses.create(
            model=MODEL,
            input="hi",
            text={"format": {"type": "json_schema", "name": "x", "schema": {"type": "nonsense"}}},
        )
    assert schema.value.param is not None and schema.value.param.startswith("text.format")


# ---------------------------------------------------------------------------------------------- OpenAI


def test_a_response_and_its_stream(gpt: openai.OpenAI) -> None:
    raw = gpt.responses.with_raw_response.create(model=MODEL, input="What is 12+30?")
    assert raw.headers["x-cortex-translated"] == "responses->chat"
    answer = raw.parse()
    assert "42" in answer.output_text and answer.status == "completed"
    with gpt.responses.stream(model=MODEL, input="What is 12+30?") as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert final.output_text == answer.output_text
    numbers = [event.sequence_number for event in events if hasattr(event, "sequence_number")]
    assert numbers == sorted(numbers)
    assert final.usage is not None and answer.usage is not None
    assert final.usage.output_tokens == answer.usage.output_tokens


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_tool_loop_of_responses(gpt: openai.OpenAI, is_streamed: bool) -> None:
    def ask(items: list[Any]) -> Any:
        settings: dict[str, Any] = {"model": MODEL, "input": items, "tools": [WEATHER_FUNCTION]}
        if not is_streamed:
            return gpt.responses.create(**settings)
        with gpt.responses.stream(**settings) as stream:
            stream.until_done()
            return stream.get_final_response()

    items: list[Any] = [user("What is the weather in Oslo?")]
    first = ask(items)
    called = next(item for item in first.output if item.type == "function_call")
    assert called.name == "get_weather" and json.loads(called.arguments) == {"city": "Oslo"}
    items += [item.model_dump(exclude_none=True, exclude={"parsed_arguments"}) for item in first.output]
    items.append({"type": "function_call_output", "call_id": called.call_id, "output": FOUND})
    assert "14" in ask(items).output_text


def test_chat_and_completions_pass(gpt: openai.OpenAI) -> None:
    raw = gpt.chat.completions.with_raw_response.create(model=MODEL, messages=[user("What is 12+30?")])
    assert "x-cortex-translated" not in raw.headers and raw.headers["x-cortex-node"] in ("n0", "n1")
    content = raw.parse().choices[0].message.content
    assert content is not None and "42" in content
    chunks = list(gpt.chat.completions.create(model=MODEL, messages=[user("What is 12+30?")], stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == content
    completed = gpt.completions.create(model=MODEL, prompt="def main():", max_tokens=5, extra_body={"ignore_eos": True})
    assert completed.choices[0].finish_reason == "length"
