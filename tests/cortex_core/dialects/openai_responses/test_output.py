"""The output items of a response: their order, their events, and what stands in them when they end."""

from __future__ import annotations

import json
from itertools import pairwise

import msgspec
from cortex_core.conversation import Reasoning
from cortex_core.dialects import openai_responses
from cortex_core.events import (
    Event,
    Finish,
    ReasoningDelta,
    TextDelta,
    TokenLogprob,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    TopLogprob,
)
from hypothesis import given

from tests.cortex_core.dialects.event_streams import event_streams
from tests.cortex_core.dialects.openai_responses.harness import TOOLS, USAGE, body_of, events_of, parsed, rebuilt


@given(event_streams(num_choices=1))
def test_items_of_a_kind_are_not_split(events: list[Event]) -> None:
    kinds = [item["type"] for item in body_of(parsed(), events)["output"]]
    assert all(left != right or left == "function_call" for left, right in pairwise(kinds))


def test_a_cut_call_is_incomplete_whatever_the_reason_of_the_cut() -> None:
    events: list[Event] = [
        ToolCallStart(0, 0, "ab", "f"),
        ToolCallArguments(0, 0, '{"a'),
        Finish(0, "length"),
        USAGE,
    ]
    (item,) = body_of(parsed(), events)["output"]
    assert item["status"] == "incomplete" and item["arguments"] == '{"a'
    assert rebuilt(events_of(parsed(), events)) == [item]


def test_a_call_without_arguments_gets_an_empty_object_and_a_custom_one_an_empty_text() -> None:
    asked = parsed(tools=TOOLS)
    events: list[Event] = [
        ToolCallStart(0, 0, "ab", "get_weather"),
        ToolCallEnd(0, 0),
        ToolCallStart(0, 1, "cd", "sh"),
        ToolCallEnd(0, 1),
        Finish(0, "tool_calls"),
        USAGE,
    ]
    output = body_of(asked, events)["output"]
    assert [item.get("arguments", item.get("input")) for item in output] == ["{}", ""]
    assert rebuilt(events_of(asked, events)) == output


def test_a_member_called_without_its_namespace_is_found_where_only_one_can_be_meant() -> None:
    events: list[Event] = [ToolCallStart(0, 0, "ab", "find"), ToolCallEnd(0, 0), Finish(0, "tool_calls"), USAGE]
    (item,) = body_of(parsed(tools=TOOLS), events)["output"]
    assert (item["name"], item["namespace"]) == ("find", "a")
    twice = [TOOLS[1], {**TOOLS[1], "name": "b"}]
    (item,) = body_of(parsed(tools=twice), events)["output"]
    assert item["name"] == "find" and "namespace" not in item


def test_logprobs_come_with_deltas_and_whole() -> None:
    entry = TokenLogprob("So", -0.5, (83, 111), (TopLogprob("So", -0.5, None), TopLogprob("No", float("-inf"), (78,))))
    events: list[Event] = [TextDelta(0, "So", (entry,)), Finish(0, "stop"), USAGE]
    asked = parsed(include=["message.output_text.logprobs"], top_logprobs=2)
    raw = events_of(asked, events)
    delta = next(event for event in raw if event["type"] == "response.output_text.delta")
    tops = [{"token": "So", "logprob": -0.5}, {"token": "No", "logprob": -9999.0}]
    assert delta["logprobs"] == [{"token": "So", "logprob": -0.5, "top_logprobs": tops}]
    (item,) = raw[-1]["response"]["output"]
    assert item["content"][0]["logprobs"] == [
        {
            "token": "So",
            "logprob": -0.5,
            "bytes": [83, 111],
            "top_logprobs": [{**tops[0], "bytes": [83, 111]}, {**tops[1], "bytes": [78]}],
        }
    ]
    assert events_of(parsed(), events)[-1]["response"]["output"][0]["content"][0]["logprobs"] == []


def test_reasoning_that_nobody_is_to_see_is_not_shown() -> None:
    hidden = msgspec.structs.replace(parsed(), reasoning=Reasoning("off", visible=False))
    events: list[Event] = [ReasoningDelta(0, "hm"), TextDelta(0, "So"), Finish(0, "stop"), USAGE]
    assert [item["type"] for item in body_of(hidden, events)["output"]] == ["message"]
    assert rebuilt(events_of(hidden, events)) == body_of(hidden, events)["output"]


def test_ids_have_their_prefixes() -> None:
    assert openai_responses.new_response_id().startswith("resp_")
    assert json.loads(openai_responses.input_tokens_body(7)) == {"object": "response.input_tokens", "input_tokens": 7}
