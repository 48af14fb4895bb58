"""A request is written for a chat server: what the other side would read is what was asked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, get_type_hints

import msgspec
import pytest
from cortex_core.conversation import (
    ImagePart,
    Limits,
    RawPrompt,
    Reasoning,
    Request,
    ResponseFormat,
    Sampling,
    TextPart,
    ThinkingPart,
    ToolCallPart,
    ToolChoice,
    ToolDefinition,
    ToolResultPart,
    Turn,
)
from cortex_core.dialects import anthropic_messages, openai_chat
from cortex_core.dialects.openai_chat_client import read_count, write_count_request, write_request
from cortex_core.dialects.openai_chat_client.request import NOT_CARRIED
from cortex_core.errors import ApiError
from openai.types.chat import completion_create_params

from tests.cortex_core.dialects.rich_bodies import RICH_CHAT, RICH_MESSAGES

OFFICIAL_TYPES = (
    completion_create_params.CompletionCreateParamsBase,
    completion_create_params.CompletionCreateParamsStreaming,
)


def rewritten(request: Request) -> Request:
    return openai_chat.parse(write_request(request))


def streamed(request: Request) -> Request:
    return msgspec.structs.replace(request, stream=True, include_usage=True)


CHANGES: list[dict[str, Any]] = [
    {},
    {"n": 3, "logprobs": True, "top_logprobs": 4},
    {"tool_choice": "required", "parallel_tool_calls": False},
    {"tool_choice": {"type": "function", "function": {"name": "f"}}},
    {"tools": None, "tool_choice": None},
    {"response_format": {"type": "json_object"}},
    {"response_format": None, "reasoning_effort": "low", "thinking": None},
    {"chat_template_kwargs": None, "thinking": {"type": "disabled"}},
    {"chat_template_kwargs": None, "thinking": None},
    {"temperature": 0, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "seed": 9, "max_tokens": 3, "ignore_eos": True},
    {"presence_penalty": 1, "frequency_penalty": -1, "repetition_penalty": 1.1},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
    {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
        "continue_final_message": True,
    },
]


@pytest.mark.parametrize("changes", CHANGES)
def test_a_chat_request_survives_being_written_and_parsed(changes: dict[str, Any]) -> None:
    request = openai_chat.parse(json.dumps({**RICH_CHAT, **changes}).encode())
    assert rewritten(request) == msgspec.structs.replace(
        streamed(request), template_kwargs=rewritten(request).template_kwargs
    )
    for name, value in request.template_kwargs.items():
        assert rewritten(request).template_kwargs[name] == value


def test_thinking_off_reaches_the_other_side() -> None:
    asked = anthropic_messages.parse(b'{"model":"m","max_tokens":9,"messages":[{"role":"user","content":"q"}]}')
    assert rewritten(asked).reasoning == Reasoning("off")


def test_a_raw_prompt_is_no_chat() -> None:
    with pytest.raises(ValueError, match="raw prompt"):
        write_request(Request(model="m", prompts=(RawPrompt("x"),)))


def test_tokens_are_counted_of_the_prompt_that_would_be_sent() -> None:
    asked = anthropic_messages.parse(json.dumps(RICH_MESSAGES).encode())
    sent = json.loads(write_request(asked, model="m"))
    counted = json.loads(write_count_request(asked, model="m"))
    for name in ("model", "messages", "tools", "chat_template_kwargs"):
        assert counted.get(name) == sent.get(name), name
    assert counted["add_generation_prompt"] is not asked.continue_final_turn
    with pytest.raises(ValueError, match="raw prompt"):
        write_count_request(Request("m", prompts=(RawPrompt("a"),)))


@pytest.mark.parametrize(
    ("answer", "count"),
    [(b'{"count": 7, "tokens": [1]}', 7), (b'{"tokens": []}', None), (b'{"count": -1}', None), (b"\xff", None)],
)
def test_what_a_server_counted(answer: bytes, count: int | None) -> None:
    assert read_count(answer) == count


EVERYTHING = Request(
    "m",
    turns=(
        Turn("user", (ImagePart(data="aGk=", media_type="image/png", detail="low"), ImagePart(url="http://x/y"))),
        Turn("assistant", (ThinkingPart("hm", "sig"), TextPart("a"), ToolCallPart("1", "f", "{}"))),
        Turn("tool", (ToolResultPart("1", (TextPart("b"),), True, "f"),)),
    ),
    tools=(ToolDefinition("f", "what", {"type": "object"}, True, True, "space", "member"),),
    tool_choice=ToolChoice("auto", None, ("f",)),
    parallel_tool_calls=False,
    response_format=ResponseFormat("json_schema", {"type": "object"}, "shape", True),
    sampling=Sampling(0.1, 0.2, 3, 0.4, 0.5, 0.6, 0.7, {8: 9.0}, 10),
    limits=Limits(11, ("x",), True),
    reasoning=Reasoning("on", "low", 2048, False, True),
    num_choices=2,
    logprobs=3,
    stream=True,
    include_usage=True,
    continue_final_turn=True,
    template_kwargs={"x": 1},
    param_names={"a": "b"},
    dropped=("c",),
    echo_fields={"d": 1},
)
PLAIN: dict[str, Any] = {"model": "m", "turns": (Turn("user", (TextPart("hi"),)),)}


def paths(struct: msgspec.Struct) -> Iterator[tuple[str, msgspec.Struct, str]]:
    """Every field of every struct that a request is made of, each once."""
    for name in struct.__struct_fields__:
        value = getattr(struct, name)
        inner = value if isinstance(value, tuple) else (value,)
        structs = [each for each in inner if isinstance(each, msgspec.Struct)]
        if not structs:
            yield f"{type(struct).__name__}.{name}", struct, name
        for each in structs:
            yield from paths(each)


def replaced(within: Any, target: msgspec.Struct, by: msgspec.Struct) -> Any:
    if within is target:
        return by
    if isinstance(within, tuple):
        return tuple(replaced(each, target, by) for each in within)
    if isinstance(within, msgspec.Struct):
        fields = {name: replaced(getattr(within, name), target, by) for name in within.__struct_fields__}
        return type(within)(**fields)
    return within


OTHERS: dict[str, Any] = {
    "ImagePart.data": "b3RoZXI=",
    "Turn.role": "system",
    "ToolChoice.mode": "required",
    "ToolChoice.name": None,
    "ResponseFormat.kind": "json_object",
    "Reasoning.mode": "off",
    "Request.prompts": (),
}


def other(path: str, value: Any) -> Any:
    """Something else of the same type."""
    if path in OTHERS:
        return OTHERS[path]
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            return value + "z"
        case tuple():
            return (*value, "z")
        case dict():
            return {**value, "9": 1} if path != "Sampling.logit_bias" else {9: 1.0}
    return "z"


def test_every_part_of_a_request_is_carried_or_listed() -> None:
    """Change one thing at a time: the body changes too, or the thing is listed as not carried."""
    body = write_request(EVERYTHING)
    silent = set()
    seen = set()
    for path, struct, name in paths(EVERYTHING):
        value = getattr(struct, name)
        if value is None:
            continue
        seen.add(path)
        by = msgspec.structs.replace(struct, **{name: other(path, value)})
        if write_request(replaced(EVERYTHING, struct, by)) == body:
            silent.add(path)
    assert silent == set(NOT_CARRIED) & seen
    assert len(seen) > 40 and set(NOT_CARRIED) <= seen
    named = msgspec.structs.replace(EVERYTHING, tool_choice=ToolChoice("named", "f"))
    assert json.loads(write_request(named))["tool_choice"]["function"]["name"] == "f"


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"sampling": Sampling(top_k=5)}, "top_k"),
        ({"sampling": Sampling(min_p=0.1)}, "min_p"),
        ({"sampling": Sampling(repetition_penalty=1.1)}, "repetition_penalty"),
        ({"limits": Limits(ignore_eos=True)}, "ignore_eos"),
        ({"reasoning": Reasoning("on", budget_tokens=2000)}, "thinking.budget_tokens"),
        ({"template_kwargs": {"x": 1}}, "chat_template_kwargs"),
        ({"continue_final_turn": True}, "messages"),
    ],
)
def test_what_only_extensions_say_is_refused_by_name_without_them(fields: dict[str, Any], named: str) -> None:
    asked = Request(**PLAIN, **fields)
    assert write_request(asked)
    with pytest.raises(ApiError, match=named) as caught:
        write_request(asked, extensions=False)
    assert (caught.value.status, caught.value.param) == (400, named)


def test_without_extensions_every_field_is_official() -> None:
    asked = Request(
        "m",
        turns=(
            Turn("user", (TextPart("hi"),)),
            Turn("assistant", (ThinkingPart("hm"), TextPart("a"))),
            Turn("user", (TextPart("b"),)),
        ),
        limits=Limits(50, ("x",)),
        sampling=Sampling(temperature=0.5, top_p=0.9, seed=1),
        reasoning=Reasoning("off", "low", visible=False),
    )
    body = json.loads(write_request(asked, extensions=False))
    assert set(body) <= {name for type_ in OFFICIAL_TYPES for name in get_type_hints(type_)}
    assert (body["max_completion_tokens"], body["reasoning_effort"]) == (50, "low")
    assert all("reasoning_content" not in message for message in body["messages"])
