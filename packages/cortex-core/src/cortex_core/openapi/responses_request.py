"""Schema of the body of `POST /v1/responses` and of its count, `POST /v1/responses/input_tokens`."""

from __future__ import annotations

from cortex_core.dialects import openai_responses
from cortex_core.dialects.limits import MAX_MESSAGES, MAX_TOP_LOGPROBS
from cortex_core.dialects.openai_responses.items import (
    IGNORED_ITEMS,
    MAPPED_ITEMS,
    REFUSED_ITEMS,
    REFUSED_PARTS,
    ROLES,
)
from cortex_core.dialects.openai_responses.tools import CHOICE_MODES
from cortex_core.openapi import openai_fields as shared
from cortex_core.openapi.schema import (
    ANY_TOOL_NAME,
    ASKS_FOR_NOTHING,
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
    optional,
    ref,
    tagged,
)

_TEXT_PART = fields(
    {"type": {**NAME, "not": {"enum": ["refusal", "input_image", *REFUSED_PARTS]}}, "text": TEXT},
    about="Text; a type that is unknown is understood where it has a text.",
)
_REFUSAL = tagged("type", "refusal", {"refusal": TEXT})
_IMAGE = tagged("type", "input_image", {"image_url": shared.IMAGE_URL}, {"detail": optional(TEXT)})


def _content(*parts: Schema) -> Schema:
    return any_of({"type": ["string", "null"]}, *parts, array(any_of(*parts)))


_TEXTS = _content(_TEXT_PART, _REFUSAL)
_TEXTS_AND_IMAGES = _content(_TEXT_PART, _REFUSAL, _IMAGE)

_NO_PART: Schema = {"anyOf": [{"not": {"type": "object"}}, {"not": {"required": ["type"]}}]}
_OUTPUT = any_of(
    {"type": ["string", "null", "number", "boolean", "object"]},
    array(any_of(_TEXT_PART, _REFUSAL, _IMAGE)),
    {"type": "array", "contains": _NO_PART, "description": "Other JSON, which the model sees as JSON."},
)

_CALL_IDS: Properties = {"call_id": optional(TEXT), "id": optional(TEXT), "namespace": optional(ANY_TOOL_NAME)}
_SETTINGS: Properties = {
    "reasoning": optional(fields({}, {"effort": shared.EFFORT})),
    "text": optional(
        fields(
            {},
            {
                "format": any_of(
                    {"type": "null"},
                    *shared.RESPONSE_FORMATS,
                    tagged("type", "json_schema", {"schema": JSON_SCHEMA}, shared.SCHEMA_FORMAT),
                )
            },
        )
    ),
}

_OTHER_TYPE: Schema = {"not": {"enum": [*MAPPED_ITEMS, *REFUSED_ITEMS, *IGNORED_ITEMS]}}
_NOT_MESSAGES = [kind for kind in (*MAPPED_ITEMS, *IGNORED_ITEMS) if kind != "message"]
_MESSAGE_TYPE: Schema = {"type": ["string", "null"], "not": {"enum": _NOT_MESSAGES}}
_NOT_USER = choice(*(role for role in ROLES if role != "user"))

ITEM = any_of(
    fields({"role": {"const": "user"}}, {"type": _MESSAGE_TYPE, "content": _TEXTS_AND_IMAGES}),
    fields({"role": _NOT_USER}, {"type": _MESSAGE_TYPE, "content": _TEXTS}),
    tagged("type", "reasoning", may={"content": _TEXTS, "summary": _TEXTS}),
    tagged("type", "function_call", {"name": TOOL_NAME}, {**_CALL_IDS, "arguments": shared.ARGUMENTS}),
    tagged("type", "custom_tool_call", {"name": TOOL_NAME}, {**_CALL_IDS, "input": optional(TEXT)}),
    fields(
        {"type": choice("function_call_output", "custom_tool_call_output"), "call_id": TEXT},
        {"output": _OUTPUT},
    ),
    fields({"type": choice("additional_tools", "tool_search_output")}, {"tools": shared.tools(ref("ResponsesTool"))}),
    tagged("type", "configuration_update", may=_SETTINGS),
    fields({"type": choice(*IGNORED_ITEMS)}, about="Traces of hosted tools, which are passed over."),
    fields(
        {"type": {"type": "string", "minLength": 1, **_OTHER_TYPE}},
        {"role": {"type": "null"}},
        about="Items that are unknown, which are passed over.",
    ),
    fields({}, {"type": {"enum": [None, ""]}, "role": {"type": "null"}, "id": {"type": "null"}}),
)

