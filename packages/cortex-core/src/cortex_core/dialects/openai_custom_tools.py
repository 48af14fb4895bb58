"""Custom (freeform) tools, which chat and responses share: the model sees a function of one string argument.

On the way in `freeform_tool` makes a function of the tool; on the way out `FreeformInput` takes the text out of the
JSON arguments again, while they stream.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

import msgspec

from cortex_core.conversation import ToolDefinition
from cortex_core.dialects.json_body import Fields, encode_compact, missing, one_of

ARGUMENT = "input"

_SYNTAXES = ("lark", "regex")
_HEAD = re.compile(r'\s*\{\s*"' + ARGUMENT + r'"\s*:\s*"')
_MAX_HEAD_CHARACTERS = 256
_HIGH_SURROGATE = r"\\u[dD][89abAB][0-9a-fA-F]{2}"
# Whole pieces of a JSON string's inside; what is left over is an escape that has not arrived whole. Possessive: to go
# back would change nothing, and to be able to takes a hundred bytes for each character.
_PIECES = re.compile(
    rf'(?:[^"\\]++|{_HIGH_SURROGATE}(?=[^\\]|\\[^u]|\\u[0-9a-fA-F]{{4}})'
    rf"|(?!{_HIGH_SURROGATE})\\u[0-9a-fA-F]{{4}}|\\[^u])++"
)

_decode = msgspec.json.Decoder().decode


def freeform_tool(
    tool: Fields,
    name: str,
    *,
    wrapped_grammar: bool = False,
    namespace: str | None = None,
    member: str | None = None,
) -> ToolDefinition:
    """The tool of the object `{name, description?, format?}` as a function of one string.

    A grammar is shown to the model as the argument's description. A regular expression is also the schema's
    `pattern`, so that a forced call obeys it; JSON Schema has no word for a Lark grammar. wrapped_grammar: chat nests
    syntax and definition one level deeper than responses does.
    """
    argument: dict[str, Any] = {"type": "string"}
    given = tool.object("format")
    if given is not None:
        kind = given.required_string("type")
        if kind == "grammar":
            grammar = given.required_object("grammar") if wrapped_grammar else given
            syntax = grammar.choice("syntax", _SYNTAXES)
            if syntax is None:
                raise missing(grammar.at("syntax"))
            definition = grammar.required_string("definition")
            argument["description"] = f"Text that matches this {syntax} grammar:\n{definition}"
            if syntax == "regex":
                argument["pattern"] = f"^(?:{definition})$"
        elif kind != "text":
            raise one_of(given.at("type"), kind, ("text", "grammar"))
    return ToolDefinition(
        name=name,
        description=tool.string("description"),
        parameters={
            "type": "object",
            "properties": {ARGUMENT: argument},
            "required": [ARGUMENT],
            "additionalProperties": False,
        },
        is_freeform=True,
        namespace=namespace,
        member=member,
    )


def freeform_names(tools: Iterable[ToolDefinition]) -> frozenset[str]:
    return frozenset(tool.name for tool in tools if tool.is_freeform)


def freeform_arguments(text: str) -> str:
    """The JSON arguments of a call with this text, as a model would have written them."""
    return encode_compact({ARGUMENT: text})


class FreeformInput:
    """The text inside of one call's arguments: `feed` fragments of JSON, send on what comes back, `close` at the end.

    Text comes as soon as it is certain where the arguments begin with the argument, as they nearly always do;
    otherwise all of it comes from `close`: the argument, else the only string there is, else the arguments as they are.
    """

    __slots__ = ("_fragments", "_has_begun", "_has_ended", "_head", "_pending")

    def __init__(self) -> None:
        self._fragments: list[str] = []
        self._head = ""
        self._pending = ""
        self._has_begun = False
        self._has_ended = False

    def feed(self, fragment: str) -> str:
        if self._has_ended:
            return ""
        if self._has_begun:
            self._pending += fragment
        else:
            self._fragments.append(fragment)
            if len(self._head) == _MAX_HEAD_CHARACTERS:
                return ""  # it would have begun by now
            self._head += fragment[: _MAX_HEAD_CHARACTERS - len(self._head)]
            head = _HEAD.match(self._head)
            if head is None:
                return ""
            self._has_begun = True
            self._pending = "".join(self._fragments)[head.end() :]
            self._fragments.clear()
        pieces = _PIECES.match(self._pending)
        if pieces is None:
            self._has_ended = self._pending.startswith('"')
            return ""
        self._pending = self._pending[pieces.end() :]
        self._has_ended = self._pending.startswith('"')
        return _unescaped(pieces[0])

    def close(self) -> str:
        """What is left: the call has ended, whole or cut off."""
        if self._has_begun or self._has_ended:
            return ""
        self._has_ended = True
        return _input_of("".join(self._fragments))


def freeform_text(arguments: str) -> str:
    """The text of a call whose arguments are all there."""
    reader = FreeformInput()
    return reader.feed(arguments) + reader.close()


def _unescaped(pieces: str) -> str:
    if "\\" not in pieces:
        return pieces
    try:
        text = json.loads(f'"{pieces}"', strict=False)
    except ValueError:
        return pieces  # an escape that JSON does not know: better as it stands than not at all
    return str(text).encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _input_of(arguments: str) -> str:
    try:
        value = _decode(arguments)
    except (msgspec.DecodeError, RecursionError):
        return arguments
    if not isinstance(value, dict):
        return value if isinstance(value, str) else arguments
    if not value:
        return ""
    text = value.get(ARGUMENT)
    if isinstance(text, str):
        return text
    strings = [item for item in value.values() if isinstance(item, str)]
    return strings[0] if len(strings) == 1 else arguments
