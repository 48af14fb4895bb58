"""Schemas of the bodies of `POST /v1/chat/completions` and `POST /v1/completions`."""

from __future__ import annotations

from cortex_core.dialects import openai_chat, openai_completions
from cortex_core.dialects.limits import (
    MAX_LOGPROBS,
    MAX_MESSAGES,
    MAX_PROMPTS,
    MAX_TOKEN_ID,
    MAX_TOOLS,
    MAX_TOP_LOGPROBS,
)
from cortex_core.dialects.openai_chat.request import TOOL_MODES
from cortex_core.openapi import openai_fields as shared
from cortex_core.openapi.schema import (
    ANY_TOOL_NAME,
    ASKS_FOR_NOTHING,
    BOOLEAN,
    JSON_SCHEMA,
    MODEL,
    TEXT,
    TOOL_NAME,
    Schema,
    any_of,
    array,
    choice,
    fields,
    ignored,
    integer,
    optional,
    tagged,
)

_TEXT_PARTS = [tagged("type", "text", {"text": TEXT}), tagged("type", "refusal", {"refusal": TEXT})]
_IMAGE_PART = tagged("type", "image_url", {"image_url": shared.IMAGE_URL})


def _content(*parts: Schema) -> Schema:
    return any_of({"type": ["string", "null"]}, array(any_of(*parts)))


_TEXTS = _content(*_TEXT_PARTS)
_TEXTS_AND_IMAGES = _content(*_TEXT_PARTS, _IMAGE_PART)

_CALLED_FUNCTION = fields({"name": TOOL_NAME}, {"arguments": shared.ARGUMENTS})
_CALLS = any_of(
    fields({"id": TEXT, "function": _CALLED_FUNCTION}, {"type": {"enum": ["function", None]}}),
    tagged("type", "custom", {"id": TEXT, "custom": fields({"name": TOOL_NAME, "input": TEXT})}),
)

MESSAGE = any_of(
    tagged("role", "user", may={"content": _TEXTS_AND_IMAGES}),
    fields({"role": choice("system", "developer")}, {"content": _TEXTS}),
    tagged(
        "role",
        "assistant",
        may={
            "content": _TEXTS,
            "reasoning_content": optional(TEXT),
            "refusal": optional(TEXT),
            "tool_calls": optional(array(_CALLS)),
            "function_call": optional(_CALLED_FUNCTION),
        },
    ),
    tagged("role", "tool", {"tool_call_id": TEXT}, {"content": _TEXTS_AND_IMAGES, "name": optional(ANY_TOOL_NAME)}),
    tagged("role", "function", {"name": TOOL_NAME}, {"content": _TEXTS}),
)

_GRAMMAR = tagged("type", "grammar", {"grammar": fields(shared.GRAMMAR)})
TOOL = any_of(
    tagged("type", "function", {"function": shared.FUNCTION}),
    tagged("type", "custom", {"custom": fields({"name": TOOL_NAME}, shared.custom_tool(_GRAMMAR))}),
)

_NAMED = fields({"name": TOOL_NAME})
_NOT_CUSTOM: Schema = {"not": {"const": "custom"}}
_REFERENCE = any_of(tagged("type", "custom", {"custom": _NAMED}), fields({"function": _NAMED}, {"type": _NOT_CUSTOM}))
TOOL_CHOICE = any_of(
    {"enum": [*TOOL_MODES, None]},
    tagged("type", "function", {"function": _NAMED}),
    tagged("type", "custom", {"custom": _NAMED}),
    tagged(
        "type",
        "allowed_tools",
        {
            "allowed_tools": fields(
                {"mode": choice("auto", "required"), "tools": array(_REFERENCE, minItems=1, maxItems=MAX_TOOLS)}
            )
        },
    ),
)

RESPONSE_FORMAT = any_of(
    {"type": "null"},
    *shared.RESPONSE_FORMATS,
    tagged(
        "type", "json_schema", {"json_schema": fields({}, {**shared.SCHEMA_FORMAT, "schema": optional(JSON_SCHEMA)})}
    ),
)


CHAT_REQUEST: Schema = fields(
    {"model": MODEL, "messages": array(MESSAGE, minItems=1, maxItems=MAX_MESSAGES)},
    {
        **shared.SAMPLING,
        **shared.THINKING,
        "cache_salt": shared.CACHE_SALT,
        "continue_final_message": optional(BOOLEAN),
        "guided_json": optional(JSON_SCHEMA),
        "ignore_eos": optional(BOOLEAN),
        "logprobs": optional(BOOLEAN),
        "max_completion_tokens": shared.TOKEN_LIMIT,
        "max_tokens": shared.TOKEN_LIMIT,
        "n": shared.CHOICES,
        "parallel_tool_calls": optional(BOOLEAN),
        "reasoning_effort": shared.EFFORT,
        "response_format": RESPONSE_FORMAT,
        "stop": shared.STOP,
        "stream": optional(BOOLEAN),
        "stream_options": shared.STREAM_OPTIONS,
        "tool_choice": TOOL_CHOICE,
        "tools": shared.tools(TOOL),
        "top_logprobs": optional(integer(0, MAX_TOP_LOGPROBS)),
        "guided_choice": ASKS_FOR_NOTHING,
        "guided_grammar": ASKS_FOR_NOTHING,
        "guided_regex": ASKS_FOR_NOTHING,
        "modalities": optional(array({"const": "text"})),
        **ignored(openai_chat.IGNORED),
    },
)

_TOKEN_IDS = array(integer(0, MAX_TOKEN_ID), minItems=1)

COMPLETION_REQUEST: Schema = fields(
    {
        "model": MODEL,
        "prompt": any_of(TEXT, _TOKEN_IDS, array(any_of(TEXT, _TOKEN_IDS), minItems=1, maxItems=MAX_PROMPTS)),
    },
    {
        **shared.SAMPLING,
        "best_of": optional(integer(1)),
        "cache_salt": shared.CACHE_SALT,
        "echo": optional(BOOLEAN),
        "ignore_eos": optional(BOOLEAN),
        "logprobs": optional(integer(0, MAX_LOGPROBS)),
        "max_tokens": optional(integer(0)),
        "n": shared.CHOICES,
        "stop": shared.STOP,
        "stream": optional(BOOLEAN),
        "stream_options": shared.STREAM_OPTIONS,
        "suffix": optional(TEXT),
        **ignored(openai_completions.IGNORED),
    },
)
