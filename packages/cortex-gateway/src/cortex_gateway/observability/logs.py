"""Set logging up for a gateway that runs as a process of its own."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from contextlib import suppress
from typing import TextIO

from cortex_core.serving.later import later
from cortex_core.serving.log_lines import LineFormatter, LineLimit

FLUSH_AFTER_S = 0.02


class GatheredHandler(logging.StreamHandler[TextIO]):
    """Lines of a busy moment are written together: a system call for each would cost as much as making the line.

    A line waits no longer than `FLUSH_AFTER_S`. A warning goes out at once, with what came before it, and so does
    everything where no event loop runs.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._lines: list[str] = []
        self._loop: asyncio.AbstractEventLoop | None = None  # in which a flush is due

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.append(self.format(record) + self.terminator)
            if record.levelno >= logging.WARNING or not self._flush_soon():
                self.flush()
        except Exception:
            self.handleError(record)

    def flush(self) -> None:
        self.acquire()
        try:
            lines, self._lines = self._lines, []
            if lines:
                self.stream.write("".join(lines))
            self.stream.flush()
        finally:
            self.release()

    def close(self) -> None:
        with suppress(OSError, ValueError):  # nobody reads any more; as `logging.shutdown` does
            self.flush()
        super().close()

    def _flush_soon(self) -> bool:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return False
        if self._loop is not loop:
            self._loop = loop
            loop.call_later(FLUSH_AFTER_S, self._flush_now)
        return True

    def _flush_now(self) -> None:
        self._loop = None
        try:
            self.flush()
        except (OSError, ValueError):  # whoever read them is gone, or the stream is closed
            if not self.stream.closed:
                self.handleError(logging.makeLogRecord({"msg": "log lines could not be written"}))


class SecondFormatter(LineFormatter):
    """Renders each second's time once."""

    _second = (-1, "")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        second = int(record.created)
        if self._second[0] != second:
            self._second = (second, time.strftime(self.default_time_format, self.converter(second)))
        return f"{self._second[1]},{int(record.msecs):03d}"


def configure_logging(level: str = "INFO") -> None:
    """Everything to stdout, one record a line: time, level, logger, text. Access lines are JSON after that prefix."""
    handler = GatheredHandler(sys.stdout)
    handler.setFormatter(SecondFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.addFilter(LineLimit(exempt=("cortex_gateway.access",), later=later))
    logging.basicConfig(level=level, handlers=[handler], force=True)
