"""The fixed questions about cortex: one answer each, and patterns that expand into many ways of asking.

A pattern lists alternatives as `[a|b|]`. `HELD_OUT` patterns are never trained on; they only appear in evaluation.
"""

from __future__ import annotations

import itertools
import re
from typing import NamedTuple

from .phrases import phrases_file


class Fact(NamedTuple):
    """An answer, the patterns it is trained on and the patterns kept for evaluation."""

    answer: str
    trained: tuple[str, ...]
    held_out: tuple[str, ...]


FACTS = tuple(Fact(fact["answer"], tuple(fact["trained"]), tuple(fact["held_out"])) for fact in phrases_file()["facts"])


def expand(pattern: str) -> list[str]:
    """Return every question that a pattern with `[a|b]` alternatives stands for."""
    parts = re.split(r"\[([^\]]*)\]", pattern)
    choices = [part.split("|") if index % 2 else [part] for index, part in enumerate(parts)]
    return [" ".join("".join(choice).split()) for choice in itertools.product(*choices)]


class Wording(NamedTuple):
    """A question, and how many others its pattern stands for."""

    text: str
    num_siblings: int


def _wordings(pattern: str) -> list[Wording]:
    texts = expand(pattern)
    return [Wording(text, len(texts) - 1) for text in texts]


WORDINGS = tuple(tuple(wording for pattern in fact.trained for wording in _wordings(pattern)) for fact in FACTS)
QUESTIONS = frozenset(wording.text for wordings in WORDINGS for wording in wordings)
