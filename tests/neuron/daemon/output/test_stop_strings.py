from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st
from neuron.daemon.output.stop_strings import StopStringFilter, StopStrings

LETTERS = st.text(alphabet="ab\nü", max_size=24)
STOPS = st.lists(st.text(alphabet="ab\nü", min_size=1, max_size=5), max_size=4).map(tuple)


def reference(text: str, stops: tuple[str, ...]) -> tuple[str, str | None]:
    """One character after the other: the first moment at which the text ends with a stop string."""
    for end in range(1, len(text) + 1):
        matching = [stop for stop in stops if text[:end].endswith(stop)]
        if matching:
            longest = max(matching, key=len)
            return text[: end - len(longest)], longest
    return text, None


def cut(text: str, borders: list[int]) -> list[str]:
    edges = sorted({0, len(text), *(border % (len(text) + 1) for border in borders)})
    return [text[start:end] for start, end in pairwise(edges)]


@settings(max_examples=300, deadline=None)
@given(LETTERS, STOPS, st.lists(st.integers(0, 100), max_size=12))
def test_any_chunking_equals_the_reference(text: str, stops: tuple[str, ...], borders: list[int]) -> None:
    stream = StopStringFilter(StopStrings(stops))
    shown = "".join(stream.feed(piece) for piece in cut(text, borders))
    matched = stream.matched
    if matched is None:
        shown += stream.flush()
    assert (shown, matched) == reference(text, stops)


def test_only_what_may_become_a_match_is_held_back() -> None:
    stream = StopStringFilter(StopStrings(("\n\nUser:",)))
    assert stream.feed("hello") == "hello"
    assert stream.feed(" you\n") == " you"
    assert stream.feed("\nUse") == ""
    assert stream.feed("ful") == "\n\nUseful"
    assert stream.feed("\n\nUser") == ""
    assert stream.feed(": x") == ""
    assert stream.matched == "\n\nUser:"


def test_empty_stop_strings_mean_nothing() -> None:
    assert not StopStrings(("", ""))
    assert StopStringFilter(StopStrings(("",))).feed("abc") == "abc"
