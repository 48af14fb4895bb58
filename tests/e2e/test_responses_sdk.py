"""The official `openai` SDK's Responses API against a fleet of two with the demo model, through the gateway."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import openai
import pydantic
import pytest

from tests.e2e.fleet_process import MODEL, FleetProcess, call

WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "get_weather",
    "description": "Current weather in a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": False,
}
CLOCK: dict[str, Any] = {
    "type": "function",
    "name": "get_time",
    "description": "Current time",
    "parameters": {"type": "object", "properties": {}},
    "strict": False,
}
DIAL: dict[str, Any] = {
    "type": "custom",
    "name": "dial",
    "description": "Dial a number",
    "format": {"type": "grammar", "syntax": "regex", "definition": "[0-9]{3}-[0-9]{2}"},
}
NAMESPACE: dict[str, Any] = {"type": "namespace", "name": "home", "description": "", "tools": [WEATHER, CLOCK]}
PIXEL = "data:image/png;base64,iVBORw0KGgo="


def ask(client: openai.OpenAI, prompt: Any, **settings: Any) -> Any:
    return client.responses.create(model=MODEL, input=prompt, **{"max_output_tokens": 300, **settings})


def stream(client: openai.OpenAI, prompt: Any, **settings: Any) -> tuple[list[Any], Any]:
    """All events, and the SDK's own accumulation of them."""
    with client.responses.stream(model=MODEL, input=prompt, **{"max_output_tokens": 300, **settings}) as heard:
        events = list(heard)
        return events, heard.get_final_response()


def deltas(events: list[Any], kind: str) -> str:
    return "".join(event.delta for event in events if event.type == f"response.{kind}.delta")


def test_a_plain_question_gets_the_right_answer(openai_client: openai.OpenAI) -> None:
    answer = ask(openai_client, "What is 12+30?", metadata={"k": "v"})
    assert "42" in answer.output_text
    assert answer.status == "completed" and answer.error is None and answer.incomplete_details is None
    assert answer.model == MODEL and answer.metadata == {"k": "v"} and answer._request_id
    assert [item.type for item in answer.output] == ["message"]
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert answer.id.startswith("resp_") and answer.output[0].id.startswith("msg_")


def test_N22_the_data_of_every_event_repeats_its_type_and_has_a_number(fleet: FleetProcess) -> None:
    """Read by hand: SDKs look at the data and never at the line with the event's name."""
    body = {"model": MODEL, "input": "What is 12+30?", "stream": True, "max_output_tokens": 50}
    status, _, answer = call(fleet.url, "POST", "/v1/responses", body)
    assert status == 200
    events = [block for block in answer.decode().split("\n\n") if block.startswith("event: ")]
    for number, block in enumerate(events):
        name, data = (line.partition(": ")[2] for line in block.splitlines())
        document = json.loads(data)
        assert (document["type"], document["sequence_number"]) == (name, number)
    assert len(events) > 5


def test_a_streamed_answer_equals_the_plain_one(openai_client: openai.OpenAI) -> None:
    plain = ask(openai_client, "Count from 1 to 12.")
    events, final = stream(openai_client, "Count from 1 to 12.")
    assert final.output_text == plain.output_text == deltas(events, "output_text")
    assert final.usage.output_tokens == plain.usage.output_tokens
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:4]] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert [event.type for event in events[-4:]] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert sum(event.type == "response.output_text.delta" for event in events) > 5


def test_instructions_are_the_system_prompt(openai_client: openai.OpenAI) -> None:
    short = ask(openai_client, "What is 3+4?").usage.input_tokens
    long = ask(openai_client, "What is 3+4?", instructions="You are a careful assistant. Answer briefly.")
    assert long.usage.input_tokens > short and long.instructions.startswith("You are")


def test_a_tool_loop_goes_on_with_the_items_of_the_answer(openai_client: openai.OpenAI) -> None:
    question: list[Any] = [{"role": "user", "content": "What is the weather in Oslo?"}]
    first = ask(openai_client, question, tools=[WEATHER], store=False)
    (call_item,) = [item for item in first.output if item.type == "function_call"]
    assert call_item.name == "get_weather" and json.loads(call_item.arguments) == {"city": "Oslo"}
    output = {
        "type": "function_call_output",
        "call_id": call_item.call_id,
        "output": '{"temperature": 14, "condition": "cloudy"}',
    }
    items = [item.model_dump(exclude_none=True) for item in first.output]
    second = ask(openai_client, [*question, *items, output], tools=[WEATHER], store=False)
    assert "14" in second.output_text and second.status == "completed"


