"""Incremental scan for the end of a JSON object that comes in fragments; nothing is read twice."""

from __future__ import annotations

import re

_BETWEEN = re.compile(r'["{}\[\]]')
_IN_STRING = re.compile(r'["\\]')


class ObjectScan:
    """`feed` it the fragments. has_ended: as many brackets have been closed as opened, and only blanks followed.

    What has not ended is no JSON object; what has ended may still be none.
    """

    __slots__ = ("_depth", "_in_string", "_is_escaped", "_is_over", "_is_spoiled")

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._is_escaped = False
        self._is_over = False
        self._is_spoiled = False

    @property
    def has_ended(self) -> bool:
        return self._is_over and not self._is_spoiled

    def feed(self, text: str) -> None:
        at = 0
        while at < len(text) and not self._is_over:
            if self._is_escaped:
                self._is_escaped = False
                at += 1
                continue
            found = (_IN_STRING if self._in_string else _BETWEEN).search(text, at)
            if found is None:
                return
            at = found.end()
            self._take(found.group())
        if self._is_over and text[at:].strip():
            self._is_spoiled = True

    def _take(self, mark: str) -> None:
        if mark == '"':
            self._in_string = not self._in_string
        elif mark == "\\":
            self._is_escaped = True
        else:
            self._depth += 1 if mark in "{[" else -1
            self._is_over = self._depth <= 0
