"""The official `anthropic` SDK against a fleet of two with the demo model."""

from __future__ import annotations

from typing import Any

import anthropic
import pytest

from tests.e2e.fleet_of_neurons import Daemon
from tests.e2e.fleet_process import MODEL

WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "description": "Current weather in a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


def ask(client: anthropic.Anthropic, text: str, **settings: Any) -> Any:
    return client.messages.create(
        model=MODEL, messages=[{"role": "user", "content": text}], **{"max_tokens": 300, **settings}
    )


def test_a_plain_question_gets_the_right_answer(anthropic_client: anthropic.Anthropic) -> None:
    answer = ask(anthropic_client, "What is 12+30?")
    assert [block.type for block in answer.content] == ["text"]
    assert "42" in answer.content[0].text
    assert answer.stop_reason == "end_turn" and answer.model == MODEL
    assert answer.id.startswith("msg_") and answer._request_id.startswith("req_")


@pytest.mark.parametrize(
    "credential",
    [
        {"api_key": "none"},
        {"auth_token": "none"},
        {"api_key": "none", "default_headers": {"x-api-key": "none", "anthropic-version": "2023-06-01"}},
        {"auth_token": "none", "default_headers": {"x-api-key": "other"}},
    ],
    ids=["key", "token", "as in 2023", "both"],
)
def test_every_style_of_authentication_is_taken(front: Daemon, credential: dict[str, Any]) -> None:
    with anthropic.Anthropic(base_url=front.url, max_retries=0, timeout=120, **credential) as client:
        assert "42" in ask(client, "What is 12+30?").content[0].text


def test_the_stream_accumulates_to_the_same_message(anthropic_client: anthropic.Anthropic) -> None:
    plain = ask(anthropic_client, "Count from 1 to 12.")
    with anthropic_client.messages.stream(
        model=MODEL, max_tokens=300, messages=[{"role": "user", "content": "Count from 1 to 12."}]
    ) as stream:
        pieces = list(stream.text_stream)
        final = stream.get_final_message()
    assert "".join(pieces) == plain.content[0].text == final.content[0].text
    assert len(pieces) > 5
    assert final.stop_reason == "end_turn"
    assert final.usage.output_tokens == plain.usage.output_tokens


def total_input(usage: Any) -> int:
    return int(usage.input_tokens + (usage.cache_read_input_tokens or 0) + (usage.cache_creation_input_tokens or 0))


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"system": "Be brief."},
        {"tools": [WEATHER]},
        {"system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}], "tools": [WEATHER]},
        {"thinking": {"type": "enabled", "budget_tokens": 1024}},
    ],
)
def test_count_tokens_equals_what_is_billed(anthropic_client: anthropic.Anthropic, extra: dict[str, Any]) -> None:
    messages: list[Any] = [{"role": "user", "content": "What is 20+21?"}]
    counted = anthropic_client.messages.count_tokens(model=MODEL, messages=messages, **extra)
    for _ in range(2):  # the second time from the prefix cache: the sum stays
        answer = anthropic_client.messages.create(model=MODEL, max_tokens=2000, messages=messages, **extra)
        assert total_input(answer.usage) == counted.input_tokens
    with anthropic_client.messages.stream(model=MODEL, max_tokens=2000, messages=messages, **extra) as stream:
        assert total_input(stream.get_final_message().usage) == counted.input_tokens


