"""References to secrets in place of secrets: `env:NAME` or `file:PATH`. A configuration of such can be shown."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import msgspec

from cortex_core.config import read_regular

REFERENCE = "^(env|file):.+$"
MAX_SECRET_BYTES = 64 * 2**10
"""Of a file with one secret."""
SecretReference = Annotated[str, msgspec.Meta(pattern=REFERENCE)]


def absolute(reference: str, folder: Path) -> str:
    """The reference with the path of a file taken relative to `folder`."""
    kind, _, place = reference.partition(":")
    return f"file:{folder / place}" if kind == "file" else reference


def resolve_secret(reference: str, environ: Mapping[str, str]) -> str:
    """The secret without white space around it. Raises `ValueError`, which names the place and never the content."""
    kind, _, place = reference.partition(":")
    if kind == "env":
        value = environ.get(place)
        if value is None:
            raise ValueError(f"the environment has no variable {place}")
    else:
        try:
            value = read_regular(place, limit=MAX_SECRET_BYTES).decode("utf-8")
        except OSError as exc:
            raise ValueError(f"{place} cannot be read: {exc.strerror}") from None
        except UnicodeDecodeError:
            raise ValueError(f"{place} is not text") from None
    value = value.strip()
    if not value or not value.isascii() or not value.isprintable():
        raise ValueError(f"{place} holds no single line of ASCII text")
    return value
