"""Interface of tool-call parsers: text in, actions out, one character after the other."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class StartCall:
    """A call of the tool `name` begins."""

    name: str


@dataclass(frozen=True, slots=True)
class MoreArguments:
    """The next fragment of the call's JSON arguments."""

    fragment: str


@dataclass(frozen=True, slots=True)
class EndCall:
    """The call is over. `is_complete` is False when it was cut off: its arguments then are no JSON."""

    is_complete: bool = True


CallAction = StartCall | MoreArguments | EndCall


def to_json(value: Any) -> str:
    """Readable JSON; lone surrogates, which UTF-8 cannot carry, stay escapes."""
    text = json.dumps(value, ensure_ascii=False)
    return text if is_utf8(text) else json.dumps(value)


def is_utf8(text: str) -> bool:
    """False if the text holds lone surrogates, as JSON escapes can spell them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class CallParser(Protocol):
    """Parser of what stands between an opening and a closing marker; several calls may.

    unparsed: what has been fed since the last finished call and belongs to no call: when `has_failed`, or after
    `close`, it is ordinary text. in_string: the next character is inside a quoted string, where a marker is text.
    """

    @property
    def has_failed(self) -> bool: ...

    @property
    def in_string(self) -> bool: ...

    @property
    def unparsed(self) -> str: ...

    def feed(self, text: str) -> list[CallAction]:
        """Take more text. Nothing may be fed once `has_failed`."""
        ...

    def close(self, *, truncated: bool) -> list[CallAction]:
        """The block is over. truncated: by the token limit, so an unfinished call stays unfinished."""
        ...
