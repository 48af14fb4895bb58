"""The refusal of a checkpoint, by whichever side reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

_NAMES_SHOWN = 8


class CheckpointError(Exception):
    """What a checkpoint's files say cannot be served. `file` is the file's name; `tensors` those concerned, if any.

    Names are what the files say; where they hold what is not printable, they show as Python escapes it. `kind` is that
    of the refusal, as clients see it, and `facts` what it comes with. is_named: the message has the tensors' names.
    """

    kind: ClassVar[str] = "bad_checkpoint"

    def __init__(
        self,
        message: str,
        *,
        file: str | None = None,
        tensors: Sequence[str] = (),
        facts: Mapping[str, Any] | None = None,
        is_named: bool = False,
    ) -> None:
        self.file = None if file is None else printable(file)
        self.tensors = tuple(tensors)
        self.facts = dict(facts or {})
        self.message = printable(message if is_named else with_names(message, self.tensors))
        super().__init__(self.message)


class NotSupported(CheckpointError):
    """A checkpoint that makes sense, and asks for what no layer here has."""

    kind = "unsupported_architecture"


class UnsupportedSharding(CheckpointError):
    """The model's sizes do not divide among the ranks; the message carries the numbers."""

    kind = "unsupported_parallelism"


class NotJson(CheckpointError):
    """A file that should be JSON and is not."""


def printable(text: str) -> str:
    """The text with line breaks, half characters and the like escaped."""
    return text if text.isprintable() else "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def with_names(message: str, names: Sequence[str]) -> str:
    """The message with the first of the names behind it, each cut to a length that a log line bears."""
    if not names:
        return message
    shown = ", ".join(name if len(name) <= 200 else f"{name[:200]}…" for name in names[:_NAMES_SHOWN])
    more = len(names) - _NAMES_SHOWN
    return f"{message}: {shown}" + (f" and {more} more" if more > 0 else "")
