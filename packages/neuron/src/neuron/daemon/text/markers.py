"""Markers that a model writes around its reasoning and its tool calls.

A marker that is one entry of the vocabulary is recognised by its token id: exact, free, and text that merely spells
it does not count. A marker that the chat template uses but the vocabulary lacks is recognised in the text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

REASONING_MARKERS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
)
TOOL_CALL_MARKERS = ("<tool_call>", "</tool_call>")


class Vocabulary(Protocol):
    """A tokenizer, as far as markers need it."""

    def token_id(self, token: str) -> int | None:
        """Id of a token by its exact text, None if it is not one entry."""
        ...


@dataclass(frozen=True, slots=True)
class MarkerPair:
    """`open_id` and `close_id` are both set, or both None when the pair has to be found in the text."""

    open: str
    close: str
    open_id: int | None = None
    close_id: int | None = None

    @property
    def in_vocabulary(self) -> bool:
        return self.open_id is not None


def find_pair(vocabulary: Vocabulary, open_text: str, close_text: str) -> MarkerPair | None:
    """The pair as vocabulary entries, None unless both exist."""
    open_id, close_id = vocabulary.token_id(open_text), vocabulary.token_id(close_text)
    if open_id is None or close_id is None:
        return None
    return MarkerPair(open_text, close_text, open_id, close_id)


def reasoning_markers(vocabulary: Vocabulary, template_source: str) -> MarkerPair | None:
    """The first known pair in the vocabulary, else the first that the template writes, else None."""
    for open_text, close_text in REASONING_MARKERS:
        pair = find_pair(vocabulary, open_text, close_text)
        if pair is not None:
            return pair
    for open_text, close_text in REASONING_MARKERS:
        if open_text in template_source or close_text in template_source:
            return MarkerPair(open_text, close_text)
    return None


def tool_call_markers(vocabulary: Vocabulary) -> MarkerPair:
    """Every model is taught, or forced by grammar, to use the one pair; as text where it is not in the vocabulary."""
    return find_pair(vocabulary, *TOOL_CALL_MARKERS) or MarkerPair(*TOOL_CALL_MARKERS)
