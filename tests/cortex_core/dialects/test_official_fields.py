"""Every field of the official request types is mapped, refused by name, or listed as ignored; and each list is true."""

from __future__ import annotations

import json
from types import ModuleType
from typing import Any

import msgspec
import pytest
import typing_extensions as typing
from anthropic.types import (
    content_block_param,
    message_count_tokens_params,
    message_create_params,
    tool_result_block_param,
)
from anthropic.types.beta import beta_content_block_param as beta_block_param
from anthropic.types.beta import beta_system_message_param
from anthropic.types.beta import message_count_tokens_params as beta_count_tokens_params
from anthropic.types.beta import message_create_params as beta_create_params
from cortex_core.conversation import Request
from cortex_core.dialects import anthropic_messages, openai_chat, openai_completions, openai_responses
from cortex_core.dialects.anthropic_messages import content
from cortex_core.dialects.openai_responses import items
from cortex_core.dialects.openai_responses import tools as responses_tools
from cortex_core.errors import ApiError
from cortex_core.events import Finish, Usage
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import input_token_count_params, response_create_params, response_input_item_param
from openai.types.responses.tool_param import ToolParam

TOOL = {"type": "function", "function": {"name": "f"}}
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "tools": [TOOL]}
COMPLETION: dict[str, Any] = {"model": "m", "prompt": "hi"}
MESSAGE: dict[str, Any] = {
    "model": "m",
    "max_tokens": 4096,
    "messages": [{"role": "user", "content": "hi"}],
    "tools": [{"name": "f", "input_schema": {"type": "object"}}],
}

RESPONSE: dict[str, Any] = {"model": "m", "input": "hi", "tools": [{"type": "function", "name": "f"}]}

