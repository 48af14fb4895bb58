"""Schemas of the bodies of `POST /v1/messages` and `POST /v1/messages/count_tokens`."""

from __future__ import annotations

from cortex_core.dialects import anthropic_messages
from cortex_core.dialects.anthropic_messages.content import IGNORED_BLOCKS, IMAGE_MEDIA_TYPES
from cortex_core.dialects.anthropic_messages.request import (
    DEFERRED_TOOL_PLACEHOLDER,
    EFFORTS,
    MIN_THINKING_BUDGET,
    THINKING_DISPLAYS,
)
from cortex_core.dialects.limits import MAX_MESSAGES, MAX_STOP_SEQUENCES
from cortex_core.openapi import openai_fields as shared
from cortex_core.openapi.schema import (
    BOOLEAN,
    JSON_SCHEMA,
    MODEL,
    NAME,
    TEXT,
    TOOL_NAME,
    Properties,
    Schema,
    any_of,
    array,
    choice,
    fields,
    ignored,
    integer,
    number,
    optional,
    ref,
    tagged,
)

_TEXT_BLOCK = tagged("type", "text", {"text": TEXT})
_URL: Schema = {"type": "string", "pattern": "^[hH][tT][tT][pP][sS]?://"}
_IMAGE = tagged(
    "type",
    "image",
    {
        "source": any_of(
            tagged("type", "base64", {"media_type": choice(*IMAGE_MEDIA_TYPES), "data": NAME}),
            tagged("type", "url", {"url": _URL}),
        )
    },
)
_PASSED_OVER = fields({"type": choice(*IGNORED_BLOCKS)}, about="Traces of server tools, which are passed over.")


def _content(*blocks: Schema) -> Schema:
    return any_of(TEXT, array(any_of(*blocks)))


_RESULT_CONTENT = _content(_TEXT_BLOCK, _IMAGE, tagged("type", "tool_reference", {"tool_name": NAME}))
_TOOL_RESULT = tagged(
    "type",
    "tool_result",
    {"tool_use_id": NAME},
    {"content": optional(_RESULT_CONTENT), "is_error": optional(BOOLEAN)},
)
_THINKING_BLOCK = tagged("type", "thinking", {"thinking": TEXT}, {"signature": optional(TEXT)})
_TOOL_USE = tagged("type", "tool_use", {"id": NAME, "name": TOOL_NAME}, {"input": optional({"type": "object"})})
_TOOL_ADDITION = tagged(
    "type",
    "tool_addition",
    {
        "tool": any_of(
            tagged("type", "tool_definition", {"definition": ref("MessagesTool")}),
            fields({}, {"type": {"type": ["string", "null"], "not": {"const": "tool_definition"}}}),
        )
    },
)

MESSAGE = any_of(
    tagged("role", "user", {"content": _content(_TEXT_BLOCK, _IMAGE, _TOOL_RESULT, _PASSED_OVER)}),
    tagged(
        "role",
        "assistant",
        {
            "content": _content(
                _TEXT_BLOCK, _THINKING_BLOCK, _TOOL_USE, tagged("type", "redacted_thinking"), _PASSED_OVER
            )
        },
    ),
    tagged(
        "role",
        "system",
        may={
            "content": optional(_content(_TEXT_BLOCK, _TOOL_ADDITION, tagged("type", "tool_removal"))),
            "clear_at": optional(choice("next_user_message", "never")),
        },
    ),
)

_CUSTOM: Properties = {
    "type": {"enum": ["custom", None]},
    "description": optional(TEXT),
    "strict": optional(BOOLEAN),
    "defer_loading": optional(BOOLEAN),
}
TOOL = any_of(
    fields({"name": TOOL_NAME, "input_schema": {"type": "object"}}, _CUSTOM),
    fields(
        {"name": {"const": DEFERRED_TOOL_PLACEHOLDER}, "defer_loading": {"const": True}},
        {**_CUSTOM, "defer_loading": {"const": True}},
    ),
    fields(
        {"type": {"type": "string", "not": {"const": "custom"}}},
        about="Tools that run on Anthropic's servers, which are not offered to the model.",
    ),
)

_PARALLEL: Properties = {"disable_parallel_tool_use": optional(BOOLEAN)}
TOOL_CHOICE = any_of(
    {"type": "null"},
    fields({"type": choice("auto", "none", "any")}, _PARALLEL),
    tagged("type", "tool", {"name": TOOL_NAME}, _PARALLEL),
)

_FORMAT = any_of({"type": "null"}, tagged("type", "text"), tagged("type", "json_schema", {"schema": JSON_SCHEMA}))
_DISPLAY = optional(choice(*THINKING_DISPLAYS))
THINKING = any_of(
    {"type": "null"},
    tagged("type", "enabled", {"budget_tokens": integer(MIN_THINKING_BUDGET)}, {"display": _DISPLAY}),
    fields({"type": choice("adaptive", "disabled", "between_tools")}, {"display": _DISPLAY}),
)

_SYSTEM = any_of({"type": ["string", "null"]}, array(_TEXT_BLOCK))

_MAY: Properties = {
    "output_config": optional(fields({}, {"effort": optional(choice(*EFFORTS)), "format": _FORMAT})),
    "output_format": _FORMAT,
    "stop_sequences": optional(array(shared.STOP_SEQUENCE, maxItems=MAX_STOP_SEQUENCES)),
    "stream": optional(BOOLEAN),
    "system": _SYSTEM,
    "temperature": optional(number(0, 1)),
    "thinking": THINKING,
    "tool_choice": TOOL_CHOICE,
    "tools": shared.tools(ref("MessagesTool")),
    "top_k": optional(integer(-1)),
    "top_p": optional(number(0, 1)),
    **ignored(anthropic_messages.IGNORED),
}

MESSAGES_REQUEST: Schema = fields(
    {"model": MODEL, "messages": array(MESSAGE, minItems=1, maxItems=MAX_MESSAGES), "max_tokens": integer(0)}, _MAY
)
COUNT_TOKENS_REQUEST: Schema = fields(
    {"model": MODEL, "messages": array(MESSAGE, minItems=1, maxItems=MAX_MESSAGES)},
    {"max_tokens": optional(integer(0)), **_MAY},
)
