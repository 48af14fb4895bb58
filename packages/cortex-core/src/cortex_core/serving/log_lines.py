"""Log lines that nobody outside can forge, stretch or pour out: escaped, cut, and so many a second of each kind.

A client's words go into lines: paths, names of models, what it got wrong. Here a record is one line, or begins one and
goes on in lines that are indented; and what is logged for each event at somebody's will is told by one line that counts
the others. Which requests have a line of their own: `RequestLines`.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping

MAX_WORDS = 2_000
"""Characters of one argument of a line."""
MAX_RECORD = 32_000
"""Characters of a record, its traceback included."""
MAX_KINDS = 1_000

BURST, PER_S = 100.0, 10.0
"""Lines of one kind, that is from one place in the code: at once, and a second from then on."""
REQUESTS_BURST, REQUESTS_PER_S = 500.0, 50.0
"""Lines of requests of one kind that nobody worked on."""
REPORT_S = 1.0

_INDENT = "\n    "

Later = Callable[[float, Callable[[], None]], None]
"""Call something after so many seconds, if there is a loop to do so; it need not."""

left_out: Counter[str] = Counter()
"""How many lines of this process were left out since its start: `lines`, and those of `requests`."""


def shown(text: str, limit: int = MAX_WORDS) -> str:
    """Somebody else's words in a line: printable (others as JSON escapes them) and at most about `limit` characters."""
    return _escaped(cut(text, limit))


def cut(text: str, limit: int) -> str:
    """At most so many characters, and how many there were."""
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


def printable(text: str) -> str:
    """Text of several lines without anything else that moves a terminal."""
    return "\n".join(map(_escaped, text.split("\n")))


def _escaped(line: str) -> str:
    if line.isprintable():
        return line
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in line)


def as_record(text: str) -> str:
    """What is one record of a log: only its first line begins at the left, and nothing in it moves a terminal."""
    if len(text) > MAX_RECORD:
        text = f"{text[: MAX_RECORD // 2]} ... ({len(text)} characters) ... {text[-MAX_RECORD // 2 :]}"
    return text if text.isprintable() else _INDENT.join(map(_escaped, text.split("\n")))


class LineFormatter(logging.Formatter):
    """Arguments of a record that are text are somebody's words, and its own line breaks are indented."""

    def format(self, record: logging.LogRecord) -> str:
        record.message = str(record.msg) % _arguments(record.args) if record.args else str(record.msg)
        if self.usesTime():
            record.asctime = self.formatTime(record, self.datefmt)
        parts = [self.formatMessage(record)]
        if record.exc_info and not record.exc_text:
            record.exc_text = self.formatException(record.exc_info)
        if record.exc_text:
            parts.append(record.exc_text)
        if record.stack_info:
            parts.append(self.formatStack(record.stack_info))
        return as_record("\n".join(parts))


def _arguments(arguments: object) -> object:
    if isinstance(arguments, tuple):
        return tuple(shown(value) if isinstance(value, str) else value for value in arguments)
    if isinstance(arguments, Mapping):
        return {key: shown(value) if isinstance(value, str) else value for key, value in arguments.items()}
    return arguments


class LineBudget:
    """A credit of lines that fills up with time. Pure: whoever spends says when."""

    __slots__ = ("_at", "_burst", "_credit", "_per_s", "num_left_out")

    def __init__(self, burst: float, per_s: float, now: float) -> None:
        self._burst = self._credit = burst
        self._per_s = per_s
        self._at = now
        self.num_left_out = 0

    def spend(self, now: float) -> bool:
        """Whether there may be another line; where not, it is counted."""
        self._credit = min(self._credit + max(now - self._at, 0.0) * self._per_s, self._burst)
        self._at = now
        if self._credit < 1:
            self.num_left_out += 1
            return False
        self._credit -= 1
        return True

    def told(self) -> int:
        """How many were left out since this was last asked."""
        num, self.num_left_out = self.num_left_out, 0
        return num