OTHER_VALUES: dict[ModuleType, dict[str, dict[str, Any]]] = {
    openai_chat: {
        "chat_template_kwargs": {"chat_template_kwargs": {"a": 1}},
        "continue_final_message": {
            "continue_final_message": True,
            "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a"}],
        },
        "enable_thinking": {"enable_thinking": True},
        "frequency_penalty": {"frequency_penalty": 1},
        "guided_json": {"guided_json": {}},
        "cache_salt": {"cache_salt": "a"},
        "ignore_eos": {"ignore_eos": True},
        "logit_bias": {"logit_bias": {"1": 1}},
        "logprobs": {"logprobs": True},
        "max_completion_tokens": {"max_completion_tokens": 9},
        "max_tokens": {"max_tokens": 9},
        "messages": {"messages": [{"role": "user", "content": "other"}]},
        "min_p": {"min_p": 0.1},
        "model": {"model": "other"},
        "n": {"n": 2},
        "parallel_tool_calls": {"parallel_tool_calls": False},
        "presence_penalty": {"presence_penalty": 1},
        "reasoning_effort": {"reasoning_effort": "low"},
        "repetition_penalty": {"repetition_penalty": 1.1},
        "response_format": {"response_format": {"type": "json_object"}},
        "seed": {"seed": 1},
        "stop": {"stop": "x"},
        "stream": {"stream": True},
        "stream_options": {"stream_options": {"include_usage": True}},
        "temperature": {"temperature": 1},
        "thinking": {"thinking": {"type": "disabled"}},
        "tool_choice": {"tool_choice": "required"},
        "tools": {"tools": []},
        "top_k": {"top_k": 1},
        "top_logprobs": {"logprobs": True, "top_logprobs": 2},
        "top_p": {"top_p": 0.5},
    },
    openai_completions: {
        "echo": {"echo": True},
        "frequency_penalty": {"frequency_penalty": 1},
        "cache_salt": {"cache_salt": "a"},
        "ignore_eos": {"ignore_eos": True},
        "logit_bias": {"logit_bias": {"1": 1}},
        "logprobs": {"logprobs": 1},
        "max_tokens": {"max_tokens": 9},
        "min_p": {"min_p": 0.1},
        "model": {"model": "other"},
        "n": {"n": 2},
        "presence_penalty": {"presence_penalty": 1},
        "prompt": {"prompt": "other"},
        "repetition_penalty": {"repetition_penalty": 1.1},
        "seed": {"seed": 1},
        "stop": {"stop": "x"},
        "stream": {"stream": True},
        "stream_options": {"stream_options": {"include_usage": True}},
        "suffix": {"suffix": "x"},
        "temperature": {"temperature": 1},
        "top_k": {"top_k": 1},
        "top_p": {"top_p": 0.5},
    },
    openai_responses: {
        "chat_template_kwargs": {"chat_template_kwargs": {"a": 1}},
        "enable_thinking": {"enable_thinking": True},
        "frequency_penalty": {"frequency_penalty": 1},
        "cache_salt": {"cache_salt": "a"},
        "ignore_eos": {"ignore_eos": True},
        "include": {"include": ["message.output_text.logprobs"]},
        "input": {"input": "other"},
        "instructions": {"instructions": "x"},
        "logit_bias": {"logit_bias": {"1": 1}},
        "max_output_tokens": {"max_output_tokens": 20},
        "min_p": {"min_p": 0.1},
        "model": {"model": "other"},
        "parallel_tool_calls": {"parallel_tool_calls": False},
        "presence_penalty": {"presence_penalty": 1},
        "reasoning": {"reasoning": {"effort": "low"}},
        "repetition_penalty": {"repetition_penalty": 1.1},
        "seed": {"seed": 1},
        "stop": {"stop": "x"},
        "stream": {"stream": True},
        "temperature": {"temperature": 0.7},
        "text": {"text": {"format": {"type": "json_object"}}},
        "thinking": {"thinking": {"type": "disabled"}},
        "tool_choice": {"tool_choice": "required"},
        "tools": {"tools": []},
        "top_k": {"top_k": 1},
        "top_logprobs": {"top_logprobs": 2},
        "top_p": {"top_p": 0.5},
    },
    anthropic_messages: {
        "max_tokens": {"max_tokens": 9},
        "messages": {"messages": [{"role": "user", "content": "other"}]},
        "model": {"model": "other"},
        "output_config": {"output_config": {"effort": "low"}},
        "output_format": {"output_format": {"type": "json_schema", "schema": {}}},
        "stop_sequences": {"stop_sequences": ["x"]},
        "stream": {"stream": True},
        "system": {"system": "x"},
        "temperature": {"temperature": 1},
        "thinking": {"thinking": {"type": "adaptive"}},
        "tool_choice": {"tool_choice": {"type": "any"}},
        "tools": {"tools": []},
        "top_k": {"top_k": 1},
        "top_p": {"top_p": 0.5},
    },
}
REFUSED_VALUES: dict[ModuleType, dict[str, Any]] = {
    openai_chat: {
        "guided_choice": ["a"],
        "guided_grammar": "g",
        "guided_regex": "a",
        "modalities": ["audio"],
    },
    openai_completions: {"best_of": 2},
    openai_responses: {
        "background": True,
        "conversation": "conv_1",
        "previous_response_id": "resp_1",
        "prompt": {"id": "pmpt_1"},
    },
}
BASES = {
    openai_chat: CHAT,
    openai_completions: COMPLETION,
    openai_responses: RESPONSE,
    anthropic_messages: MESSAGE,
}
DIALECTS = list(BASES)
NAMES = ["openai_chat", "openai_completions", "openai_responses", "anthropic_messages"]


def lists_of(dialect: Any) -> list[set[str]]:
    names = ("MAPPED", "REFUSED", "ECHOED", "IGNORED")
    return [set(getattr(dialect, name, ())) for name in names]


def parse(dialect: Any, changes: dict[str, Any]) -> Request:
    """The request but for what is only repeated in the answer."""
    request: Request = dialect.parse(json.dumps({**BASES[dialect], **changes}).encode())
    return msgspec.structs.replace(request, echo_fields={})


@pytest.mark.parametrize(
    ("dialect", "official"),
    [
        (openai_chat, chat_create_params.CompletionCreateParamsBase),
        (openai_chat, chat_create_params.CompletionCreateParamsStreaming),
        (openai_chat, chat_create_params.CompletionCreateParamsNonStreaming),
        (openai_completions, completion_create_params.CompletionCreateParamsBase),
        (openai_completions, completion_create_params.CompletionCreateParamsStreaming),
        (openai_responses, response_create_params.ResponseCreateParamsBase),
        (openai_responses, response_create_params.ResponseCreateParamsStreaming),
        (openai_responses, response_create_params.ResponseCreateParamsNonStreaming),
        (openai_responses, input_token_count_params.InputTokenCountParams),
        (anthropic_messages, message_create_params.MessageCreateParamsStreaming),
        (anthropic_messages, message_create_params.MessageCreateParamsNonStreaming),
        (anthropic_messages, beta_create_params.MessageCreateParamsStreaming),
        (anthropic_messages, message_count_tokens_params.MessageCountTokensParams),
        (anthropic_messages, beta_count_tokens_params.MessageCountTokensParams),
    ],
)
def test_no_official_field_is_missing(dialect: Any, official: Any) -> None:
    fields = set(official.__annotations__)
    assert len(fields) > 5, "the official type still lists its fields"
    assert fields <= set().union(*lists_of(dialect))


