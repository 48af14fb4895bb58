"""Ordinary text that every Python installation carries: the standard library's prose and sources, and our licence.

The tokenizer learns from it, and the dialogue corpus takes its filler and its word list from it, so that the model
can be rebuilt without downloading anything.
"""

from __future__ import annotations

import ast
import collections
import functools
import pydoc_data.topics
import re
import sysconfig
from pathlib import Path

LICENCE = Path(__file__).parents[1] / "LICENSE"
COMMON = 8  # times a word must occur: a short training learns the letters of two thousand words, not of five
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "pydoc_data"}


@functools.cache
def source_files() -> tuple[str, ...]:
    """Return the texts of the standard library's modules, in path order, without its own tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.intersection(relative.parts) or len(relative.parts) > 3 or "encodings" in relative.parts:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.isascii() and len(text) < 200_000:
            texts.append(text)
    return tuple(texts)


def _docstrings(source: str) -> list[str]:
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return [text for text in found if text and len(text) > 80]


@functools.cache
def prose() -> tuple[str, ...]:
    """Return English paragraphs: the language reference, docstrings and the licence text."""
    texts = list(pydoc_data.topics.topics.values())
    texts.append(LICENCE.read_text(encoding="utf-8"))
    for source in source_files():
        texts.extend(_docstrings(source))
    paragraphs = []
    for text in texts:
        paragraphs.extend(part.strip("\n") for part in re.split(r"\n\s*\n", text) if len(part.strip()) > 60)
    return tuple(paragraphs)


@functools.cache
def words() -> tuple[str, ...]:
    """Return lower-case words of 2 to 12 letters that are common in the prose, sorted."""
    counts: collections.Counter[str] = collections.Counter()
    for paragraph in prose():
        counts.update(re.findall(r"(?<![A-Za-z_])[a-z]{2,12}(?![A-Za-z_])", paragraph))
    return tuple(sorted(word for word, count in counts.items() if count >= COMMON))


@functools.cache
def known_words() -> frozenset[str]:
    """The words as a set, in lower case."""
    return frozenset(word.lower() for word in words())
