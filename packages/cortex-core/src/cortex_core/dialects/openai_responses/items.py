"""Read `input`: a string, or items that become turns.

What an answer of ours consists of (reasoning, message, calls) is one assistant turn again when it comes back as
items. Item types that are unknown, and the traces of hosted tools, are passed over: clients replay whatever some
server once sent them. What carries content that would be lost is refused by name instead.
"""

from __future__ import annotations

from typing import Any

import msgspec

from cortex_core.conversation import (
    ImagePart,
    Part,
    TextPart,
    ThinkingPart,
    ToolCallPart,
    ToolResultPart,
    Turn,
)
from cortex_core.dialects import limits
from cortex_core.dialects.json_body import Fields, encode_compact, missing, one_of, unsupported, wrong_type
from cortex_core.dialects.openai_custom_tools import freeform_arguments
from cortex_core.dialects.openai_images import image_part
from cortex_core.dialects.openai_responses.tools import flat_name
from cortex_core.dialects.reasoning_signature import unwrap
from cortex_core.errors import invalid

ROLES = ("user", "assistant", "system", "developer")

MAPPED_ITEMS = (
    "additional_tools",
    "configuration_update",
    "custom_tool_call",
    "custom_tool_call_output",
    "function_call",
    "function_call_output",
    "message",
    "reasoning",
    "tool_search_output",
)

REFUSED_ITEMS = ("item_reference",)
"""It stands for an item that the server would have had to store."""

IGNORED_ITEMS = (
    "apply_patch_call",
    "apply_patch_call_output",
    "code_interpreter_call",
    "compaction",
    "compaction_trigger",
    "computer_call",
    "computer_call_output",
    "file_search_call",
    "image_generation_call",
    "local_shell_call",
    "local_shell_call_output",
    "mcp_approval_request",
    "mcp_approval_response",
    "mcp_call",
    "mcp_list_tools",
    "program",
    "program_output",
    "shell_call",
    "shell_call_output",
    "tool_search_call",
    "web_search_call",
)
"""Traces of tools that run elsewhere, in a conversation which now goes on here."""

TEXT_PARTS = ("input_text", "output_text", "text", "refusal", "summary_text", "reasoning_text")
REFUSED_PARTS = ("input_audio", "input_file", "computer_screenshot")


class Input(msgspec.Struct, frozen=True):
    """added_tools: declared by items; updates: settings that items change, the last one last."""

    turns: tuple[Turn, ...]
    added_tools: tuple[Fields, ...] = ()
    updates: tuple[Fields, ...] = ()


def read_input(fields: Fields) -> Input:
    value = fields.get("input")
    if value is None:
        raise missing("input")
    if type(value) is str:
        return Input((Turn("user", (TextPart(value),) if value else ()),))
    if type(value) is not list:
        raise wrong_type("input", "a string or an array of items", value)
    reader = _Reader()
    fields.array("input", limits.MAX_MESSAGES)
    fields.check_parts("input", "content", "summary", "output")
    for item in fields.objects("input"):
        reader.read(item)
    reader.close()
    if not reader.turns:
        raise invalid("input: at least one item with content is required", param="input")
    return Input(tuple(reader.turns), tuple(reader.added_tools), tuple(reader.updates))


