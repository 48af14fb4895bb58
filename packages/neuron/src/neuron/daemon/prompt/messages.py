"""Turns of the internal request as the message dicts that chat templates read, and their normal forms.

Templates of the field disagree on what they accept: some refuse a system message that is not the first, some refuse
two user messages in a row, some want tool arguments as an object, some want nine-character call ids. `variants`
yields the conversation as it is and then in ever more regular forms; the renderer takes the first that renders.
Nothing is dropped and nothing is invented on the way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import msgspec
from cortex_core.conversation import (
    ImagePart,
    TextPart,
    ThinkingPart,
    ToolCallPart,
    ToolDefinition,
    ToolResultPart,
    Turn,
)
from cortex_core.errors import ApiError

Message = dict[str, Any]


def messages_of(turns: tuple[Turn, ...], model: str) -> list[Message]:
    """One message per turn, except that each tool result is a message of its own.

    Raises `ApiError` `vision_unsupported` for an image anywhere: it is refused, never dropped (N9).
    """
    messages: list[Message] = []
    for turn in turns:
        if any(isinstance(part, ImagePart) for part in turn.parts):
            raise _vision_unsupported(model)
        if turn.role == "tool":
            messages += [_tool_message(part, model) for part in turn.parts if isinstance(part, ToolResultPart)]
        elif turn.role == "assistant":
            messages.append(_assistant_message(turn))
        else:
            messages.append({"role": turn.role, "content": turn.text()})
    return messages


def tools_of(tools: tuple[ToolDefinition, ...]) -> list[Message]:
    """Tool definitions in the shape templates are written for."""
    shaped: list[Message] = []
    for tool in tools:
        function: Message = {"name": tool.name}
        if tool.description is not None:
            function["description"] = tool.description
        function["parameters"] = tool.parameters or {"type": "object", "properties": {}}
        shaped.append({"type": "function", "function": function})
    return shaped


def _tool_message(part: ToolResultPart, model: str) -> Message:
    if any(isinstance(item, ImagePart) for item in part.content):
        raise _vision_unsupported(model)
    text = "".join(item.text for item in part.content if isinstance(item, TextPart))
    message: Message = {"role": "tool", "content": text, "tool_call_id": part.call_id}
    if part.name is not None:
        message["name"] = part.name
    return message


def _assistant_message(turn: Turn) -> Message:
    message: Message = {"role": "assistant", "content": turn.text()}
    reasoning = "".join(part.text for part in turn.parts if isinstance(part, ThinkingPart))
    if reasoning:
        message["reasoning_content"] = reasoning
    calls = [part for part in turn.parts if isinstance(part, ToolCallPart)]
    if calls:
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": _parsed_arguments(call.arguments)},
            }
            for call in calls
        ]
    return message


def _parsed_arguments(text: str) -> Any:
    """The arguments as an object (N18); malformed ones stay the text they are."""
    if not text.strip():
        return {}
    try:
        value = msgspec.json.decode(text.encode("utf-8", "replace"))
    except (msgspec.MsgspecError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


def _vision_unsupported(model: str) -> ApiError:
    return ApiError(
        "invalid_request",
        f"The model `{model}` takes text only: it cannot see images.",
        code="vision_unsupported",
        param="messages",
        extras={"model_id": model, "suggestion": "remove the image or choose a vision model"},
    )


# ---------------------------------------------------------------- normal forms


def variants(messages: list[Message], *, keeps_inner_system: bool) -> Iterator[list[Message]]:
    """The conversation as it is (if the template keeps a system message in the middle), then more regular forms."""
    has_inner_system = any(message["role"] == "system" for message in messages[1:])
    if keeps_inner_system or not has_inner_system:
        yield messages
    regular = _merge_neighbours(_fold_inner_system(_strict_calls(messages)))
    yield regular
    yield _strictly_alternating(_merge_neighbours(_fold_leading_system(regular)))


def _strict_calls(messages: list[Message]) -> list[Message]:
    """Arguments always an object, call ids always nine alphanumerics (equal ids stay equal)."""
    strict: list[Message] = []
    for message in messages:
        changed = message
        if "tool_calls" in message:
            calls = []
            for call in message["tool_calls"]:
                arguments = call["function"]["arguments"]
                function = {
                    **call["function"],
                    "arguments": arguments if isinstance(arguments, dict) else {"arguments": arguments},
                }
                calls.append({**call, "id": _short_id(call["id"]), "function": function})
            changed = {**message, "tool_calls": calls}
        elif "tool_call_id" in message:
            changed = {**message, "tool_call_id": _short_id(message["tool_call_id"])}
        strict.append(changed)
    return strict


def _short_id(call_id: str) -> str:
    if len(call_id) == 9 and call_id.isascii() and call_id.isalnum():
        return call_id
    return hashlib.sha256(call_id.encode("utf-8", "replace")).hexdigest()[:9]


def _fold_inner_system(messages: list[Message]) -> list[Message]:
    """System messages after the head become part of the neighbouring user turn, in their place.

    Hoisting them to the head would change the prompt's beginning every turn and with it every cached prefix.
    """
    head = 0
    while head < len(messages) and messages[head]["role"] == "system":
        head += 1
    return messages[:head] + [
        {"role": "user", "content": m["content"]} if m["role"] == "system" else m for m in messages[head:]
    ]


def _fold_leading_system(messages: list[Message]) -> list[Message]:
    """For templates without a system role: the head becomes the beginning of the first user turn."""
    return [{"role": "user", "content": m["content"]} if m["role"] == "system" else m for m in messages]


def _strictly_alternating(messages: list[Message]) -> list[Message]:
    """For templates that count turns: what a user adds to tool results becomes part of the last result, and an empty
    user turn is put before a leading assistant.
    """
    alternating: list[Message] = []
    for message in messages:
        last = alternating[-1] if alternating else None
        if message["role"] == "user" and last is not None and last["role"] == "tool":
            content = "\n\n".join(text for text in (last["content"], message["content"]) if text)
            alternating[-1] = {**last, "content": content}
        else:
            alternating.append(message)
    if alternating and alternating[0]["role"] == "assistant":
        alternating.insert(0, {"role": "user", "content": ""})
    return alternating


def _merge_neighbours(messages: list[Message]) -> list[Message]:
    """Consecutive messages of one role become one, except tool results, of which each answers its own call."""
    runs: list[list[Message]] = []
    for message in messages:
        if runs and message["role"] != "tool" and runs[-1][0]["role"] == message["role"]:
            runs[-1].append(message)
        else:
            runs.append([message])
    return [run[0] if len(run) == 1 else _merged(run) for run in runs]


def _merged(run: list[Message]) -> Message:
    combined: Message = {**run[0], "content": "\n\n".join(m["content"] for m in run if m["content"])}
    reasoning = "\n\n".join(m["reasoning_content"] for m in run if m.get("reasoning_content"))
    if reasoning:
        combined["reasoning_content"] = reasoning
    calls = [call for message in run for call in message.get("tool_calls", ())]
    if calls:
        combined["tool_calls"] = calls
    return combined