def test_a_tool_loop_completes(anthropic_client: anthropic.Anthropic) -> None:
    question = {"role": "user", "content": "What is the weather in Oslo?"}
    first = anthropic_client.messages.create(model=MODEL, max_tokens=300, tools=[WEATHER], messages=[question])
    assert first.stop_reason == "tool_use"
    use = first.content[-1]
    assert use.type == "tool_use" and use.name == "get_weather" and use.input == {"city": "Oslo"}
    second = anthropic_client.messages.create(
        model=MODEL,
        max_tokens=300,
        tools=[WEATHER],
        messages=[
            question,
            {"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in first.content]},
            {
                "role": "user",
                "content": [
                    {
                        "type": "tool_result",
                        "tool_use_id": use.id,
                        "content": [{"type": "text", "text": '{"temperature": 14, "condition": "cloudy"}'}],
                    }
                ],
            },
        ],
    )
    assert second.stop_reason == "end_turn" and "14" in second.content[0].text


def test_streamed_tool_input_is_an_object(anthropic_client: anthropic.Anthropic) -> None:
    with anthropic_client.messages.stream(
        model=MODEL,
        max_tokens=300,
        tools=[WEATHER],
        messages=[{"role": "user", "content": "What is the weather in Lima?"}],
    ) as stream:
        events = list(stream)
        final = stream.get_final_message()
    assert final.content[-1].input == {"city": "Lima"} and final.stop_reason == "tool_use"
    starts = [event.index for event in events if event.type == "content_block_start"]
    assert starts == list(range(len(starts)))


def test_tool_choice_any_tool_and_none(anthropic_client: anthropic.Anthropic) -> None:
    forced = ask(anthropic_client, "What is 12+30?", tools=[WEATHER], tool_choice={"type": "any"})
    assert forced.stop_reason == "tool_use"
    named = ask(
        anthropic_client, "What is 12+30?", tools=[WEATHER], tool_choice={"type": "tool", "name": "get_weather"}
    )
    assert named.content[-1].name == "get_weather" and isinstance(named.content[-1].input["city"], str)
    none = ask(anthropic_client, "What is the weather in Oslo?", tools=[WEATHER], tool_choice={"type": "none"})
    assert all(block.type == "text" for block in none.content)


def test_a_stop_sequence_is_named(anthropic_client: anthropic.Anthropic) -> None:
    answer = ask(anthropic_client, "Count from 1 to 20.", stop_sequences=["15"])
    assert answer.stop_reason == "stop_sequence" and answer.stop_sequence == "15"
    assert "14" in answer.content[0].text and "15" not in answer.content[0].text


def test_max_tokens_is_clamped_and_its_end_is_named(anthropic_client: anthropic.Anthropic) -> None:
    assert ask(anthropic_client, "Count from 1 to 50.", max_tokens=5).stop_reason == "max_tokens"
    generous = ask(anthropic_client, "What is 1+1?", max_tokens=10_000_000, timeout=60)
    assert generous.stop_reason == "end_turn"


def test_thinking_blocks_come_first_signed_and_round_trip(anthropic_client: anthropic.Anthropic) -> None:
    settings: dict[str, Any] = {"thinking": {"type": "enabled", "budget_tokens": 1024}, "max_tokens": 2000}
    answer = ask(anthropic_client, "What is 12+30?", **settings)
    assert [block.type for block in answer.content] == ["thinking", "text"]
    assert answer.content[0].thinking and answer.content[0].signature
    assert "42" in answer.content[1].text
    following = anthropic_client.messages.create(
        model=MODEL,
        messages=[
            {"role": "user", "content": "What is 12+30?"},
            {"role": "assistant", "content": [block.model_dump() for block in answer.content]},
            {"role": "user", "content": "What is 20+5?"},
        ],
        **settings,
    )
    assert "25" in following.content[-1].text
    with anthropic_client.messages.stream(
        model=MODEL, messages=[{"role": "user", "content": "What is 12+30?"}], **settings
    ) as stream:
        final = stream.get_final_message()
    assert [block.type for block in final.content] == ["thinking", "text"] and final.content[0].signature


def test_no_thinking_unless_asked(anthropic_client: anthropic.Anthropic) -> None:
    assert all(block.type == "text" for block in ask(anthropic_client, "What is 12+30?").content)


def test_a_request_in_the_shape_of_an_agent_is_answered(anthropic_client: anthropic.Anthropic) -> None:
    """Attribution line, blocks with cache marks, a system message between turns, unknown fields and betas."""
    answer = anthropic_client.messages.create(
        model=MODEL,
        max_tokens=32_000,
        system=[
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.329.f09; cc_entrypoint=cli;"},
            {"type": "text", "text": "You are helpful.", "cache_control": {"type": "ephemeral"}},
        ],
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "What is 12+30?"}]},
        ],
        tools=[WEATHER],
        thinking={"type": "disabled"},
        metadata={"user_id": "{}"},
        extra_headers={"anthropic-beta": "context-management-2025-06-27,no-such-beta"},
        extra_body={"context_management": {"edits": []}, "output_config": {"effort": "high"}, "surprise": 1},
    )
    assert "42" in answer.content[0].text


def test_models_are_listed_and_retrieved(anthropic_client: anthropic.Anthropic) -> None:
    assert MODEL in [model.id for model in anthropic_client.models.list()]
    model = anthropic_client.models.retrieve(MODEL)
    assert model.type == "model" and model.display_name


def test_errors_are_typed(anthropic_client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        anthropic_client.messages.create(model="no/such", max_tokens=5, messages=[{"role": "user", "content": "hi"}])
    assert missing.value.body["error"]["type"] == "not_found_error"  # type: ignore[index, call-overload]
    with pytest.raises(anthropic.BadRequestError, match="at least one message"):
        anthropic_client.messages.create(model=MODEL, max_tokens=5, messages=[])
    with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: \d+ tokens > \d+ maximum"):
        ask(anthropic_client, "1 2 3 4 5 6 7 8 " * 20_000)
    with pytest.raises(anthropic.BadRequestError, match="image"):
        anthropic_client.messages.create(
            model=MODEL,
            max_tokens=5,
            messages=[
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
                    ],
                }
            ],
        )
