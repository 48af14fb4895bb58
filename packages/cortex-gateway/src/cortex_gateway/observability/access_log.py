"""One line of JSON per request, whatever became of it."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from cortex_core.serving.later import later
from cortex_core.serving.log_lines import RequestLines, as_record, cut

logger = logging.getLogger("cortex_gateway.access")

KEPT_LINES = 1000
MAX_WORDS, MAX_ERROR = 256, 1000
"""Characters of a field that holds a client's words, and of what went wrong."""
MAX_LISTED = 16
MAX_LINE = 2000
"""Bytes of a line that is not looked at more closely."""

_encode = msgspec.json.Encoder().encode


class AccessRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """Fields that do not apply are left out. Times are milliseconds; `status` 499 is a client that hung up.
    `key` and `account` are ids, never secrets. `dropped`: filters that took something out of a translated prompt.
    `attempts`: times it was sent to a node; `resumes`: times another node went on with its stream; `mixed`: one
    that serves the model otherwise, or does not say how. `finish`: why each
    choice ended. `trace_id`: of its W3C trace. `at`: when it ended, in seconds since 1970.

    `outcome`: ok, rejected (an error of the gateway's own), upstream_error (an error of the neuron's, passed on),
    upstream_failed (no or no usable answer), timeout, client_gone, shutdown, error (a fault of the gateway).
    """

    id: str
    method: str
    path: str
    status: int
    outcome: str
    duration_ms: float
    model: str | None = None
    resolved: str | None = None
    node: str | None = None
    route: str | None = None
    translated: str | None = None
    dropped: tuple[str, ...] = ()
    stream: bool = False
    attempts: int = 0
    resumes: int = 0
    mixed: bool = False
    ttft_ms: float | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    finish: tuple[str, ...] = ()
    client: str | None = None
    key: str | None = None
    account: str | None = None
    trace_id: str | None = None
    error: str | None = None
    at: float | None = None


def _cut(record: AccessRecord) -> AccessRecord:
    """With no more of a client's words than help to find what it did."""
    fields = msgspec.structs.asdict(record)
    return AccessRecord(
        **{name: _words(value, MAX_ERROR if name == "error" else MAX_WORDS) for name, value in fields.items()}
    )


def _words(value: Any, limit: int) -> Any:
    if isinstance(value, str):
        return cut(value, limit)
    return tuple(cut(each, limit) for each in value[:MAX_LISTED]) if isinstance(value, tuple) else value


class AccessLog:
    """Writes the lines to the log, and keeps the last ones for whoever asks (`cortex logs`)."""

    def __init__(self, *, kept_lines: int = KEPT_LINES) -> None:
        self._own = RequestLines(later=later)
        self._lines: deque[bytes] = deque(maxlen=kept_lines)
        self.num_written = 0
        self._news: asyncio.Future[None] | None = None

    def write(self, record: AccessRecord, level: int = logging.INFO) -> None:
        """Levels below INFO are for the log alone: probes and polls would push everything else out."""
        if level < logging.INFO and not logger.isEnabledFor(level):
            return
        if record.attempts == 0 and not self._own.admits(str(record.status)):
            return
        line = _encode(record)
        if len(line) > MAX_LINE:
            line = _encode(_cut(record))
        if not line.isascii():  # what is not printable is escaped, here as in a log: the line remains JSON
            line = as_record(line.decode()).encode()
        if logger.isEnabledFor(level):
            # Not `logger.log`: it walks the stack to find its caller, which costs as much as all the rest.
            logger.handle(logging.LogRecord(logger.name, level, "", 0, line.decode(), None, None))
        if level >= logging.INFO:
            self._lines.append(line)
            self.num_written += 1
            if self._news is not None:
                self._news.set_result(None)
                self._news = None

    def last(self, count: int) -> list[bytes]:
        """The last lines that are kept, oldest first."""
        return list(self._lines)[-count:] if count > 0 else []

    async def follow(self, seen: int) -> AsyncIterator[bytes]:
        """Every line after the first `seen` that were written. A reader that falls far behind misses the oldest."""
        while True:
            missed = self.num_written - seen
            seen = self.num_written
            for line in self.last(missed):
                yield line
            if self.num_written == seen:
                if self._news is None:
                    self._news = asyncio.get_running_loop().create_future()
                await asyncio.shield(self._news)