def test_streamed_arguments_concatenate_to_json(openai_client: openai.OpenAI) -> None:
    events, final = stream(openai_client, "What is the weather in Lima?", tools=[WEATHER])
    assert json.loads(deltas(events, "function_call_arguments")) == {"city": "Lima"}
    (call_item,) = [item for item in final.output if item.type == "function_call"]
    assert json.loads(call_item.arguments) == {"city": "Lima"}
    assert call_item.call_id.startswith("call_") and call_item.status == "completed"


def test_required_and_named_tools_are_enforced(openai_client: openai.OpenAI) -> None:
    required = ask(openai_client, "What is 12+30?", tools=[WEATHER, CLOCK], tool_choice="required")
    assert required.output[-1].type == "function_call"
    named = ask(
        openai_client,
        "What is 12+30?",
        tools=[WEATHER, CLOCK],
        tool_choice={"type": "function", "name": "get_weather"},
    )
    assert named.output[-1].name == "get_weather"
    jsonschema.validate(json.loads(named.output[-1].arguments), WEATHER["parameters"])
    none = ask(openai_client, "What is the weather in Oslo?", tools=[WEATHER], tool_choice="none")
    assert all(item.type == "message" for item in none.output)


def test_a_custom_tool_is_called_with_text_that_its_grammar_allows(openai_client: openai.OpenAI) -> None:
    choice = {"type": "custom", "name": "dial"}
    events, final = stream(openai_client, "Dial 12345.", tools=[WEATHER, DIAL], tool_choice=choice)
    item = final.output[-1]
    assert item.type == "custom_tool_call" and item.name == "dial"
    number = item.input
    assert len(number) == 6 and number[3] == "-" and number.replace("-", "").isdigit()
    assert deltas(events, "custom_tool_call_input") == number
    history: list[Any] = [
        {"role": "user", "content": "Dial 12345."},
        {"type": "custom_tool_call", "call_id": item.call_id, "name": "dial", "input": number},
        {"type": "custom_tool_call_output", "call_id": item.call_id, "output": "busy"},
    ]
    assert ask(openai_client, history, tools=[DIAL]).status in ("completed", "incomplete")


def test_a_custom_tool_in_chat_obeys_its_grammar_too(openai_client: openai.OpenAI) -> None:
    grammar = {"syntax": "regex", "definition": DIAL["format"]["definition"]}
    custom = {"name": "dial", "description": "Dial a number", "format": {"type": "grammar", "grammar": grammar}}
    answer = openai_client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Dial 12345."}],
        tools=[{"type": "custom", "custom": custom}],  # type: ignore[list-item]
        tool_choice={"type": "custom", "custom": {"name": "dial"}},
        max_completion_tokens=300,
    )
    (tool_call,) = answer.choices[0].message.tool_calls or ()
    assert tool_call.type == "custom"
    assert len(tool_call.custom.input) == 6 and tool_call.custom.input[3] == "-"


def test_a_member_of_a_namespace_is_called_as_the_client_knows_it(openai_client: openai.OpenAI) -> None:
    answer = ask(
        openai_client,
        "What is the weather in Oslo?",
        tools=[NAMESPACE, {"type": "web_search"}],
        tool_choice={"type": "function", "name": "get_weather"},
    )
    item = answer.output[-1]
    assert (item.type, item.namespace, item.name) == ("function_call", "home", "get_weather")
    again = [{"role": "user", "content": "What is the weather in Oslo?"}, item.model_dump(exclude_none=True)]
    again.append({"type": "function_call_output", "call_id": item.call_id, "output": '{"temperature": 14}'})
    assert ask(openai_client, again, tools=[NAMESPACE]).output


def test_json_schema_output_is_parsed_by_the_sdk(openai_client: openai.OpenAI) -> None:
    class Person(pydantic.BaseModel):
        name: str
        age: int

    answer = openai_client.responses.parse(
        model=MODEL,
        input="Give me a JSON object with the name Ada and age 36.",
        text_format=Person,
        max_output_tokens=300,
    )
    assert answer.output_parsed == Person(name="Ada", age=36)
    loose = ask(openai_client, "Give me a JSON object.", text={"format": {"type": "json_object"}})
    assert isinstance(json.loads(loose.output_text), dict)


