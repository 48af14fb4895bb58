"""`{"name": "get_weather", "arguments": {"city": "Oslo"}}`: Qwen 2.5 and 3, Hermes and many others.

The arguments object is passed on as the raw text that arrives, from its opening to its closing brace, so nothing is
re-serialised and the first fragment leaves with the first token. Tolerated: any order of keys, `parameters` for
`arguments`, arguments written as a JSON string, missing or null arguments, several objects in a row or in a list.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import msgspec

from neuron.daemon.output.tool_formats.base import CallAction, EndCall, MoreArguments, StartCall, is_utf8, to_json

_WHITESPACE = " \t\r\n"
_ARGUMENT_KEYS = frozenset({"arguments", "parameters"})
_MAX_KEY_OR_NAME = 1024

# where the scan may stop: structural characters outside of strings; the end, an escape or a bare control
# character inside of them
_STRUCTURE = re.compile(r'["{}\[\]]')
_STRING_EVENT = re.compile(r'["\\\x00-\x1f]')

(
    _BEFORE, _KEY_OR_END, _KEY, _COLON, _VALUE_START, _NAME, _OBJECT, _OTHER, _AFTER_VALUE, _FAILED, _JUNK,
) = range(11)  # fmt: skip


class _Nesting:
    """Where a JSON value stands: open brackets, and whether inside a string.

    controls: indexes of bare control characters that the last `scan` met inside strings.
    """

    __slots__ = ("controls", "in_string", "is_broken", "stack", "was_escape")

    def __init__(self) -> None:
        self.controls: list[int] = []
        self.stack: list[str] = []
        self.in_string = False
        self.was_escape = False
        self.is_broken = False

    def scan(self, text: str, at: int) -> tuple[int, bool]:
        """Walk from `at`; returns (one past the last character used, whether the value ended with it)."""
        length = len(text)
        self.controls.clear()
        while at < length:
            if self.was_escape:
                self.was_escape = False
                at += 1
                continue
            if self.in_string:
                found = _STRING_EVENT.search(text, at)
                if found is None:
                    return length, False
                at = found.end()
                char = found.group()
                if char == '"':
                    self.in_string = False
                    if not self.stack:
                        return at, True
                elif char == "\\":
                    self.was_escape = True
                else:
                    self.is_broken = True  # no JSON string holds a bare line break; perhaps a quote is missing
                    self.controls.append(at - 1)
                continue
            found = _STRUCTURE.search(text, at)
            if found is None:
                return length, False
            at = found.end()
            char = found.group()
            if char == '"':
                self.in_string = True
            elif char in "{[":
                self.stack.append("}" if char == "{" else "]")
            elif self.stack:
                self.stack.pop()
                if not self.stack:
                    return at, True
        return length, False


class QwenJsonParser:
    """See the module. Feed everything between the markers. accepts: whether a name may be called at all."""

    def __init__(self, accepts: Callable[[str], bool]) -> None:
        self._accepts = accepts
        self._state = _BEFORE
        self._raw: list[str] = []
        self._reset_call()

    def _reset_call(self) -> None:
        self._name: str | None = None
        self._key = ""
        self._buffer: list[str] = []
        self._num_buffered = 0
        self._escape = False
        self._nesting = _Nesting()
        self._early_arguments: list[str] = []
        self._arguments: list[str] = []
        self._has_arguments = False
        self._in_arguments = False

    # ------------------------------------------------------------ CallParser

    @property
    def has_failed(self) -> bool:
        return self._state == _FAILED

    @property
    def in_string(self) -> bool:
        in_value = self._state in (_OBJECT, _OTHER)
        return in_value and self._nesting.in_string and not self._nesting.is_broken

    @property
    def unparsed(self) -> str:
        return "".join(self._raw)

    def feed(self, text: str) -> list[CallAction]:
        actions: list[CallAction] = []
        at = 0
        while at < len(text) and self._state != _FAILED:
            start = at
            at = self._step(text, at, actions)
            self._raw.append(text[start:at])
            if actions and isinstance(actions[-1], EndCall):
                self._raw.clear()
        if self._state == _FAILED:
            self._raw.append(text[at:])
        return actions

    def close(self, *, truncated: bool) -> list[CallAction]:
        if self._state == _JUNK:
            return []
        if self._name is None:
            self._state = _FAILED
            return []
        if self._state == _OBJECT and self._in_arguments:
            actions: list[CallAction] = []
            written = "".join(self._arguments)
            rest = None if truncated else _completion(written, self._nesting)
            if rest:
                actions.append(MoreArguments(rest))
            actions.append(EndCall(is_complete=rest is not None))
            self._finish()
            return actions
        if truncated and not self._has_arguments:
            self._finish()
            return [EndCall(is_complete=False)]
        return self._end_call()

    # ------------------------------------------------------------ states

    def _step(self, text: str, at: int, actions: list[CallAction]) -> int:
        """Use at least one character from `at`; returns the index after the last one used."""
        state = self._state
        if state == _JUNK:
            return len(text)
        if state == _OBJECT:
            return self._object(text, at, actions)
        if state == _OTHER:
            return self._other(text, at, actions)
        if state in (_KEY, _NAME):
            return self._string(text, at, actions)
        if text[at] in _WHITESPACE:
            return at + 1
        if state == _VALUE_START:
            return self._value_start(text, at, actions)
        self._structure(text[at], actions)
        return at + 1

    def _structure(self, char: str, actions: list[CallAction]) -> None:
        """A character around the calls, or between the keys and values of one."""
        state = self._state
        if state == _BEFORE:
            if char == "{":
                self._state = _KEY_OR_END
            elif char not in "[],}":  # a list around the calls, or one brace too many after one
                self._state = _FAILED
        elif state == _KEY_OR_END:
            if char == '"':
                self._state = _KEY
                self._buffer = []
                self._num_buffered = 0
            elif char == "}":
                self._close_object(actions)
            elif char != ",":
                self._fail(actions)
        elif state == _COLON:
            self._state = _VALUE_START
            if char != ":":
                self._fail(actions)
        elif state == _AFTER_VALUE:
            if char == ",":
                self._state = _KEY_OR_END
            elif char == "}":
                self._close_object(actions)
            else:
                self._fail(actions)

    def _fail(self, actions: list[CallAction]) -> None:
        """This is no call. If it has been announced as one, it ends here and the rest of the block is dropped."""
        if self._name is None:
            self._state = _FAILED
            return
        actions.extend(self._end_call())
        self._state = _JUNK

    def _string(self, text: str, at: int, actions: list[CallAction]) -> int:
        """A key or the name: short, so it is gathered whole and decoded at once."""
        for index in range(at, len(text)):
            char = text[index]
            if self._escape:
                self._escape = False
            elif char == "\\":
                self._escape = True
            elif char == '"':
                self._buffer.append(text[at:index])
                self._string_done("".join(self._buffer), actions)
                return index + 1
        self._buffer.append(text[at:])
        self._num_buffered += len(text) - at
        if self._num_buffered > _MAX_KEY_OR_NAME:
            self._fail(actions)
        return len(text)

    def _string_done(self, body: str, actions: list[CallAction]) -> None:
        try:
            value = json.loads(f'"{body}"')
        except ValueError:
            self._fail(actions)
            return
        if self._state == _KEY:
            self._key = value
            self._state = _COLON
            return
        if self._name is not None:
            self._state = _AFTER_VALUE
            return
        if not value or not is_utf8(value) or not self._accepts(value):
            self._state = _FAILED
            return
        self._name = value
        self._state = _AFTER_VALUE
        actions.append(StartCall(value))
        if self._early_arguments:
            self._emit("".join(self._early_arguments), actions)

    def _value_start(self, text: str, at: int, actions: list[CallAction]) -> int:
        char = text[at]
        if self._key == "name":
            if char != '"':
                self._fail(actions)
                return at + 1
            self._state = _NAME
            self._buffer = []
            self._num_buffered = 0
            return at + 1
        self._in_arguments = self._key in _ARGUMENT_KEYS and not self._has_arguments
        self._nesting = _Nesting()
        self._buffer = []
        if self._in_arguments and char == "{":
            self._state = _OBJECT
            return self._object(text, at, actions)
        self._state = _OTHER
        return self._other(text, at, actions)

    def _object(self, text: str, at: int, actions: list[CallAction]) -> int:
        end, is_closed = self._nesting.scan(text, at)
        fragment = text[at:end]
        if self._nesting.controls:  # small models break lines inside of strings: write them as JSON does
            fragment = _escaped(text, at, end, self._nesting.controls)
        self._emit(fragment, actions)
        if is_closed:
            self._has_arguments = True
            self._in_arguments = False
            self._state = _AFTER_VALUE
        return end

    def _emit(self, fragment: str, actions: list[CallAction]) -> None:
        if self._name is None:
            self._early_arguments.append(fragment)
            return
        self._arguments.append(fragment)
        actions.append(MoreArguments(fragment))

    def _other(self, text: str, at: int, actions: list[CallAction]) -> int:
        """A value that is not passed on as it comes: gathered up to the comma or brace that ends it."""
        nesting = self._nesting
        index = at
        while index < len(text):
            if not nesting.in_string and not nesting.stack and not nesting.was_escape and text[index] in ",}":
                self._buffer.append(text[at:index])
                self._other_done("".join(self._buffer).strip(), actions)
                return max(index, at)
            if nesting.in_string or nesting.stack or nesting.was_escape:
                index, _ = nesting.scan(text, index)
            else:
                if text[index] in '"{[':
                    nesting.scan(text[index], 0)
                index += 1
        self._buffer.append(text[at:])
        return len(text)

    def _other_done(self, raw: str, actions: list[CallAction]) -> None:
        self._state = _AFTER_VALUE
        if not self._in_arguments:
            return
        self._in_arguments = False
        arguments = _arguments_from(raw)
        if arguments is None:
            if self._name is None:
                self._state = _FAILED
                return
            arguments = to_json({"arguments": raw})
        self._has_arguments = True
        self._emit(arguments, actions)

    def _close_object(self, actions: list[CallAction]) -> None:
        if self._name is None:
            self._state = _FAILED
        else:
            actions.extend(self._end_call())

    def _end_call(self) -> list[CallAction]:
        actions: list[CallAction] = [] if self._has_arguments else [MoreArguments("{}")]
        actions.append(EndCall())
        self._finish()
        return actions

    def _finish(self) -> None:
        self._reset_call()
        self._raw.clear()
        self._state = _BEFORE


def _escaped(text: str, start: int, end: int, controls: list[int]) -> str:
    pieces = []
    for index in controls:
        pieces += [text[start:index], json.dumps(text[index])[1:-1]]
        start = index + 1
    return "".join([*pieces, text[start:end]])


def _arguments_from(raw: str) -> str | None:
    """Arguments that are not written as an object: a JSON string of one, null, or another value (then wrapped)."""
    try:
        value: Any = json.loads(raw)
        if value is None:
            return "{}"
        inner = _object_in(value) if isinstance(value, str) else None
        if inner is None:
            return to_json({"arguments": value})
        return value.strip() if value.strip() and is_utf8(value) else to_json(inner)
    except (ValueError, RecursionError):  # one that can just be read may be too deep to be written
        return None


def _object_in(text: str) -> dict[str, Any] | None:
    try:
        value: Any = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _completion(written: str, nesting: _Nesting) -> str | None:
    """What turns a cut-off object into JSON, None if nothing simple does."""
    quote = '"' if nesting.in_string else ""
    brackets = "".join(reversed(nesting.stack))
    for rest in (quote + brackets, f"{quote}null{brackets}", f"{quote}: null{brackets}"):
        try:
            msgspec.json.decode((written + rest).encode("utf-8", "replace"))
        except (msgspec.MsgspecError, RecursionError):
            continue
        return rest
    return None
