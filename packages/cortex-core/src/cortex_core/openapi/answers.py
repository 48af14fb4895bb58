"""Schemas of answers: what the collectors, the models list and the error envelopes write."""

from __future__ import annotations

from cortex_core.dialects.errors import ANTHROPIC_TYPES, OPENAI_TYPES
from cortex_core.openapi.schema import (
    BOOLEAN,
    NAME,
    TEXT,
    Properties,
    Schema,
    any_of,
    array,
    choice,
    fields,
    integer,
    optional,
    tagged,
)

_COUNT = integer(0)
_OBJECT: Schema = {"type": "object"}

_OPENAI_ERROR = fields(
    {"message": NAME, "type": choice(*sorted({*OPENAI_TYPES.values(), "insufficient_quota"}))},
    {"param": optional(TEXT), "code": optional(TEXT), "request_id": TEXT},
)
OPENAI_ERROR: Schema = fields(
    {"error": {**_OPENAI_ERROR, "required": ["message", "type", "param", "code"]}},
    about="`code` is for programs, `param` names the field, and more fields hold the numbers.",
)
ANTHROPIC_ERROR: Schema = fields(
    {
        "type": {"const": "error"},
        "error": fields({"type": choice(*sorted(set(ANTHROPIC_TYPES.values()))), "message": NAME}),
    },
    {"request_id": TEXT},
)

_CHAT_USAGE = fields({"prompt_tokens": _COUNT, "completion_tokens": _COUNT, "total_tokens": _COUNT})
_HEAD: Properties = {"id": NAME, "created": _COUNT, "model": NAME}
_TOOL_CALL = any_of(
    tagged("type", "function", {"id": NAME, "function": fields({"name": TEXT, "arguments": TEXT})}),
    tagged("type", "custom", {"id": NAME, "custom": fields({"name": TEXT, "input": TEXT})}),
)
_CHAT_MESSAGE: Schema = {
    **fields(
        {"role": {"const": "assistant"}},
        {
            "content": optional(TEXT),
            "refusal": {"type": "null"},
            "reasoning_content": TEXT,
            "reasoning": TEXT,
            "tool_calls": array(_TOOL_CALL, minItems=1),
        },
    ),
    "required": ["role", "content", "refusal"],
}
CHAT_COMPLETION = fields(
    {
        **_HEAD,
        "object": {"const": "chat.completion"},
        "choices": array(
            fields(
                {
                    "index": _COUNT,
                    "message": _CHAT_MESSAGE,
                    "finish_reason": choice("stop", "length", "tool_calls", "content_filter"),
                },
                {"logprobs": optional(_OBJECT)},
            ),
            minItems=1,
        ),
        "usage": _CHAT_USAGE,
    }
)
TEXT_COMPLETION = fields(
    {
        **_HEAD,
        "object": {"const": "text_completion"},
        "choices": array(
            fields(
                {"index": _COUNT, "text": TEXT, "finish_reason": choice("stop", "length", "content_filter")},
                {"logprobs": optional(_OBJECT)},
            ),
            minItems=1,
        ),
        "usage": _CHAT_USAGE,
    }
)
RESPONSE = fields(
    {
        "id": NAME,
        "object": {"const": "response"},
        "created_at": _COUNT,
        "model": NAME,
        "status": choice("completed", "incomplete"),
        "output": array(
            fields({"id": NAME, "type": choice("reasoning", "message", "function_call", "custom_tool_call")})
        ),
        "usage": fields({"input_tokens": _COUNT, "output_tokens": _COUNT, "total_tokens": _COUNT}),
        "parallel_tool_calls": BOOLEAN,
        "tools": array(_OBJECT),
    }
)
INPUT_TOKENS = fields({"object": {"const": "response.input_tokens"}, "input_tokens": _COUNT})
MESSAGE = fields(
    {
        "id": NAME,
        "type": {"const": "message"},
        "role": {"const": "assistant"},
        "model": NAME,
        "content": array(
            any_of(
                tagged("type", "text", {"text": TEXT}),
                tagged("type", "thinking", {"thinking": TEXT, "signature": TEXT}),
                tagged("type", "tool_use", {"id": NAME, "name": TEXT, "input": _OBJECT}),
            )
        ),
        "stop_reason": choice("end_turn", "max_tokens", "stop_sequence", "tool_use", "refusal"),
        "usage": fields({"input_tokens": _COUNT, "output_tokens": _COUNT}),
    },
    {"stop_sequence": optional(TEXT)},
)
TOKEN_COUNT = fields({"input_tokens": _COUNT})

MODEL = fields(
    {"id": NAME, "type": {"const": "model"}, "display_name": TEXT, "created_at": TEXT, "capabilities": _OBJECT},
    {
        "object": {"const": "model"},
        "created": _COUNT,
        "owned_by": TEXT,
        "loaded": BOOLEAN,
        "modalities": array(TEXT),
        "max_model_len": _COUNT,
        "locations": array(_OBJECT),
    },
    about="One object for the clients of both dialects; with `anthropic-version` only Anthropic's own fields.",
)
_CURSORS: Properties = {"first_id": optional(TEXT), "last_id": optional(TEXT), "object": {"const": "list"}}

SCHEMAS: dict[str, Schema] = {
    "OpenAIError": OPENAI_ERROR,
    "AnthropicError": ANTHROPIC_ERROR,
    "ChatCompletion": CHAT_COMPLETION,
    "TextCompletion": TEXT_COMPLETION,
    "Response": RESPONSE,
    "InputTokens": INPUT_TOKENS,
    "Message": MESSAGE,
    "TokenCount": TOKEN_COUNT,
    "Model": MODEL,
    "ModelList": fields({"data": array({"$ref": "#/components/schemas/Model"}), "has_more": BOOLEAN}, _CURSORS),
}
