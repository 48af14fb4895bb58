"""Write a chat completion request, and one that counts its tokens."""

from __future__ import annotations

import json
from typing import Annotated, Any

import msgspec

from cortex_core.conversation import (
    ImagePart,
    Request,
    ResponseFormat,
    TextPart,
    ThinkingPart,
    ToolCallPart,
    ToolChoice,
    ToolResultPart,
    Turn,
)
from cortex_core.errors import ApiError

NOT_CARRIED = (
    "Request.prompts",
    "Request.echo",
    "Request.stream",
    "Request.include_usage",
    "Request.param_names",
    "Request.dropped",
    "Request.echo_fields",
    "Reasoning.visible",
    "Reasoning.omit_text",
    "ThinkingPart.signature",
    "ToolDefinition.is_freeform",
    "ToolDefinition.namespace",
    "ToolDefinition.member",
    "ToolResultPart.is_error",
)
"""What is not in a chat request: raw prompts, which are no chat; that an answer is streamed, which is always asked for;
what is about the answer, and done to it; signatures, which nobody verifies; and that a tool's result is an error, for
which chat has no word and templates of local models have none either. All else is carried, or refused by name."""


def write_request(request: Request, *, model: str | None = None, extensions: bool = True) -> bytes:
    """The request as a streamed chat completion body that asks for usage. model: the name the server knows.

    What the official API has no field for goes into the extensions that local servers share (`top_k`,
    `chat_template_kwargs`, `continue_final_message`, …). Without extensions, for servers that refuse what they do not
    know, `ApiError` names what cannot be asked for; earlier thoughts stay behind, and whether to think is up to the
    server. Raises `ValueError` for a raw prompt: it is no chat.
    """
    if not request.turns:
        raise ValueError("a raw prompt cannot be written as a chat completion")
    if not extensions:
        request = _officially(request)
    body: dict[str, Any] = {
        "model": model or request.model,
        "messages": [message for turn in request.turns for message in _messages(turn)],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    body |= _tool_fields(request)
    body |= _sampling_fields(request)
    body |= _reasoning_fields(request)
    if request.response_format is not None:
        body["response_format"] = _response_format(request.response_format)
    if request.continue_final_turn:
        body |= {"continue_final_message": True, "add_generation_prompt": False}
    if not extensions and "max_tokens" in body:
        body["max_completion_tokens"] = body.pop("max_tokens")  # the older name is refused by newer models
    return json.dumps(body, ensure_ascii=False).encode()


def _officially(request: Request) -> Request:
    """The request without what only extensions could say. Raises `ApiError` where that changes the answer."""
    sampling, limits, reasoning = request.sampling, request.limits, request.reasoning
    asked = {
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "ignore_eos": limits.ignore_eos or None,
        "thinking.budget_tokens": reasoning.budget_tokens,
        "chat_template_kwargs": request.template_kwargs or None,
        "messages": request.continue_final_turn or None,
    }
    for name, value in asked.items():
        if value is not None:
            what = "an answer begun by the client" if name == "messages" else "this field"
            raise ApiError(
                "invalid_request",
                f"{name}: the model is on a server whose API has no word for {what}.",
                code="unsupported_parameter",
                param=request.client_param(name),
            )
    turns = tuple(
        Turn(turn.role, tuple(part for part in turn.parts if not isinstance(part, ThinkingPart)))
        for turn in request.turns
    )
    reasoning = msgspec.structs.replace(reasoning, mode="default")
    return msgspec.structs.replace(request, turns=turns, reasoning=reasoning, cache_salt="")


def write_count_request(request: Request, *, model: str | None = None) -> bytes:
    """The same messages for `POST /tokenize`, which several local servers have beside chat; see `read_count`.

    Raises `ValueError` for a raw prompt.
    """
    if not request.turns:
        raise ValueError("a raw prompt cannot be counted as a chat")
    body: dict[str, Any] = {
        "model": model or request.model,
        "messages": [message for turn in request.turns for message in _messages(turn)],
        "add_generation_prompt": not request.continue_final_turn,
    }
    if request.tools:
        body["tools"] = _tool_fields(request)["tools"]
    if request.continue_final_turn:
        body["continue_final_message"] = True
    template_kwargs = _reasoning_fields(request).get("chat_template_kwargs")
    if template_kwargs:
        body["chat_template_kwargs"] = template_kwargs
    return json.dumps(body, ensure_ascii=False).encode()


def read_count(body: bytes) -> int | None:
    """The tokens that `POST /tokenize` counted; None where it answers in no form of its own for messages."""
    try:
        return _decode_count(body).count
    except (msgspec.DecodeError, RecursionError):
        return None


class _Count(msgspec.Struct):
    count: Annotated[int, msgspec.Meta(ge=0)]


_decode_count = msgspec.json.Decoder(_Count).decode


def _messages(turn: Turn) -> list[dict[str, Any]]:
    if turn.role == "tool":
        return [_tool_message(part) for part in turn.parts if isinstance(part, ToolResultPart)]
    if turn.role == "assistant":
        return [_assistant_message(turn)]
    parts = tuple(part for part in turn.parts if isinstance(part, (TextPart, ImagePart)))
    return [{"role": turn.role, "content": _content(parts)}]


def _content(parts: tuple[TextPart | ImagePart, ...]) -> str | list[dict[str, Any]]:
    """A string wherever it can be one: not every server reads parts."""
    if not parts:
        return ""
    if len(parts) == 1 and isinstance(parts[0], TextPart):
        return parts[0].text
    return [_part(part) for part in parts]


def _part(part: TextPart | ImagePart) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    url = part.url or f"data:{part.media_type or 'image/png'};base64,{part.data}"
    return {"type": "image_url", "image_url": {"url": url} | ({"detail": part.detail} if part.detail else {})}


def _tool_message(part: ToolResultPart) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "tool", "tool_call_id": part.call_id, "content": _content(part.content)}
    if part.name is not None:
        message["name"] = part.name
    return message


