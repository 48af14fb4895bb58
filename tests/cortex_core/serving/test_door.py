"""Connections on real sockets: more than there is room for, or descriptors for, and ones that only wait."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from pathlib import Path

import pytest
from cortex_core.serving import door
from cortex_core.serving.door import CLOSED_AT_ONCE, PAUSE_S

from tests.cortex_core.serving.harness import FULL, OK, Served, serving, until


async def test_O2_idle_connections_beyond_the_bound_cost_the_oldest_and_nobody_else() -> None:
    async with serving(limit=10) as served:
        kept = [await served.connect() for _ in range(40)]
        assert await served.ask() == OK
        await until(lambda: served.table.ended["room"] == 31)
        assert served.table.num_open == 10
        for reader, _ in kept[:30]:
            assert await reader.read() == b""
        assert await served.ask(kept[-1]) == OK, "the youngest are still there"


@pytest.mark.parametrize("num_at_once", [20, 200])
async def test_O2_connections_that_come_all_at_once_leave_no_descriptor(num_at_once: int) -> None:
    """Most of them have to go before anybody has begun to speak with them."""
    async with serving(limit=4) as served:
        assert await served.ask() == OK
        before = num_descriptors()
        clients = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(num_at_once)]
        assert await served.ask() == OK
        await until(lambda: served.table.num_accepted == num_at_once + 2)
        for client in clients:
            client.close()
        await until(lambda: num_descriptors() <= before + 1)
        assert served.table.num_open <= 4


def num_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_O2_a_connection_at_work_is_not_closed_for_another(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(limit=3) as served:
        served.gate.clear()
        asking = [asyncio.create_task(served.ask()) for _ in range(3)]
        await until(lambda: served.at_work == 3)
        for _ in range(50):
            reader, writer = await served.connect(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(FULL)
            assert b"connections_full" in await reader.read()
            writer.close()
        assert served.table.ended["refused"] == 50
        served.gate.set()
        assert [await task for task in asking] == [OK] * 3
        assert await served.ask() == OK, "there is room again"
        await until(lambda: "refused" in caplog.text)
        lines = [line for line in caplog.messages if "refused" in line]
        assert len(lines) <= 3, "one a second, not one for each"


async def test_O2_without_descriptors_accepting_pauses_and_idle_connections_go(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    idle = [await served.connect() for _ in range(40)]
    await until(lambda: served.table.num_open == 40)
    num_tried = 0
    accept = socket.socket.accept

    def fail(listener: socket.socket) -> tuple[socket.socket, object]:
        nonlocal num_tried
        num_tried += 1
        if served.table.num_open > 10:
            raise OSError(errno.EMFILE, "Too many open files")
        return accept(listener)

    monkeypatch.setattr(socket.socket, "accept", fail)
    loop = asyncio.get_running_loop()
    began = loop.time()
    assert await served.ask() == OK
    assert num_tried <= (loop.time() - began) / PAUSE_S + 3, "each try is followed by a pause"
    assert await idle[0][0].read() == b""
    await until(lambda: "Too many open files" in caplog.text)


async def test_O2_an_accept_that_fails_for_good_does_not_spin(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    num_tried = 0

    def fail(listener: socket.socket) -> None:
        nonlocal num_tried
        num_tried += 1
        raise OSError(errno.ENFILE, "Too many open files in system")

    monkeypatch.setattr(door, "PAUSE_S", 0.01)
    with monkeypatch.context() as broken:
        broken.setattr(socket.socket, "accept", fail)
        asking = asyncio.create_task(served.ask())
        await until(lambda: num_tried >= 20)
        assert not asking.done()
        assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) <= 2
    assert await asking == OK


async def test_O2_many_that_are_overdue_are_closed_some_in_a_turn_of_the_loop() -> None:
    """All at once they are a stall: 0.15 s for a thousand."""
    async with serving(limit=1000) as served:
        connections = [await served.connect() for _ in range(3 * CLOSED_AT_ONCE)]
        await until(lambda: served.table.num_open == len(connections))
        served.table.idle_s = 0.001
        before, most = 0, 0
        async with asyncio.timeout(30):
            while served.table.num_open:
                await asyncio.sleep(0)
                ended = served.table.ended["idle"]
                before, most = ended, max(most, ended - before)
        assert most == CLOSED_AT_ONCE


async def test_a_fault_on_a_connection_is_one_line_and_nobody_elses(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from cortex_core.serving.http_connections import HttpConnection

    with monkeypatch.context() as broken:

        async def fail(_: HttpConnection) -> None:
            raise RuntimeError("no protocol")

        broken.setattr(HttpConnection, "_read_data", fail)
        reader, _ = await served.connect()
        assert await reader.read() == b""
    assert len([record for record in caplog.records if "connection failed" in record.message]) == 1
    assert await served.ask() == OK
    assert served.table.num_open == 1
