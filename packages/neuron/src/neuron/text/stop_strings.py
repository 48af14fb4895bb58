"""Stop strings across token borders.

Semantics, independent of how the text is cut into pieces: the match that *ends* first stops the output; of two
that end at the same character the one that starts first. The output ends before the match. Text that might still
become a match is held back, and only that.
"""

from __future__ import annotations


class StopStrings:
    """An immutable set of stop strings; empty ones are ignored."""

    __slots__ = ("_longest_prefix", "_prefixes", "strings")

    def __init__(self, strings: tuple[str, ...]) -> None:
        self.strings = tuple(dict.fromkeys(s for s in strings if s))
        self._prefixes = frozenset(s[:length] for s in self.strings for length in range(1, len(s)))
        self._longest_prefix = max((len(s) - 1 for s in self.strings), default=0)

    def __bool__(self) -> bool:
        return bool(self.strings)

    def find(self, text: str) -> tuple[int, str] | None:
        """Where the first match starts and which string it is, or None."""
        best: tuple[int, int, str] | None = None
        for string in self.strings:
            start = text.find(string)
            if start >= 0:
                candidate = (start + len(string), start, string)
                if best is None or candidate < best:
                    best = candidate
        return None if best is None else (best[1], best[2])

    def partial(self, text: str) -> int:
        """Length of the longest end of `text` that could be the beginning of a match."""
        for length in range(min(self._longest_prefix, len(text)), 0, -1):
            if text[-length:] in self._prefixes:
                return length
        return 0


class StopStringFilter:
    """One stream through `StopStrings`: `feed` returns what may be shown, `matched` is set once."""

    __slots__ = ("_held", "_stops", "matched")

    def __init__(self, stops: StopStrings) -> None:
        self._stops = stops
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        if self.matched is not None:
            return ""
        text = self._held + text
        found = self._stops.find(text)
        if found is not None:
            self.matched = found[1]
            self._held = ""
            return text[: found[0]]
        cut = len(text) - self._stops.partial(text)
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """End of the stream: what was held back was no match."""
        held, self._held = self._held, ""
        return held