def test_reasoning_is_an_item_of_its_own_and_comes_back(openai_client: openai.OpenAI) -> None:
    plain = ask(openai_client, "What is 12+30?")
    assert [item.type for item in plain.output] == ["message"]
    thinking = {"chat_template_kwargs": {"enable_thinking": True}}
    events, final = stream(
        openai_client, "What is 12+30?", extra_body=thinking, include=["reasoning.encrypted_content"]
    )
    assert [item.type for item in final.output] == ["reasoning", "message"]
    thought = final.output[0]
    assert thought.summary[0].text == deltas(events, "reasoning_summary_text")
    assert thought.summary[0].text and "<think>" not in final.output_text and "42" in final.output_text
    assert 0 < final.usage.output_tokens_details.reasoning_tokens < final.usage.output_tokens
    carried: list[Any] = [
        {"role": "user", "content": "What is 12+30?"},
        {"type": "reasoning", "id": thought.id, "summary": [], "encrypted_content": thought.encrypted_content},
        {"role": "assistant", "content": final.output_text},
        {"role": "user", "content": "What is 3+4?"},
    ]
    assert "7" in ask(openai_client, carried).output_text


def test_effort_turns_reasoning_on_and_off(openai_client: openai.OpenAI) -> None:
    on = ask(openai_client, "What is 12+30?", reasoning={"effort": "low", "summary": "auto"})
    assert on.output[0].type == "reasoning" and on.reasoning.effort == "low"
    off = ask(openai_client, "What is 12+30?", reasoning={"effort": "none"})
    assert [item.type for item in off.output] == ["message"]


def test_a_cut_answer_is_incomplete(openai_client: openai.OpenAI) -> None:
    answer = ask(openai_client, "Count from 1 to 50.", max_output_tokens=16)
    assert answer.status == "incomplete" and answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage.output_tokens == 16
    with openai_client.responses.stream(model=MODEL, input="Count from 1 to 50.", max_output_tokens=16) as heard:
        last = list(heard)[-1]
    assert last.type == "response.incomplete" and last.response.output_text == answer.output_text


def test_logprobs_belong_to_the_text(openai_client: openai.OpenAI) -> None:
    answer = ask(openai_client, "What is 12+30?", include=["message.output_text.logprobs"], top_logprobs=3)
    entries = answer.output[0].content[0].logprobs
    assert b"".join(bytes(entry.bytes) for entry in entries).decode().startswith(answer.output_text)
    assert all(entry.logprob <= 0 and len(entry.top_logprobs) == 3 for entry in entries)


def test_input_tokens_are_counted_as_they_are_billed(openai_client: openai.OpenAI) -> None:
    settings: dict[str, Any] = {"input": "What is 12+30?", "instructions": "Be brief.", "tools": [WEATHER]}
    counted = openai_client.responses.input_tokens.count(model=MODEL, **settings)
    answer = openai_client.responses.create(model=MODEL, max_output_tokens=16, **settings)
    assert counted.input_tokens == answer.usage.input_tokens


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(
    ("settings", "param", "code"),
    [
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "previous_response_not_found"),
        ({"background": True}, "background", "unsupported_parameter"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]", "unsupported_parameter"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": PIXEL}]}]}, "input", None),
        ({"input": "1 2 3 4 5 6 7 8 " * 20_000}, "input", "context_length_exceeded"),
        (
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "wrong"}}}},
            "text.format.schema",
            "invalid_value",
        ),
        ({"tool_choice": {"type": "function", "name": "absent"}, "tools": [WEATHER]}, "tool_choice.name", None),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_is_wrong_is_named_before_anything_runs(
    openai_client: openai.OpenAI, settings: dict[str, Any], param: str, code: str | None, is_stream: bool
) -> None:
    # A stream that has waited long (on a busy machine) has its status line already: then the error is its only event.
    with pytest.raises(openai.APIError) as caught:
        answer = openai_client.responses.create(**{"model": MODEL, "input": "hi", "stream": is_stream, **settings})
        list(answer)
    assert is_stream or isinstance(caught.value, openai.BadRequestError)
    assert caught.value.param == param
    assert code is None or caught.value.code == code


def test_a_wrong_model_is_a_not_found_error(openai_client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        openai_client.responses.create(model="no/such", input="hi")
    assert caught.value.code == "model_not_found" and caught.value.request_id


def test_nothing_is_stored(openai_client: openai.OpenAI) -> None:
    answer = ask(openai_client, "hi", max_output_tokens=16)
    assert answer.store is False  # type: ignore[attr-defined]
    with pytest.raises(openai.NotFoundError):
        openai_client.responses.retrieve(answer.id)


def test_the_path_without_v1_and_the_gateways_headers(fleet: FleetProcess) -> None:
    status, headers, body = call(fleet.url, "POST", "/responses", {"model": MODEL, "input": "What is 3+4?"})
    assert status == 200 and b"7" in body
    assert headers["x-cortex-model"] == MODEL and headers["x-request-id"] == headers["request-id"]