class LineLimit(logging.Filter):
    """A handler's filter: so many lines a second from one place in the code, and one that counts those left out.

    exempt: loggers that have a rule of their own. May be used by any thread.
    """

    def __init__(
        self,
        *,
        exempt: tuple[str, ...] = (),
        later: Later = lambda seconds, call: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self._exempt = frozenset((*exempt, __name__))
        self._later = later
        self._clock = clock
        self._lock = threading.Lock()
        self._kinds: dict[tuple[str, str, int], LineBudget] = {}
        self._reported_at = clock()
        self._is_due = False

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name in self._exempt:
            return True
        kind = (record.name, record.pathname, record.lineno)
        now = self._clock()
        with self._lock:
            budget = self._kinds.get(kind)
            if budget is None:
                if len(self._kinds) >= MAX_KINDS:
                    self._kinds.clear()
                budget = self._kinds[kind] = LineBudget(BURST, PER_S, now)
            is_admitted = budget.spend(now)
            if not is_admitted:
                left_out["lines"] += 1
            begins = not is_admitted and not self._is_due
            self._is_due = self._is_due or begins
            is_late = self._is_due and not begins and now - self._reported_at >= 2 * REPORT_S
        if begins:
            self._reported_at = now
            self._later(REPORT_S, self.report)
        elif is_late:  # where nothing calls later
            self.report()
        return is_admitted

    def report(self) -> None:
        """Say what was left out."""
        with self._lock:
            self._is_due = False
            self._reported_at = self._clock()
            told = [
                (name, path, line, num) for (name, path, line), budget in self._kinds.items() if (num := budget.told())
            ]
        for name, path, line, num in told:
            place = f"{path.rpartition('/')[2]}:{line}"
            logging.getLogger(__name__).warning("%s: %d more lines like those of %s", name, num, place)


class RequestLines:
    """Whether a request has a line of its own in a log where each has exactly one.

    Those that a model worked on always do. Of the others, refused or answered from what the server knows, so many a
    second of each kind; those beyond are one line together, which counts them.
    """

    def __init__(
        self, *, later: Later = lambda seconds, call: None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._later = later
        self._clock = clock
        self._kinds: dict[str, LineBudget] = {}
        self._is_due = False
        self._reported_at = clock()

    def admits(self, kind: str) -> bool:
        """kind: what the request came to, a status or the code of an error; of those there are few."""
        now = self._clock()
        budget = self._kinds.get(kind)
        if budget is None:
            if len(self._kinds) >= MAX_KINDS:
                self._kinds.clear()
            budget = self._kinds[kind] = LineBudget(REQUESTS_BURST, REQUESTS_PER_S, now)
        if budget.spend(now):
            if self._is_due and now - self._reported_at >= 2 * REPORT_S:
                self.report()
            return True
        left_out["requests"] += 1
        if not self._is_due:
            self._is_due = True
            self._reported_at = now
            self._later(REPORT_S, self.report)
        elif now - self._reported_at >= 2 * REPORT_S:
            self.report()
        return False

    def report(self) -> None:
        """Say what was left out."""
        self._is_due = False
        self._reported_at = self._clock()
        told = {kind: num for kind, budget in self._kinds.items() if (num := budget.told())}
        if told:
            kinds = ", ".join(f"{kind} x{num}" for kind, num in sorted(told.items(), key=lambda pair: -pair[1]))
            num = sum(told.values())
            logging.getLogger(__name__).warning("%d more requests that no model worked on: %s", num, kinds)


class Sparing:
    """Which of many lines of the same kind are written: each once a minute, and so many different ones at most."""

    def __init__(self, *, window_s: float = 60.0, max_lines: int = 10) -> None:
        self._window_s = window_s
        self._max_lines = max_lines
        self._lines: set[str] = set()
        self._began = float("-inf")
        self._num_held_back = 0

    def line(self, text: str, now: float) -> str | None:
        """The line to write, None for none. now: monotonic seconds."""
        if now - self._began >= self._window_s:
            self._began = now
            self._lines.clear()
        if text in self._lines or len(self._lines) >= self._max_lines:
            self._num_held_back += 1
            return None
        self._lines.add(text)
        held_back, self._num_held_back = self._num_held_back, 0
        return f"{text} ({held_back} more were not written)" if held_back else text
