"""What others say in a log cannot be taken for the log's own words, has an end, and comes so many times a second."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator

import pytest
from cortex_core.serving import log_lines
from cortex_core.serving.log_lines import (
    BURST,
    MAX_RECORD,
    MAX_WORDS,
    PER_S,
    REQUESTS_BURST,
    REQUESTS_PER_S,
    LineFormatter,
    LineLimit,
    RequestLines,
    as_record,
    printable,
    shown,
)
from hypothesis import given
from hypothesis import strategies as st

FORGED = "x\n2026-01-01 00:00:00,000 INFO cortex: all is well\r\x1b[2J\x9b31m\u202e\u2028\x00"
anything = st.text(st.characters(codec=None), max_size=200)


def formatted(message: object, *arguments: object, exc_info: bool = False) -> str:
    import sys

    record = logging.LogRecord("n", logging.INFO, "p", 1, message, arguments, sys.exc_info() if exc_info else None)
    return LineFormatter("%(levelname)s %(name)s: %(message)s").format(record)


def test_O2_a_clients_words_are_one_line_that_moves_no_terminal() -> None:
    line = formatted("path=%s", FORGED)
    assert line.isprintable() and line.startswith("INFO n: path=x\\n2026-01-01") and "\\u001b[2J\\u009b31m" in line


@given(anything)
def test_O2_of_a_record_only_the_first_line_begins_at_the_left(text: str) -> None:
    for line in (formatted("said %s", text), formatted(text), formatted("%s", ValueError(text))):
        first, *rest = line.split("\n")
        assert first.startswith("INFO n: ")
        assert all(other.startswith("    ") for other in rest)
        assert all(each.isprintable() for each in (first, *rest))
        line.encode()


@given(anything)
def test_O2_what_is_escaped_in_json_is_still_that_json(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        return  # no JSON holds it
    line = json.dumps({"path": text}, ensure_ascii=False)
    assert json.loads(as_record(line)) == {"path": text}


def test_O2_words_and_records_have_an_end() -> None:
    assert len(shown("x" * 10_000_000)) < MAX_WORDS + 50
    assert len(formatted("%s %s", "x" * 10_000_000, ValueError("y" * 10_000_000))) < MAX_RECORD + 100
    assert "10000000 characters" in formatted("%s", "x" * 10_000_000)


def test_a_traceback_is_indented_and_complete() -> None:
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        lines = formatted("failed", exc_info=True).split("\n")
    assert lines[:2] == ["INFO n: failed", "    Traceback (most recent call last):"]
    assert lines[-2:] == ["    ValueError: first", "    second"]


def test_text_of_several_lines_keeps_them() -> None:
    assert printable("a\nb\x1b[2J\n") == "a\nb\\u001b[2J\n"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0
        self.due: list[tuple[float, Callable[[], None]]] = []

    def __call__(self) -> float:
        return self.now

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        self.due.append((self.now + seconds, call))

    def go(self, seconds: float) -> None:
        self.now += seconds
        ready = [call for at, call in self.due if at <= self.now]
        self.due = [(at, call) for at, call in self.due if at > self.now]
        for call in ready:
            call()


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def lines(clock: Clock) -> Iterator[Lines]:
    handler = Lines()
    handler.addFilter(LineLimit(exempt=("test.exempt",), later=clock.later, clock=clock))
    loggers = [logging.getLogger("test"), logging.getLogger(log_lines.__name__)]
    for logger in loggers:
        logger.addHandler(handler)
        logger.propagate = False
        logger.setLevel(logging.INFO)
    yield handler
    for logger in loggers:
        logger.removeHandler(handler)
        logger.propagate = True
        logger.setLevel(logging.NOTSET)


def test_O2_lines_from_one_place_are_so_many_a_second_and_the_others_are_counted(lines: Lines, clock: Clock) -> None:
    log = logging.getLogger("test")
    for number in range(5000):
        log.warning("noise %d", number)
        log.info("other %d", number) if number < 3 else None
    assert len([line for line in lines.said if line.startswith("noise")]) == BURST
    assert len([line for line in lines.said if line.startswith("other")]) == 3
    assert len(lines.said) == BURST + 3
    clock.go(1)
    assert len(lines.said) == BURST + 4
    assert "4900 more lines" in lines.said[-1] and "test_log_lines.py:" in lines.said[-1]
    for second in range(1, 11):
        for number in range(5000):
            log.warning("noise %d", number) if number % 2 else log.warning("more %d", number)
        clock.go(1)
        per_kind = PER_S + 1  # and the one that counts
        assert len(lines.said) <= 2 * BURST + 4 + second * 2 * per_kind


def test_O2_who_has_a_rule_of_its_own_is_not_limited(lines: Lines) -> None:
    for number in range(1000):
        logging.getLogger("test.exempt").info("%d", number)
    assert len(lines.said) == 1000


def test_O2_without_a_loop_the_count_comes_with_a_later_line(clock: Clock) -> None:
    handler, logger = Lines(), logging.getLogger("test.without")
    handler.addFilter(LineLimit(clock=clock))
    own = logging.getLogger(log_lines.__name__)
    for each in (logger, own):
        each.addHandler(handler)
    try:
        for _ in range(500):
            logger.warning("noise")
        clock.go(5)
        logger.warning("another")
        assert any("400 more lines" in line for line in handler.said)
    finally:
        for each in (logger, own):
            each.removeHandler(handler)


def test_O2_requests_that_nobody_worked_on_share_a_line_beyond_so_many(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    requests = RequestLines(later=clock.later, clock=clock)
    before = log_lines.left_out["requests"]
    assert sum(requests.admits("404") for _ in range(10_000)) == REQUESTS_BURST
    assert requests.admits("401"), "another kind is none of theirs"
    clock.go(1)
    (line,) = caplog.messages
    assert line == f"{10_000 - REQUESTS_BURST:.0f} more requests that no model worked on: 404 x9500"
    assert log_lines.left_out["requests"] - before == 9500
    assert sum(requests.admits("404") for _ in range(10_000)) == REQUESTS_PER_S
    clock.go(1)
    clock.go(60)
    assert len(caplog.messages) == 2, "nothing is told twice"
    assert sum(requests.admits("404") for _ in range(10_000)) == REQUESTS_BURST
