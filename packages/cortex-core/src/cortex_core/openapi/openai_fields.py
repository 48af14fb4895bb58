"""Schemas of the request fields that the OpenAI surfaces share; see `cortex_core.dialects.openai_fields`."""

from __future__ import annotations

from cortex_core.dialects.limits import (
    MAX_CACHE_SALT,
    MAX_CHOICES,
    MAX_LOGIT_BIAS,
    MAX_STOP_CHARACTERS,
    MAX_STOP_SEQUENCES,
    MAX_TOKEN_ID_DIGITS,
    MAX_TOOLS,
    REPETITION_PENALTIES,
)
from cortex_core.dialects.openai_fields import REASONING_EFFORTS, THINKING_TYPES
from cortex_core.dialects.openai_images import DETAILS
from cortex_core.openapi.schema import (
    BOOLEAN,
    NAME,
    TEXT,
    TOOL_NAME,
    Properties,
    Schema,
    any_of,
    array,
    choice,
    fields,
    integer,
    number,
    optional,
    tagged,
)

TOKEN_LIMIT = optional(integer(1))
"""Clamped to the window, never refused for being large."""

STOP_SEQUENCE: Schema = {**NAME, "maxLength": MAX_STOP_CHARACTERS}
CACHE_SALT = {"type": ["string", "null"], "maxLength": MAX_CACHE_SALT}
STOP = any_of(STOP_SEQUENCE, array(STOP_SEQUENCE, maxItems=MAX_STOP_SEQUENCES), {"type": "null"})
STREAM_OPTIONS = optional(fields({}, {"include_usage": optional(BOOLEAN)}))
EFFORT = optional(choice(*REASONING_EFFORTS))
CHOICES = optional(integer(1, MAX_CHOICES))
ARGUMENTS = optional({"type": ["string", "object"], "description": "JSON text; the object itself is understood too."})

SAMPLING: Properties = {
    "temperature": optional(number(0, 2)),
    "top_p": optional(number(0, 1)),
    "top_k": optional(integer(-1)),
    "min_p": optional(number(0, 1)),
    "presence_penalty": optional(number(-2, 2)),
    "frequency_penalty": optional(number(-2, 2)),
    "repetition_penalty": optional(number(*REPETITION_PENALTIES)),
    "logit_bias": {
        "type": ["object", "null"],
        "propertyNames": {"pattern": f"^[0-9]{{1,{MAX_TOKEN_ID_DIGITS}}}$"},
        "maxProperties": MAX_LOGIT_BIAS,
        "additionalProperties": number(-100, 100),
        "description": "Biases by token id.",
    },
    "seed": optional(integer(-(2**63), 2**64 - 1)),
}

THINKING: Properties = {
    "enable_thinking": optional(BOOLEAN),
    "chat_template_kwargs": optional(fields({}, {"enable_thinking": optional(BOOLEAN)})),
    "thinking": optional(fields({"type": choice(*THINKING_TYPES)}, {"budget_tokens": TOKEN_LIMIT})),
}

_URL: Schema = {
    "type": "string",
    "pattern": "^([hH][tT][tT][pP][sS]?://|"
    "[dD][aA][tT][aA]:[iI][mM][aA][gG][eE]/[A-Za-z0-9_.+-]+(;[A-Za-z0-9_-]+=[^;,]*)*;[bB][aA][sS][eE]64,[\\s\\S])",
    "description": "An http or https URL, or `data:image/png;base64,…`.",
}
IMAGE_URL = any_of(_URL, fields({"url": _URL}, {"detail": optional(choice(*DETAILS))}))

RESPONSE_FORMATS = [tagged("type", "text"), tagged("type", "json_object")]

FUNCTION: Schema = fields(
    {"name": TOOL_NAME},
    {"description": optional(TEXT), "parameters": optional({"type": "object"}), "strict": optional(BOOLEAN)},
)

GRAMMAR: Properties = {"syntax": choice("lark", "regex"), "definition": NAME}


def custom_tool(grammar: Schema) -> Properties:
    """What a custom tool may have beside its name. grammar: its format of the type `grammar`."""
    return {"description": optional(TEXT), "format": any_of(tagged("type", "text"), grammar, {"type": "null"})}


def tools(tool: Schema) -> Schema:
    return optional(array(tool, maxItems=MAX_TOOLS))


SCHEMA_FORMAT: Properties = {"name": optional(TEXT), "strict": optional(BOOLEAN)}
