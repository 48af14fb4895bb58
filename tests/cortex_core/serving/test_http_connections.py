"""Connections by HTTP: what the table hears of them, and their end."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress

import pytest
from cortex_core.serving import connection_table

from tests.cortex_core.serving.harness import FULL, OK, Served, serving, until

SLOW_BODY = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{"
ASK = b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"


async def test_O2_heads_that_do_not_end_and_idle_connections_have_a_deadline() -> None:
    async with serving(idle_s=60, head_s=0.3) as served:
        slow = await served.connect(b"GET / HTTP/1.1\r\nhost: x\r\nx-slow: ")
        kept = await served.connect()
        assert await served.ask(kept) == OK

        async def drip() -> None:
            while True:
                slow[1].write(b"x")
                await asyncio.sleep(0.05)  # a slow client

        dripping = asyncio.create_task(drip())
        async with asyncio.timeout(20):
            with suppress(ConnectionResetError):  # by what it goes on sending
                assert await slow[0].read() == b""
        dripping.cancel()
        assert (served.table.ended["head"], served.table.ended["idle"]) == (1, 0)
        assert await served.ask(kept) == OK, "who is idle has more time"


async def test_O2_a_request_that_takes_long_is_no_idle_connection() -> None:
    async with serving(idle_s=0.2, head_s=0.2) as served:
        served.gate.clear()
        asking = asyncio.create_task(served.ask())
        idle = await served.connect()
        assert await idle[0].read() == b""
        assert served.table.ended["idle"] == 1 and not asking.done()
        served.gate.set()
        assert await asking == OK


async def test_O2_bodies_that_do_not_come_keep_nobody_from_being_served() -> None:
    async with serving(limit=8) as served:
        served.gate.clear()
        whole = asyncio.create_task(served.ask())
        await until(lambda: served.at_work == 1)
        slow = []
        for number in range(30):
            slow.append(await served.connect(SLOW_BODY))
            await until(lambda number=number: served.num_asked == number + 2)
        asking = asyncio.create_task(served.ask())
        await until(lambda: served.num_asked == 32)
        assert served.table.ended["body"] == 24 and not asking.done()
        served.gate.set()
        assert await asking == OK and await whole == OK, "and who is at work is left alone"
        assert await slow[0][0].read() == b""


async def test_O2_a_client_that_does_not_read_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_table, "STALLED_S", 0.1)
    async with serving(limit=1) as served:
        served.answer = b"x" * 10_000_000
        deaf = socket.socket()
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.setblocking(False)
        await asyncio.get_running_loop().sock_connect(deaf, ("127.0.0.1", served.port))
        await asyncio.get_running_loop().sock_sendall(deaf, b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        await until(lambda: served.table.num_in("stalled") == 1)
        served.answer = b"ok"
        while (await (await served.connect(ASK))[0].read()).startswith(FULL):
            await asyncio.sleep(0.01)
        assert served.table.ended["unread"] == 1
        await until(lambda: served.at_work == 0)
        deaf.close()


async def test_the_end_closes_idle_connections_and_waits_for_those_at_work() -> None:
    async with serving() as served:
        idle = await served.connect()
        kept = await served.connect()
        await served.ask(kept)
        served.gate.clear()
        asking = asyncio.create_task(served.ask())
        await until(lambda: served.at_work == 1)
        served.stop.set()
        assert await idle[0].read() == b"" and await kept[0].read() == b""
        assert not asking.done()
        served.gate.set()
        assert await asking == OK
        await until(lambda: served.table.num_open == 0)
    assert served.table.ended == dict.fromkeys(served.table.ended, 0), "the end is no reason of the table's"


async def test_a_connection_that_its_client_closed_is_given_up_at_once(served: Served) -> None:
    for _ in range(20):
        connection = await served.connect()
        assert await served.ask(connection) == OK
        connection[1].close()
    await until(lambda: served.table.num_open == 0)