@pytest.mark.parametrize("dialect", DIALECTS, ids=NAMES)
def test_no_field_stands_in_two_lists(dialect: Any) -> None:
    lists = lists_of(dialect)
    assert sum(map(len, lists)) == len(set().union(*lists))


@pytest.mark.parametrize("dialect", DIALECTS, ids=NAMES)
def test_every_mapped_field_changes_the_request(dialect: Any) -> None:
    values = OTHER_VALUES[dialect]
    assert set(values) == set(dialect.MAPPED)
    base = parse(dialect, {})
    unchanged = [name for name, change in values.items() if parse(dialect, change) == base]
    assert unchanged == []


@pytest.mark.parametrize("dialect", DIALECTS, ids=NAMES)
def test_no_ignored_field_changes_the_request_or_is_looked_at(dialect: Any) -> None:
    base = parse(dialect, {})
    values: list[Any] = [None, True, 7, "x", [{}], {"type": "x"}]
    for name in (*dialect.IGNORED, *getattr(dialect, "ECHOED", ())):
        for value in values:
            assert parse(dialect, {name: value}) == base, name


def test_every_echoed_field_comes_back() -> None:
    values = {
        "max_tool_calls": 3,
        "metadata": {"a": "b"},
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "user": "u",
    }
    assert set(values) == set(openai_responses.ECHOED)
    asked = openai_responses.parse(json.dumps({**RESPONSE, **values}).encode())
    collector = openai_responses.Collector(asked, response_id="resp_1", created=1, model="m")
    for event in (Finish(0, "stop"), Usage(1, 0)):
        collector.feed(event)
    body = json.loads(collector.body())
    assert {name: body[name] for name in values} == values


@pytest.mark.parametrize("dialect", [openai_chat, openai_completions, openai_responses], ids=NAMES[:3])
def test_every_refused_field_is_refused_by_name(dialect: Any) -> None:
    values = REFUSED_VALUES[dialect]
    assert set(values) == set(dialect.REFUSED)
    for name, value in values.items():
        with pytest.raises(ApiError) as caught:
            parse(dialect, {name: value})
        expected = "previous_response_not_found" if name == "previous_response_id" else "unsupported_parameter"
        assert caught.value.code == expected
        assert (caught.value.param or "").partition("[")[0] == name


def block_types(union: Any) -> set[str]:
    """The `type` values of a union of block TypedDicts."""
    types: set[str] = set()
    for member in typing.get_args(union):
        if not typing.is_typeddict(member):
            continue  # response models, which may be sent back: their types are those of the params
        types.update(literals(typing.get_type_hints(member).get("type")))
    return types


def literals(hint: Any) -> set[str]:
    """The values of a literal, also of an optional one."""
    found: set[str] = set()
    for value in typing.get_args(hint):
        found |= {value} if isinstance(value, str) else literals(value)
    return found


def test_no_official_responses_item_is_missing() -> None:
    official = block_types(response_input_item_param.ResponseInputItemParam)
    assert {"message", "function_call", "custom_tool_call", "reasoning", "item_reference"} <= official
    lists = (items.MAPPED_ITEMS, items.REFUSED_ITEMS, items.IGNORED_ITEMS)
    assert official <= set().union(*lists)
    assert sum(map(len, lists)) == len(set().union(*lists))


def test_no_official_responses_tool_is_missing() -> None:
    official = block_types(ToolParam)
    assert {"function", "custom", "namespace", "web_search", "mcp"} <= official
    assert official <= {"function", "custom", "namespace", *responses_tools.HOSTED_TOOLS}
    for kind in responses_tools.HOSTED_TOOLS:
        assert openai_responses.parse(json.dumps({**RESPONSE, "tools": [{"type": kind}]}).encode()).tools == ()


def test_no_official_content_block_is_missing() -> None:
    official = block_types(content_block_param.ContentBlockParam) | block_types(beta_block_param.BetaContentBlockParam)
    official |= block_types(tool_result_block_param.Content) | block_types(beta_system_message_param.ContentBlock)
    assert {"text", "tool_use", "document", "server_tool_use", "tool_addition"} <= official
    known = {kind for kinds in content.BLOCKS_OF_ROLE.values() for kind in kinds}
    assert official <= known | set(content.REFUSED_BLOCKS) | set(content.IGNORED_BLOCKS)