class _Reader:
    """Items in, turns out. What the assistant said is gathered until somebody else speaks."""

    def __init__(self) -> None:
        self.turns: list[Turn] = []
        self.added_tools: list[Fields] = []
        self.updates: list[Fields] = []
        self._assistant: list[Part] = []
        self._has_assistant = False
        self._follows_message = False
        self._call_names: dict[str, str] = {}

    def read(self, item: Fields) -> None:
        kind = item.string("type") or ("message" if item.has("role") else "item_reference" if item.has("id") else "")
        if kind == "message" or (kind not in IGNORED_ITEMS and kind not in MAPPED_ITEMS and item.has("role")):
            self._message(item)
        elif kind == "reasoning":
            self._say(_thought(item))
        elif kind == "function_call":
            self._call(item, _arguments(item))
        elif kind == "custom_tool_call":
            self._call(item, freeform_arguments(item.string("input") or ""))
        elif kind in ("function_call_output", "custom_tool_call_output"):
            self._result(item)
        elif kind in ("additional_tools", "tool_search_output"):
            self.added_tools.extend(item.objects("tools", limits.MAX_TOOLS))
        elif kind == "configuration_update":
            self.updates.append(item)
        elif kind in REFUSED_ITEMS:
            raise unsupported(item.path, "items are not stored here, so none can be referred to; send it whole")

    def close(self) -> None:
        if self._has_assistant:
            self.turns.append(Turn("assistant", tuple(self._assistant)))
        self._assistant = []
        self._has_assistant = self._follows_message = False

    def _say(self, parts: tuple[Part, ...]) -> None:
        self._assistant.extend(parts)
        self._has_assistant = self._has_assistant or bool(parts)
        self._follows_message = False

    def _message(self, item: Fields) -> None:
        role = item.required_string("role")
        if role not in ROLES:
            raise one_of(item.at("role"), role, ROLES)
        if role == "assistant":
            if self._follows_message:
                self.close()  # two messages in a row were two turns
            self._assistant.extend(_parts(item, "content", images=False))
            self._has_assistant = self._follows_message = True
            return
        self.close()
        self.turns.append(Turn("user" if role == "user" else "system", _parts(item, "content", images=role == "user")))

    def _call(self, item: Fields, arguments: str) -> None:
        own_id = item.string("id")
        call_id = item.string("call_id") or own_id or ""
        name = flat_name(item.name("namespace"), item.required_name("name"))
        self._call_names[call_id] = name
        self._say((ToolCallPart(call_id, name, arguments),))

    def _result(self, item: Fields) -> None:
        self.close()
        call_id = item.required_string("call_id", may_be_empty=True)
        result = ToolResultPart(call_id, _output(item), name=self._call_names.get(call_id))
        self.turns.append(Turn("tool", (result,)))


def _parts(holder: Fields, name: str, *, images: bool) -> tuple[TextPart | ImagePart, ...]:
    """Content as a string, null or parts; one part may come without its array. Empty text is no part."""
    content = holder.get(name)
    if content is None:
        return ()
    if type(content) is str:
        return (TextPart(content),) if content else ()
    if type(content) is dict:
        holder = Fields({name: [content]}, holder.path)
    elif type(content) is not list:
        raise wrong_type(holder.at(name), "a string or an array of parts", content)
    parts: list[TextPart | ImagePart] = []
    for part in holder.objects(name):
        kind = part.required_string("type")
        text = part.get("refusal" if kind == "refusal" else "text")
        if kind == "input_image" and images:
            parts.append(_image(part))
        elif kind == "input_image" or kind in REFUSED_PARTS:
            raise unsupported(part.at("type"), f"content of type '{kind}' is not supported here")
        elif type(text) is str:
            if text:
                parts.append(TextPart(text))
        elif kind in TEXT_PARTS:
            raise missing(part.at("refusal" if kind == "refusal" else "text"))
        else:
            raise one_of(part.at("type"), kind, ("input_text", "output_text", "input_image"))
    return tuple(parts)


def _image(part: Fields) -> ImagePart:
    if part.has("file_id") and not part.has("image_url"):
        raise unsupported(part.at("file_id"), "uploaded files are not supported; send image_url")
    image = image_part(part)
    detail = part.string("detail")
    return image if detail is None else msgspec.structs.replace(image, detail=detail)


def _output(item: Fields) -> tuple[TextPart | ImagePart, ...]:
    """Text or parts; any other JSON that a client sends is shown to the model as JSON."""
    output = item.get("output")
    is_parts = type(output) is list and all(type(part) is dict and "type" in part for part in output)
    if output is None or type(output) is str or is_parts:
        return _parts(item, "output", images=True)
    return (TextPart(encode_compact(output)),)


def _thought(item: Fields) -> tuple[Part, ...]:
    """The raw thought where there is one, else its summary (which is the whole of it in our own items)."""
    carried = item.get("encrypted_content")
    content, summary = (_parts(item, name, images=False) for name in ("content", "summary"))
    for parts in (content, summary):
        text = "".join(part.text for part in parts if isinstance(part, TextPart))
        if text:
            return (ThinkingPart(text),)
    text = unwrap(carried if isinstance(carried, str) else None) or ""
    return (ThinkingPart(text),) if text else ()


def _arguments(item: Fields) -> str:
    arguments: Any = item.get("arguments")
    if type(arguments) is dict:
        return encode_compact(arguments)
    return item.string("arguments") or "{}"