_GRAMMAR = tagged("type", "grammar", shared.GRAMMAR)
_MEMBERS = [
    {
        **shared.FUNCTION,
        "properties": {"type": {"const": "function"}, **shared.FUNCTION["properties"]},
        "required": ["type", "name"],
    },
    tagged("type", "function", {"function": shared.FUNCTION}, {"name": {"type": "null"}}),
    tagged("type", "custom", {"name": TOOL_NAME}, shared.custom_tool(_GRAMMAR)),
]
_NOT_OFFERED = "Tools that run elsewhere, which are not offered to the model."
TOOL = any_of(
    *_MEMBERS,
    tagged(
        "type",
        "namespace",
        {"name": TOOL_NAME},
        {
            "description": optional(TEXT),
            "tools": shared.tools(
                any_of(
                    *_MEMBERS, fields({"type": {**NAME, "not": {"enum": ["function", "custom"]}}}, about=_NOT_OFFERED)
                )
            ),
        },
    ),
    fields({"type": {**NAME, "not": {"enum": ["function", "custom", "namespace"]}}}, about=_NOT_OFFERED),
)

_REFERENCE = fields({"name": TOOL_NAME}, {"namespace": optional(ANY_TOOL_NAME)})
_NAMED = any_of(_REFERENCE, fields({"function": _REFERENCE}, {"name": {"type": "null"}}))
_CALLABLE = choice("function", "custom")
TOOL_CHOICE = any_of(
    {"enum": [*CHOICE_MODES, None]},
    {"allOf": [fields({"type": _CALLABLE}), _NAMED]},
    tagged(
        "type",
        "allowed_tools",
        {"mode": choice("auto", "required")},
        {
            "tools": shared.tools(
                any_of(
                    fields({"name": TOOL_NAME}, {"namespace": optional(ANY_TOOL_NAME), "type": optional(_CALLABLE)}),
                    tagged("type", "namespace", {"name": TOOL_NAME}),
                    fields({"type": {"type": "string", "not": {"enum": ["function", "custom", "namespace"]}}}),
                )
            )
        },
    ),
)

RESPONSES_REQUEST: Schema = fields(
    {"model": MODEL, "input": any_of(TEXT, array(ITEM, minItems=1, maxItems=MAX_MESSAGES))},
    {
        **shared.SAMPLING,
        **shared.THINKING,
        **_SETTINGS,
        "cache_salt": shared.CACHE_SALT,
        "ignore_eos": optional(BOOLEAN),
        "include": optional(array(True)),
        "instructions": optional(TEXT),
        "max_output_tokens": shared.TOKEN_LIMIT,
        "parallel_tool_calls": optional(BOOLEAN),
        "stop": shared.STOP,
        "stream": optional(BOOLEAN),
        "tool_choice": TOOL_CHOICE,
        "tools": shared.tools(ref("ResponsesTool")),
        "top_logprobs": optional(integer(0, MAX_TOP_LOGPROBS)),
        "background": ASKS_FOR_NOTHING,
        "conversation": ASKS_FOR_NOTHING,
        "previous_response_id": ASKS_FOR_NOTHING,
        "prompt": ASKS_FOR_NOTHING,
        **ignored(openai_responses.ECHOED),
        **ignored(openai_responses.IGNORED),
    },
)
