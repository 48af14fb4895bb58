"""Access to `phrases.toml`, the words and patterns that the synthetic dialogues are made of."""

from __future__ import annotations

import functools
import tomllib
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("phrases.toml")


@functools.cache
def phrases_file() -> dict[str, Any]:
    """Return the whole file."""
    return tomllib.loads(FILE.read_text(encoding="utf-8"))


def phrases(name: str) -> tuple[str, ...]:
    """Return one list of the file, in its order."""
    return tuple(phrases_file()[name])
