"""`<function=NAME><parameter=KEY>VALUE</parameter>…</function>`: Qwen3-Coder and Qwen 3.5.

Values are plain text; the tool's JSON schema says what they mean. Each parameter is passed on when it is complete, so
the arguments grow as a JSON object. Tolerated: a missing `</parameter>` or `</function>`, several functions in a row.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from neuron.text import json_schema
from neuron.text.tool_formats.base import CallAction, EndCall, MoreArguments, StartCall, to_json

_FUNCTION, _PARAMETER = "<function=", "<parameter="
_END_FUNCTION, _END_PARAMETER = "</function>", "</parameter>"
_NEXT_PARAMETER = re.compile(r"\n<parameter=([^>\n]+)>")
_MAX_TAG = 1024

_BEFORE, _IN_FUNCTION, _IN_PARAMETER, _FAILED = range(4)


class QwenXmlParser:
    """See the module. accepts: whether a name may be called at all. parameters_of: the JSON schema of a tool's
    parameters by name, None for an unknown tool."""

    def __init__(self, accepts: Callable[[str], bool], parameters_of: Callable[[str], dict[str, Any] | None]) -> None:
        self._accepts = accepts
        self._parameters_of = parameters_of
        self._state = _BEFORE
        self._text = ""
        self._raw: list[str] = []
        self._schema: dict[str, Any] = {}
        self._seen: set[str] = set()
        self._key = ""
        self._searched = 0

    @property
    def has_failed(self) -> bool:
        return self._state == _FAILED

    @property
    def in_string(self) -> bool:
        return False

    @property
    def unparsed(self) -> str:
        return "".join(self._raw)

    def feed(self, text: str) -> list[CallAction]:
        self._raw.append(text)
        self._text += text
        actions: list[CallAction] = []
        while self._state != _FAILED and self._step(actions):
            pass
        return actions

    def close(self, *, truncated: bool) -> list[CallAction]:
        actions: list[CallAction] = []
        if self._state == _BEFORE:
            self._state = _FAILED
        elif truncated:
            actions.append(EndCall(is_complete=False))
            self._finish("")
        else:
            if self._state == _IN_PARAMETER:
                value = self._text.split(f"\n{_END_FUNCTION}")[0].removesuffix(_END_FUNCTION)
                self._parameter(value, actions)
            self._end_call(actions)
        return actions

    # ------------------------------------------------------------ states

    def _step(self, actions: list[CallAction]) -> bool:
        """Use one complete construct from the buffer; False if more text is needed."""
        if self._state == _IN_PARAMETER:
            end = self._text.find(_END_PARAMETER, self._searched)
            if end < 0:
                self._searched = max(0, len(self._text) - len(_END_PARAMETER))
                return False
            value, self._text = self._text[:end], self._text[end + len(_END_PARAMETER) :]
            self._parameter(value, actions)
            self._state = _IN_FUNCTION
            return True
        self._text = self._text.lstrip()
        if not self._text:
            return False
        if self._state == _BEFORE:
            name = self._tag(_FUNCTION)
            if name is None:
                return False
            if not self._accepts(name):
                self._state = _FAILED
                return False
            actions.append(StartCall(name))
            self._schema = self._parameters_of(name) or {}
            self._seen = set()
            self._state = _IN_FUNCTION
            return True
        if self._text.startswith(_END_FUNCTION):
            self._text = self._text[len(_END_FUNCTION) :]
            self._end_call(actions)
            return bool(self._text)
        if _END_FUNCTION.startswith(self._text) or _PARAMETER.startswith(self._text):
            return False
        if self._text.startswith(_PARAMETER):
            key = self._tag(_PARAMETER)
            if key is None:
                return False
            self._key = key
            self._searched = 0
            self._state = _IN_PARAMETER
            return True
        # stray text between parameters means nothing: on to the next tag
        self._text = self._text[1:]
        self._text = self._text[self._text.find("<") :] if "<" in self._text else ""
        return bool(self._text)

    def _tag(self, opening: str) -> str | None:
        """The name in `<function=NAME>`; None while it is incomplete. What cannot be one is a failure."""
        if not self._text.startswith(opening):
            if not opening.startswith(self._text):
                self._state = _FAILED
            return None
        end = self._text.find(">")
        if end < 0:
            if len(self._text) > _MAX_TAG:
                if opening == _FUNCTION:
                    self._state = _FAILED
                self._text = ""
            return None
        name = self._text[len(opening) : end].strip().strip("\"'")
        if not name and opening == _FUNCTION:
            self._state = _FAILED
            return None
        self._text = self._text[end + 1 :]
        return name

    def _parameter(self, value: str, actions: list[CallAction]) -> None:
        """Pass on one parameter; a forgotten `</parameter>` shows as another known parameter inside the value."""
        properties = self._schema.get("properties")
        known = properties if isinstance(properties, dict) else {}
        for found in _NEXT_PARAMETER.finditer(value):
            key = found.group(1).strip()
            if key in known and key != self._key and key not in self._seen:
                self._argument(value[: found.start()], known, actions)
                self._key = key
                self._parameter(value[found.end() :], actions)
                return
        self._argument(value, known, actions)

    def _argument(self, text: str, known: dict[str, Any], actions: list[CallAction]) -> None:
        if self._key in self._seen:
            return  # a JSON object has each key once, and the first is already on its way
        value = json_schema.coerce(text.removeprefix("\n").removesuffix("\n"), known.get(self._key), self._schema)
        opening = ", " if self._seen else "{"
        self._seen.add(self._key)
        actions.append(MoreArguments(f"{opening}{to_json(self._key)}: {to_json(value)}"))

    def _end_call(self, actions: list[CallAction]) -> None:
        actions.append(MoreArguments("}" if self._seen else "{}"))
        actions.append(EndCall())
        self._finish(self._text)

    def _finish(self, rest: str) -> None:
        self._state = _BEFORE
        self._text = rest
        self._raw = [rest] if rest else []
        self._seen = set()