def _assistant_message(turn: Turn) -> dict[str, Any]:
    texts = tuple(part for part in turn.parts if isinstance(part, TextPart))
    reasoning = "".join(part.text for part in turn.parts if isinstance(part, ThinkingPart))
    calls = [part for part in turn.parts if isinstance(part, ToolCallPart)]
    message: dict[str, Any] = {"role": "assistant", "content": None if calls and not texts else _content(texts)}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in calls
        ]
    return message


def _tool_fields(request: Request) -> dict[str, Any]:
    if not request.tools:
        return {}
    tools = []
    for tool in request.tools:
        function: dict[str, Any] = {"name": tool.name}
        if tool.description is not None:
            function["description"] = tool.description
        if tool.parameters is not None:
            function["parameters"] = tool.parameters
        if tool.strict:
            function["strict"] = True
        tools.append({"type": "function", "function": function})
    fields: dict[str, Any] = {"tools": tools, "tool_choice": _tool_choice(request.tool_choice)}
    if not request.parallel_tool_calls:
        fields["parallel_tool_calls"] = False
    return fields


def _tool_choice(choice: ToolChoice) -> str | dict[str, Any]:
    if choice.mode == "named":
        return {"type": "function", "function": {"name": choice.name}}
    if choice.allowed is None:
        return choice.mode
    allowed = [{"type": "function", "function": {"name": name}} for name in choice.allowed]
    return {"type": "allowed_tools", "allowed_tools": {"mode": choice.mode, "tools": allowed}}


def _sampling_fields(request: Request) -> dict[str, Any]:
    sampling = request.sampling
    fields: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repetition_penalty": sampling.repetition_penalty,
        "logit_bias": {str(token): bias for token, bias in sampling.logit_bias.items()} or None,
        "seed": sampling.seed,
        "max_tokens": request.limits.max_tokens,
        "stop": list(request.limits.stop) or None,
        "ignore_eos": request.limits.ignore_eos or None,
        "cache_salt": request.cache_salt or None,
        "n": None if request.num_choices == 1 else request.num_choices,
    }
    if request.logprobs is not None:
        fields |= {"logprobs": True, "top_logprobs": request.logprobs}
    return {name: value for name, value in fields.items() if value is not None}


def _reasoning_fields(request: Request) -> dict[str, Any]:
    reasoning = request.reasoning
    template_kwargs = dict(request.template_kwargs)
    fields: dict[str, Any] = {}
    if reasoning.mode != "default":
        template_kwargs.setdefault("enable_thinking", reasoning.mode == "on")
    if reasoning.effort is not None:
        fields["reasoning_effort"] = reasoning.effort
    if reasoning.budget_tokens is not None:
        fields["thinking"] = {"type": "enabled", "budget_tokens": reasoning.budget_tokens}
    if template_kwargs:
        fields["chat_template_kwargs"] = template_kwargs
    return fields


def _response_format(response_format: ResponseFormat) -> dict[str, Any]:
    if response_format.kind == "json_object":
        return {"type": "json_object"}
    wrapper: dict[str, Any] = {"name": response_format.name or "response", "schema": response_format.schema}
    if response_format.strict is not None:
        wrapper["strict"] = response_format.strict
    return {"type": "json_schema", "json_schema": wrapper}
