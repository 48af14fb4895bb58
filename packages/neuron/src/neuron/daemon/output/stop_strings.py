"""Strings that are looked for in a text that comes in pieces, across their borders.

Semantics, independent of how the text is cut: the match that *ends* first counts; of two that end at the same character
the one that starts first. Text that might still become a match has to be held back, and only that.

All strings are looked for at once, by an automaton (Aho and Corasick 1975, "Efficient string matching"): its size is
that of the strings together, and each character of the text is looked at once, whatever they are.
"""

from __future__ import annotations

import re
from array import array
from weakref import WeakValueDictionary

_CHARACTER_BITS = 21
_NONE = -1


class StopStrings:
    """An immutable set of strings; empty ones are ignored.

    State 0 is the beginning, every other one a prefix of a string; `transitions` maps (state, character) to the state
    that is one character longer.
    """

    __slots__ = ("__weakref__", "_depths", "_failures", "_first", "_matches", "_transitions", "strings")

    def __init__(self, strings: tuple[str, ...]) -> None:
        self.strings = tuple(dict.fromkeys(s for s in strings if s))
        self._transitions: dict[int, int] = {}
        self._depths = array("i", [0])
        self._matches = array("i", [_NONE])
        parents, characters = array("i", [0]), array("i", [0])
        for number, string in enumerate(self.strings):
            state = 0
            for character in map(ord, string):
                key = state << _CHARACTER_BITS | character
                following = self._transitions.get(key)
                if following is None:
                    following = self._transitions[key] = len(parents)
                    parents.append(state)
                    characters.append(character)
                    self._depths.append(self._depths[state] + 1)
                    self._matches.append(_NONE)
                state = following
            self._matches[state] = number
        self._failures = array("i", [0]) * len(parents)
        for state in sorted(range(1, len(parents)), key=self._depths.__getitem__):
            failure = self._failures[parents[state]]
            if parents[state]:
                failure = self._next(failure, characters[state])
            self._failures[state] = failure
            if self._matches[state] == _NONE:
                self._matches[state] = self._matches[failure]
        first = "".join(re.escape(string[0]) for string in self.strings)
        self._first = re.compile(f"[{first}]" if first else r"(?!)")

    @classmethod
    def shared(cls, strings: tuple[str, ...]) -> StopStrings:
        """The one that other choices of a request have, as long as one of them is there."""
        found = _shared.get(strings)
        if found is None:
            found = _shared[strings] = cls(strings)
        return found

    def __bool__(self) -> bool:
        return bool(self.strings)

    @property
    def num_states(self) -> int:
        return len(self._depths)

    def _next(self, state: int, character: int) -> int:
        transitions = self._transitions
        while (following := transitions.get(state << _CHARACTER_BITS | character)) is None:
            if not state:
                return 0
            state = self._failures[state]
        return following


_shared: WeakValueDictionary[tuple[str, ...], StopStrings] = WeakValueDictionary()


class StopMatcher:
    """Where one text stands among the strings."""

    __slots__ = ("_state", "_stops")

    def __init__(self, stops: StopStrings) -> None:
        self._stops = stops
        self._state = 0

    @property
    def num_held(self) -> int:
        """Length of the longest end of the text so far that could be the beginning of a match."""
        return self._stops._depths[self._state]

    def reset(self) -> None:
        """No match continues over this point."""
        self._state = 0

    def find(self, text: str, start: int = 0) -> tuple[int, str] | None:
        """Go on with `text` from `start`. Returns where the first match ends in it, and which string it is; then begins
        anew. None where all of `text` has been used up."""
        stops = self._stops
        state = self._state
        if not state:
            begin = stops._first.search(text, start)
            if begin is None:
                return None
            start = begin.start()
        matches, follow = stops._matches, stops._next
        for index in range(start, len(text)):
            state = follow(state, ord(text[index]))
            if matches[state] != _NONE:
                self._state = 0
                return index + 1, stops.strings[matches[state]]
        self._state = state
        return None


class StopStringFilter:
    """One stream through `StopStrings`: `feed` returns what may be shown, `matched` is set once."""

    __slots__ = ("_held", "_matcher", "matched")

    def __init__(self, stops: StopStrings) -> None:
        self._matcher = StopMatcher(stops)
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        if self.matched is not None:
            return ""
        found = self._matcher.find(text)
        if found is not None:
            end, self.matched = found
            text = self._held + text[:end]
            self._held = ""
            return text[: len(text) - len(self.matched)]
        text = self._held + text
        cut = len(text) - self._matcher.num_held
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """End of the stream: what was held back was no match."""
        held, self._held = self._held, ""
        return held
