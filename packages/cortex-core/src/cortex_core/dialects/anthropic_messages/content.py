"""Read the messages of a request: roles and content blocks into turns of typed parts.

String content and a single text block give the same turn, and `cache_control` leaves no trace: clients move both
from request to request, and a prompt that changed with them would lose its cached prefix.
"""

from __future__ import annotations

import msgspec

from cortex_core.conversation import (
    ImagePart,
    Part,
    Role,
    TextPart,
    ThinkingPart,
    ToolCallPart,
    ToolResultPart,
    Turn,
)
from cortex_core.dialects import limits
from cortex_core.dialects.json_body import (
    Fields,
    encode_compact,
    missing,
    one_of,
    unsupported,
    wrong_type,
)
from cortex_core.dialects.reasoning_signature import unwrap
from cortex_core.errors import ApiError, invalid

ROLES = ("user", "assistant", "system")
IMAGE_MEDIA_TYPES = ("image/jpeg", "image/png", "image/gif", "image/webp")

BLOCKS_OF_ROLE = {
    "user": ("text", "image", "tool_result"),
    "assistant": ("text", "thinking", "redacted_thinking", "tool_use"),
    "system": ("text", "tool_addition", "tool_removal"),
    "tool_result": ("text", "image", "tool_reference"),
}
"""What is read, by the role (or block) that holds it."""

REFUSED_BLOCKS = ("document", "search_result", "container_upload", "browser_state")
"""Blocks that carry content which would be lost: refused by name."""

IGNORED_BLOCKS = (
    "advisor_tool_result",
    "bash_code_execution_tool_result",
    "code_execution_tool_result",
    "compaction",
    "fallback",
    "mcp_tool_listing",
    "mcp_tool_result",
    "mcp_tool_use",
    "server_tool_use",
    "text_editor_code_execution_tool_result",
    "tool_search_tool_result",
    "web_fetch_tool_result",
    "web_search_tool_result",
)
"""Traces that Anthropic's server-side tools left in a conversation which now goes on here."""


class Messages(msgspec.Struct, frozen=True):
    """`added_tools`: definitions given inline by `tool_addition` blocks, as they would stand in `tools`."""

    turns: tuple[Turn, ...]
    added_tools: tuple[Fields, ...]


def read_messages(fields: Fields) -> Messages:
    """The `messages` array. Consecutive turns of a role are kept apart, system turns stay where they are."""
    if fields.array("messages", limits.MAX_MESSAGES) is None:
        raise missing("messages")
    fields.check_parts("messages", "content")
    messages = list(fields.objects("messages"))
    if not messages:
        raise invalid("messages: at least one message is required", param="messages")
    last_user = max((i for i, message in enumerate(messages) if message.get("role") == "user"), default=-1)
    turns: list[Turn] = []
    added_tools: list[Fields] = []
    call_names: dict[str, str] = {}
    for index, message in enumerate(messages):
        role = message.required_string("role")
        if role == "user":
            turns.extend(_user_turns(message, call_names))
        elif role == "assistant":
            parts = _assistant_parts(message)
            turns.append(Turn("assistant", parts))
            call_names.update((part.id, part.name) for part in parts if isinstance(part, ToolCallPart))
        elif role == "system":
            text, is_cleared = _system_parts(message, added_tools), _is_cleared(message)
            if text and not (index < last_user and is_cleared):
                turns.append(Turn("system", text))
        else:
            raise one_of(message.at("role"), role, ROLES)
    if not turns:
        raise invalid("messages: at least one message with content is required", param="messages")
    return Messages(tuple(turns), tuple(added_tools))


def text_blocks(fields: Fields, name: str) -> list[str]:
    """The non-empty texts of a field that is a string or an array of text blocks."""
    value = fields.get(name)
    if value is None:
        return []
    if type(value) is str:
        return [value] if value else []
    if type(value) is not list:
        raise wrong_type(fields.at(name), "a string or an array of text blocks", value)
    texts: list[str] = []
    for block in fields.objects(name, limits.MAX_PARTS):
        kind = block.required_string("type")
        if kind != "text":
            raise one_of(block.at("type"), kind, ("text",))
        texts.append(block.required_string("text", may_be_empty=True))
    return [text for text in texts if text]


def _blocks(holder: Fields, name: str = "content") -> list[Fields]:
    """Content as blocks, whichever way it was given."""
    value = holder.get(name)
    if type(value) is str:
        return [Fields({"type": "text", "text": value}, holder.at(name))]
    if type(value) is not list:
        raise wrong_type(holder.at(name), "a string or an array of content blocks", value)
    return list(holder.objects(name))


