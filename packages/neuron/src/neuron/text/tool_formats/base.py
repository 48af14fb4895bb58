"""What every tool-call parser offers: text in, actions out, one character after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class StartCall:
    name: str


@dataclass(frozen=True, slots=True)
class MoreArguments:
    fragment: str


@dataclass(frozen=True, slots=True)
class EndCall:
    """The call is over. `is_complete` is False when it was cut off: its arguments then are no JSON."""

    is_complete: bool = True


CallAction = StartCall | MoreArguments | EndCall


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
