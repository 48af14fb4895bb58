"""Good bodies of each surface, which between them use every form that the parsers know. Tests vary them at random."""

from __future__ import annotations

from typing import Any

from tests.cortex_core.dialects.rich_bodies import RICH_CHAT, RICH_MESSAGES, RICH_RESPONSES

_SAMPLING: dict[str, Any] = {
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": -1,
    "min_p": 0.1,
    "presence_penalty": 1,
    "frequency_penalty": -1,
    "repetition_penalty": 1.1,
    "logit_bias": {"5": 1.5},
    "seed": 7,
}
_IMAGES: list[dict[str, Any]] = [
    {"type": "image_url", "image_url": {"url": "data:image/png;charset=x;base64,AA", "detail": "low"}},
    {"type": "image_url", "image_url": "HTTPS://x"},
]
CHAT: list[dict[str, Any]] = [
    RICH_CHAT,
    {
        "model": "m",
        **_SAMPLING,
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "a"}]},
            {"role": "user", "content": [{"type": "refusal", "refusal": "no"}, *_IMAGES]},
            {"role": "assistant", "function_call": {"name": "f", "arguments": {"a": 1}}, "refusal": "no"},
            {"role": "function", "name": "f", "content": "r"},
            {"role": "assistant", "tool_calls": [{"id": "", "type": "custom", "custom": {"name": "g", "input": ""}}]},
            {"role": "tool", "tool_call_id": "c", "name": "g", "content": _IMAGES},
            {"role": "assistant", "content": "So", "reasoning": 7},
        ],
        "tools": [
            {"type": "custom", "custom": {"name": "g", "description": "x", "format": {"type": "text"}}},
            {
                "type": "custom",
                "custom": {
                    "name": "h",
                    "format": {"type": "grammar", "grammar": {"syntax": "lark", "definition": "start: x"}},
                },
            },
            {"type": "function", "function": {"name": "f", "strict": True, "description": "d"}},
        ],
        "tool_choice": {"type": "custom", "custom": {"name": "g"}},
        "continue_final_message": True,
        "guided_json": {"type": "object"},
        "logprobs": True,
        "top_logprobs": 3,
        "max_tokens": 5,
        "max_completion_tokens": 6,
        "n": 2,
        "stop": "x",
        "modalities": ["text"],
        "reasoning_effort": "low",
        "enable_thinking": False,
        "ignore_eos": True,
        "guided_regex": "",
        "parallel_tool_calls": False,
        "stream": True,
    },
    {
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
        "tools": [{"type": "function", "function": {"name": "f"}}, {"type": "custom", "custom": {"name": "g"}}],
        "tool_choice": {
            "type": "allowed_tools",
            "allowed_tools": {"mode": "required", "tools": [{"type": "custom", "custom": {"name": "g"}}]},
        },
        "response_format": {"type": "json_object"},
    },
    {
        "model": "m",
        "messages": [{"role": "user"}],
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "response_format": {"type": "text"},
    },
]
COMPLETIONS: list[dict[str, Any]] = [
    {"model": "m", "prompt": "hi", **_SAMPLING, "echo": True, "max_tokens": 0, "stop": ["a", "b"], "suffix": "x"},
    {"model": "m", "prompt": [1, 2, 3], "n": 2, "best_of": 2, "logprobs": 3, "stream": True, "user": "u"},
    {"model": "m", "prompt": ["a", [1, 2], ""], "stream_options": {"include_usage": True}, "ignore_eos": True},
]
RESPONSES: list[dict[str, Any]] = [
    RICH_RESPONSES,
    {
        "model": "m",
        **_SAMPLING,
        "input": [
            {"role": "user", "content": {"type": "input_text", "text": "hi"}},
            {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
            {"type": "", "role": "system", "content": "s"},
            {"type": "reasoning", "summary": [], "content": None},
            {"type": "function_call", "id": "x", "name": "f", "arguments": {"a": 1}},
            {"type": "function_call_output", "call_id": "x", "output": {"any": "thing"}},
            {"type": "function_call_output", "call_id": "x", "output": [1, {"type": "input_text", "text": "r"}]},
            {
                "type": "function_call_output",
                "call_id": "x",
                "output": [{"type": "input_image", "image_url": {"url": "http://x", "detail": "high"}}],
            },
            {"type": "web_search_call", "id": "ws"},
            {"type": "a_new_thing", "id": "n"},
            {"type": "tool_search_output", "tools": [{"type": "custom", "name": "k", "format": {"type": "text"}}]},
            {"type": "configuration_update", "text": {"format": {"type": "json_object"}}, "reasoning": None},
            {},
        ],
        "tools": [
            {"type": "function", "name": "f", "description": "d", "parameters": {}, "strict": True},
            {"type": "function", "function": {"name": "g"}},
            {"type": "namespace", "name": "n", "description": "d", "tools": [{"type": "custom", "name": "c"}]},
        ],
        "tool_choice": {"type": "function", "name": "c", "namespace": "n"},
        "max_output_tokens": 9,
        "stop": ["x"],
        "enable_thinking": True,
        "chat_template_kwargs": {"a": 1},
        "thinking": {"type": "auto"},
        "background": False,
        "parallel_tool_calls": False,
    },
    {
        "model": "m",
        "input": "hi",
        "tools": [{"type": "function", "name": "f"}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "text": {"format": {"type": "text"}},
    },
    {
        "model": "m",
        "input": "hi",
        "tools": [{"type": "namespace", "name": "n", "tools": [{"type": "function", "name": "f"}]}],
        "tool_choice": {
            "type": "allowed_tools",
            "mode": "required",
            "tools": [{"type": "namespace", "name": "n"}, {"name": "f"}, {"type": "web_search"}],
        },
    },
]
MESSAGES: list[dict[str, Any]] = [
    RICH_MESSAGES,
    {
        "model": "m",
        "max_tokens": 9,
        "system": "s",
        "temperature": 1,
        "top_p": 0.5,
        "top_k": 3,
        "messages": [
            {"role": "user", "content": "hi"},
            {
                "role": "system",
                "content": [
                    {"type": "text", "text": "s"},
                    {
                        "type": "tool_addition",
                        "tool": {"type": "tool_definition", "definition": {"name": "a", "input_schema": {}}},
                    },
                    {"type": "tool_addition", "tool": {"type": "tool_reference", "name": "x"}},
                    {"type": "tool_removal", "tool": {}},
                ],
                "clear_at": "next_user_message",
            },
            {
                "role": "assistant",
                "content": [
                    {"type": "redacted_thinking", "data": "x"},
                    {"type": "server_tool_use", "id": "s", "name": "web_search"},
                    {"type": "tool_use", "id": "t", "name": "f"},
                ],
            },
            {
                "role": "user",
                "content": [
                    {
                        "type": "tool_result",
                        "tool_use_id": "t",
                        "is_error": True,
                        "content": [
                            {"type": "tool_reference", "tool_name": "x"},
                            {"type": "image", "source": {"type": "url", "url": "https://x"}},
                        ],
                    },
                    {"type": "text", "text": "go on"},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "So"}]},
        ],
        "tools": [
            {"type": "custom", "name": "f", "input_schema": {"type": "object"}, "description": "d", "strict": True},
            {"type": "web_search_20250305", "name": "web_search"},
            {"name": "DeferredToolPlaceholder", "defer_loading": True},
        ],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
        "thinking": {"type": "adaptive", "display": "omitted"},
        "output_format": {"type": "json_schema", "schema": {"type": "object"}},
        "stream": True,
    },
    {
        "model": "m",
        "max_tokens": 1,
        "messages": [{"role": "user", "content": "hi"}],
        "tool_choice": {"type": "auto"},
        "thinking": {"type": "disabled"},
        "output_config": {"effort": "max", "format": {"type": "text"}},
    },
]
