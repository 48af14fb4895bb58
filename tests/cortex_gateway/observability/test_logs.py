"""Where log lines are written, and when."""

from __future__ import annotations

import asyncio
import io
import logging
import threading
from collections.abc import Iterator

import pytest
from cortex_gateway.observability.logs import GatheredHandler, SecondFormatter


class Stream(io.StringIO):
    """Counts writes."""

    def __init__(self) -> None:
        super().__init__()
        self.num_writes = 0
        self.written = asyncio.Event()

    def write(self, text: str) -> int:
        self.num_writes += 1
        self.written.set()
        return super().write(text)


@pytest.fixture
def stream() -> Stream:
    return Stream()


@pytest.fixture
def log(stream: Stream) -> Iterator[logging.Logger]:
    logger = logging.getLogger("test_logs")
    handler = GatheredHandler(stream)
    handler.setFormatter(SecondFormatter("%(message)s"))
    logger.propagate = False
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield logger
    logger.removeHandler(handler)


async def test_lines_of_one_moment_are_one_write_in_their_order(log: logging.Logger, stream: Stream) -> None:
    for round_ in range(2):
        stream.written.clear()
        for number in range(100):
            log.info("%d.%d", round_, number)
        assert stream.num_writes == round_
        async with asyncio.timeout(10):
            await stream.written.wait()
    assert stream.num_writes == 2
    assert stream.getvalue().split() == [f"{round_}.{number}" for round_ in range(2) for number in range(100)]


async def test_a_warning_goes_out_at_once_with_what_came_before_it(log: logging.Logger, stream: Stream) -> None:
    log.info("before")
    log.warning("now")
    assert stream.getvalue() == "before\nnow\n"


async def test_a_thread_without_a_loop_writes_at_once(log: logging.Logger, stream: Stream) -> None:
    log.info("before")
    thread = threading.Thread(target=log.info, args=("there",))
    thread.start()
    thread.join()
    assert stream.getvalue() == "before\nthere\n"


def test_without_a_loop_nothing_waits(log: logging.Logger, stream: Stream) -> None:
    async def inside() -> None:
        log.info("in the loop")

    asyncio.run(inside())  # ended before the line was due
    log.info("after it")
    assert stream.getvalue() == "in the loop\nafter it\n"


def test_the_end_of_the_process_writes_what_is_left(log: logging.Logger, stream: Stream) -> None:
    async def inside() -> None:
        log.info("last")

    asyncio.run(inside())
    logging.shutdown()
    assert stream.getvalue() == "last\n"


@pytest.mark.parametrize("created", [0.0, 1760000000.0, 1760000000.9994, 1760000001.25, 1784628000.5])
def test_the_time_is_as_logging_writes_it(created: float) -> None:
    ours, theirs = SecondFormatter("%(asctime)s"), logging.Formatter("%(asctime)s")
    record = logging.makeLogRecord({"created": created, "msecs": int((created - int(created)) * 1000) + 0.0})
    for _ in range(2):
        assert ours.format(record) == theirs.format(record)
