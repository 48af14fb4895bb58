"""`<function=NAME><parameter=KEY>VALUE</parameter>…</function>`: Qwen3-Coder and Qwen 3.5.

Values are plain text; the tool's JSON schema says what they mean. Each parameter is passed on when it is complete, so
the arguments grow as a JSON object. Tolerated: a missing `</parameter>` or `</function>`, several functions in a row.
A value may be a whole file, and comes a few characters at a time: it is gathered in pieces.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from neuron.daemon.grammar.schema_types import ArgumentTypes, StepBudget, coerce
from neuron.daemon.output.tool_formats.base import CallAction, EndCall, MoreArguments, StartCall, to_json

_FUNCTION, _PARAMETER = "<function=", "<parameter="
_END_FUNCTION, _END_PARAMETER = "</function>", "</parameter>"
_NEXT_PARAMETER = re.compile(r"\n<parameter=([^>\n]+)>")
_NOT_BLANK = re.compile(r"\S")
_MAX_TAG = 1024

_BEFORE, _IN_FUNCTION, _IN_PARAMETER, _FAILED = range(4)


class QwenXmlParser:
    """See the module. accepts: whether a name may be called at all. types_of: those of a tool's arguments, by its name.

    Text waits in `_text` from `_at` on; while a parameter is open its value is `_value`, and `_text` what may become
    its end.
    """

    def __init__(self, accepts: Callable[[str], bool], types_of: Callable[[str], ArgumentTypes]) -> None:
        self._accepts = accepts
        self._types_of = types_of
        self._state = _BEFORE
        self._text = ""
        self._at = 0
        self._value: list[str] = []
        self._raw: list[str] = []
        self._types = ArgumentTypes(None, StepBudget())
        self._seen: set[str] = set()
        self._key = ""

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
        self._text = self._text[self._at :] + text
        self._at = 0
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
            self._finish()
        else:
            if self._state == _IN_PARAMETER:
                value = "".join([*self._value, self._text[self._at :]])
                self._parameter(value.split(f"\n{_END_FUNCTION}")[0].removesuffix(_END_FUNCTION), actions)
                self._at = len(self._text)
            self._end_call(actions)
        return actions

    # ------------------------------------------------------------ states

    def _step(self, actions: list[CallAction]) -> bool:
        """Use one complete construct from the buffer; False if more text is needed."""
        if self._state == _IN_PARAMETER:
            return self._more_value(actions)
        text = self._text
        head = _NOT_BLANK.search(text, self._at)
        if head is None:
            self._at = len(text)
            return False
        self._at = head.start()
        if self._state == _BEFORE:
            name = self._tag(_FUNCTION)
            if name is None:
                return False
            if not self._accepts(name):
                self._state = _FAILED
                return False
            actions.append(StartCall(name))
            self._types = self._types_of(name)
            self._seen = set()
            self._state = _IN_FUNCTION
            return True
        if text.startswith(_END_FUNCTION, self._at):
            self._at += len(_END_FUNCTION)
            self._end_call(actions)
            return self._at < len(self._text)
        if self._may_become(_END_FUNCTION) or self._may_become(_PARAMETER):
            return False
        if text.startswith(_PARAMETER, self._at):
            key = self._tag(_PARAMETER)
            if key is None:
                return False
            self._key = key
            self._value = []
            self._state = _IN_PARAMETER
            return True
        # stray text between parameters means nothing: on to the next tag
        tag = text.find("<", self._at + 1)
        self._at = len(text) if tag < 0 else tag
        return tag >= 0

    def _may_become(self, construct: str) -> bool:
        """All that waits is a beginning of `construct`."""
        num_waiting = len(self._text) - self._at
        return num_waiting <= len(construct) and construct.startswith(self._text[self._at :])

    def _more_value(self, actions: list[CallAction]) -> bool:
        text, start = self._text, self._at
        end = text.find(_END_PARAMETER, start)
        if end >= 0:
            self._value.append(text[start:end])
            self._at = end + len(_END_PARAMETER)
            self._parameter("".join(self._value), actions)
            self._value = []
            self._state = _IN_FUNCTION
            return True
        # what may be the beginning of the end stays
        self._at = max(start, len(text) - len(_END_PARAMETER) + 1)
        self._value.append(text[start : self._at])
        return False

    def _tag(self, opening: str) -> str | None:
        """The name in `<function=NAME>`; None while it is incomplete. What cannot be one is a failure."""
        text, start = self._text, self._at
        if not text.startswith(opening, start):
            if not self._may_become(opening):
                self._state = _FAILED
            return None
        end = text.find(">", start)
        if end < 0:
            if len(text) - start > _MAX_TAG:
                if opening == _FUNCTION:
                    self._state = _FAILED
                self._at = len(text)
            return None
        name = text[start + len(opening) : end].strip().strip("\"'")
        if not name and opening == _FUNCTION:
            self._state = _FAILED
            return None
        self._at = end + 1
        return name

    def _parameter(self, value: str, actions: list[CallAction]) -> None:
        """Pass on one parameter; a forgotten `</parameter>` shows as another known parameter inside the value."""
        known = self._types.names
        start = 0
        for found in _NEXT_PARAMETER.finditer(value):
            key = found.group(1).strip()
            if key in known and key != self._key and key not in self._seen:
                self._argument(value[start : found.start()], actions)
                self._key = key
                start = found.end()
        self._argument(value[start:], actions)

    def _argument(self, text: str, actions: list[CallAction]) -> None:
        if self._key in self._seen:
            return  # a JSON object has each key once, and the first is already on its way
        value = coerce(text.removeprefix("\n").removesuffix("\n"), self._types.of(self._key))
        opening = ", " if self._seen else "{"
        self._seen.add(self._key)
        actions.append(MoreArguments(f"{opening}{to_json(self._key)}: {to_json(value)}"))

    def _end_call(self, actions: list[CallAction]) -> None:
        actions.append(MoreArguments("}" if self._seen else "{}"))
        actions.append(EndCall())
        self._finish()

    def _finish(self) -> None:
        """Another call may follow in what waits."""
        self._state = _BEFORE
        rest = self._text[self._at :]
        self._text, self._at = rest, 0
        self._raw = [rest] if rest else []
        self._seen = set()
