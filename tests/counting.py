"""What a piece of work takes, counted: steps of Python, characters copied or searched, bytes held. Never seconds.

Growth is told by comparing the work for n with that for 2n: `assert_linear`.
"""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable
from types import FrameType
from typing import Any

MAX_RATIO = 2.3
"""Of the work for 2n to that for n, where it is linear."""


def steps(work: Callable[[], object]) -> int:
    """Lines of Python that `work` runs, and calls it makes, of built-in functions too."""
    count = 0

    def on_line(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        count += 1
        return on_line

    def on_call(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "c_call"

    tracer, profiler = sys.gettrace(), sys.getprofile()
    sys.settrace(on_line)
    sys.setprofile(on_call)
    try:
        work()
    finally:
        sys.settrace(tracer)
        sys.setprofile(profiler)
    return count


def peak_bytes(work: Callable[[], object]) -> int:
    """The most memory that Python objects of `work` take at once."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        work()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


class Copied:
    """How many characters `CountedText`s had to copy or to look at."""

    def __init__(self) -> None:
        self.count = 0

    def text(self, value: str) -> CountedText:
        made = CountedText(value)
        made.copied = self
        return made


class CountedText(str):
    """Text that notes what is done with it, and whose parts do the same. `"".join` makes plain text of it."""

    copied: Copied

    def _note(self, count: int) -> None:
        self.copied.count += count

    def _part(self, value: str) -> CountedText:
        self._note(len(value))
        return self.copied.text(value)

    def __add__(self, other: str) -> CountedText:
        return self._part(str.__add__(self, other))

    def __radd__(self, other: str) -> CountedText:
        return self._part(str.__add__(other, self))

    def __getitem__(self, key: Any) -> CountedText:  # type: ignore[override]
        return self._part(str.__getitem__(self, key))

    def find(self, sub: str, start: int = 0, end: int | None = None) -> int:  # type: ignore[override]
        at = str.find(self, sub, start, len(self) if end is None else end)
        self._note((len(self) if at < 0 else at) - start)
        return at

    def strip(self, chars: str | None = None) -> CountedText:  # type: ignore[override]
        self._note(len(self))
        return self.copied.text(str.strip(self, chars))

    def lstrip(self, chars: str | None = None) -> CountedText:  # type: ignore[override]
        self._note(len(self))
        return self.copied.text(str.lstrip(self, chars))

    def rstrip(self, chars: str | None = None) -> CountedText:  # type: ignore[override]
        self._note(len(self))
        return self.copied.text(str.rstrip(self, chars))


def copied(work: Callable[[Callable[[str], str]], object]) -> int:
    """Characters that `work` copies and searches of the texts that it makes with the function that it is given."""
    counter = Copied()
    work(counter.text)
    return counter.count


def assert_linear(measure: Callable[[int], int], n: int) -> None:
    """measure: what the work on a thing of size n takes."""
    once, twice = measure(n), measure(2 * n)
    assert once > 0
    assert twice / once <= MAX_RATIO, f"{once} for {n}, {twice} for {2 * n}"