def _content(message: Fields) -> list[Fields]:
    if message.get("content") is None:
        raise missing(message.at("content"))
    return _blocks(message)


def _user_turns(message: Fields, call_names: dict[str, str]) -> list[Turn]:
    """A turn per tool result, then one with the rest of the message: results answer the turn before."""
    results: list[Turn] = []
    parts: list[Part] = []
    for block in _content(message):
        kind = block.required_string("type")
        if kind == "text":
            parts.extend(_text(block))
        elif kind == "image":
            parts.append(_image(block))
        elif kind == "tool_result":
            results.append(Turn("tool", (_tool_result(block, call_names),)))
        elif kind not in IGNORED_BLOCKS:
            raise _refusal(block, kind, "user")
    if parts or not results:
        return [*results, Turn("user", tuple(parts))]
    return results


def _assistant_parts(message: Fields) -> tuple[Part, ...]:
    parts: list[Part] = []
    for block in _content(message):
        kind = block.required_string("type")
        if kind == "text":
            parts.extend(_text(block))
        elif kind == "thinking":
            signature = block.string("signature")
            text = block.required_string("thinking", may_be_empty=True) or unwrap(signature)
            if text:
                parts.append(ThinkingPart(text, signature))
        elif kind == "tool_use":
            parts.append(_tool_call(block))
        elif kind != "redacted_thinking" and kind not in IGNORED_BLOCKS:
            raise _refusal(block, kind, "assistant")
    return tuple(parts)


def _system_parts(message: Fields, added_tools: list[Fields]) -> tuple[Part, ...]:
    """May be empty: a system message can carry settings alone, and those are hints.

    Every declared tool is offered throughout, so a reference that adds or removes one changes nothing.
    """
    if message.get("content") is None:
        return ()
    parts: list[Part] = []
    for block in _blocks(message):
        kind = block.required_string("type")
        if kind == "text":
            parts.extend(_text(block))
        elif kind == "tool_addition":
            tool = block.required_object("tool")
            if tool.string("type") == "tool_definition":
                added_tools.append(tool.required_object("definition"))
        elif kind != "tool_removal":
            raise _refusal(block, kind, "system")
    return tuple(parts)


def _is_cleared(message: Fields) -> bool:
    """Whether a user message after this one takes it out of the model's sight."""
    return message.choice("clear_at", ("next_user_message", "never")) == "next_user_message"


def _refusal(block: Fields, kind: str, holder: Role | str) -> ApiError:
    allowed = BLOCKS_OF_ROLE[holder]
    if kind in REFUSED_BLOCKS:
        return unsupported(block.at("type"), f"content blocks of type '{kind}' are not supported")
    return one_of(block.at("type"), kind, allowed)


def _text(block: Fields) -> tuple[TextPart, ...]:
    text = block.required_string("text", may_be_empty=True)
    return (TextPart(text),) if text else ()


def _image(block: Fields) -> ImagePart:
    source = block.required_object("source")
    kind = source.required_string("type")
    if kind == "base64":
        media_type = source.required_string("media_type")
        if media_type not in IMAGE_MEDIA_TYPES:
            raise one_of(source.at("media_type"), media_type, IMAGE_MEDIA_TYPES)
        return ImagePart(data=source.required_string("data"), media_type=media_type)
    if kind == "url":
        url = source.required_string("url")
        if not url[:8].lower().startswith(("http://", "https://")):
            raise invalid(f"{source.at('url')}: must be an http or https URL", param=source.at("url"))
        return ImagePart(url=url)
    if kind == "file":
        raise unsupported(source.at("type"), "uploaded files are not supported; send base64 or a URL")
    raise one_of(source.at("type"), kind, ("base64", "url"))


def _tool_call(block: Fields) -> ToolCallPart:
    call_input = block.object("input")
    return ToolCallPart(
        id=block.required_string("id"),
        name=block.required_name("name"),
        arguments="{}" if call_input is None else encode_compact(call_input.values),
    )


def _tool_result(block: Fields, call_names: dict[str, str]) -> ToolResultPart:
    call_id = block.required_string("tool_use_id")
    content: list[TextPart | ImagePart] = []
    for inner in _blocks(block) if block.has("content") else ():
        kind = inner.required_string("type")
        if kind == "text":
            content.extend(_text(inner))
        elif kind == "image":
            content.append(_image(inner))
        elif kind == "tool_reference":
            # The answer of a tool search. The model sees the name; the tool itself has been on offer all along.
            content.append(TextPart(inner.required_string("tool_name") + "\n"))
        else:
            raise _refusal(inner, kind, "tool_result")
    return ToolResultPart(call_id, tuple(content), is_error=block.boolean("is_error"), name=call_names.get(call_id))
