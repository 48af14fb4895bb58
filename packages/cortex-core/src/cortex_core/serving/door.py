"""Accepting the connections of one listener: as many as there is room for, without spinning where there is none.

asyncio's own accept loop has no bound. Out of descriptors it fails again and again, one log line each time (uvloop's is
silent and stops answering). Here a connection too many makes the oldest idle one go; where all are at work it is
answered with a 503 and closed; and where the host has no descriptor left, accepting pauses. What was done is one line a
second at most.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from cortex_core.serving.connection_table import Connection, ConnectionTable, Reason, client_of

logger = logging.getLogger(__name__)

ACCEPTED_AT_ONCE = 32
"""Before others of the event loop have their turn."""
PAUSE_S = 0.1
"""How long nothing is accepted when a descriptor could not be had."""
CLOSED_IN_A_PAUSE = 16
SWEEP_S = 1.0
"""Between looks at what is overdue, and between lines of log."""
CLOSED_AT_ONCE, CLOSING_S = 64, 0.02
"""Of those that are overdue, and until more of them are: each is some tenths of a millisecond of the event loop's."""
REFUSED_AT_ONCE = 16
LINGER_S = 1.0
"""How long refused connections stay open, those many at most, so that their clients read the answer before its end."""

_NO_ROOM = (
    b'{"type":"error","error":{"type":"overloaded_error","code":"connections_full",'
    b'"message":"The server has no room for another connection: all it has are at work."}}'
)
REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\ncontent-length: %d\r\nretry-after: 1\r\n"
    b"connection: close\r\n\r\n%b" % (len(_NO_ROOM), _NO_ROOM)
)

Speak = Callable[[asyncio.StreamReader, asyncio.StreamWriter, Connection], Awaitable[None]]

_TOLD: tuple[tuple[Reason, str], ...] = (
    ("room", "%d idle ones closed to make room"),
    ("body", "%d closed in the middle of a body to make room"),
    ("unread", "%d closed whose clients do not read"),
    ("refused", "%d refused, as all others are at work"),
    ("head", "%d closed in a head that did not end"),
    ("flood", "%d ended for a flood of HTTP/2 control frames"),
)


class Door:
    """speak: talks with one client until its connection ends; what it raises is logged. The listener stays the
    caller's, who closes it. name: of it in the log."""

    def __init__(self, listener: socket.socket, table: ConnectionTable, speak: Speak, *, name: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        self._table = table
        self._speak = speak
        self._name = name
        self._tasks: set[asyncio.Task[None]] = set()
        self._refused: deque[socket.socket] = deque()
        self._is_open = False
        self._resuming: asyncio.TimerHandle | None = None
        self._sweeping: asyncio.TimerHandle | None = None
        self._told: dict[Reason, int] = dict(table.ended)
        self._told_at = -SWEEP_S
        self._failures: list[OSError] = []

    def open(self) -> None:
        self._listener.setblocking(False)
        self._is_open = True
        self._loop.add_reader(self._listener, self._accept)
        self._sweep()

    def close(self) -> None:
        """Accept no more. Connections go on."""
        if self._is_open:
            self._is_open = False
            if self._resuming is None:
                self._loop.remove_reader(self._listener)
            else:
                self._resuming.cancel()

    async def ended(self, timeout_s: float) -> None:
        """Wait for every connection to end; those that have not by then are cut."""
        try:
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=timeout_s)
        finally:
            for task in self._tasks:
                task.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=1)
            if self._sweeping is not None:
                self._sweeping.cancel()
            while self._refused:
                self._refused.popleft().close()

    # ------------------------------------------------------------------ accepting

    def _accept(self) -> None:
        for _ in range(ACCEPTED_AT_ONCE):
            try:
                client, address = self._listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionAbortedError:
                continue
            except OSError as exc:  # EMFILE, ENFILE, ENOBUFS, ENOMEM, or what the network says
                self._pause(exc)
                return
            client.setblocking(False)
            self._take(client, address)

    def _take(self, client: socket.socket, address: Any) -> None:
        accepted = _Accepted(client)
        connection = self._table.admit(client_of(address), accepted.cut)
        if connection is None:
            self._refuse(client)
            return
        task = self._loop.create_task(self._serve(accepted, connection))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, accepted: _Accepted, connection: Connection) -> None:
        reader = asyncio.StreamReader(loop=self._loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=self._loop)
        try:
            if accepted.is_cut:
                return
            transport, _ = await self._loop.connect_accepted_socket(lambda: protocol, accepted.socket)
            accepted.begin(transport)
            await self._speak(reader, asyncio.StreamWriter(transport, protocol, reader, self._loop), connection)
        except OSError:
            pass  # the client has gone
        except Exception:
            logger.exception("%s: a connection failed", self._name)
        finally:
            accepted.finish()
            connection.left()

    def _refuse(self, client: socket.socket) -> None:
        with suppress(OSError):
            client.send(REFUSAL)
            client.shutdown(socket.SHUT_WR)
        # Closing with input unread would make the kernel send a reset, which can destroy the answer on its way.
        self._refused.append(client)
        if len(self._refused) > REFUSED_AT_ONCE:
            self._refused.popleft().close()
        self._loop.call_later(LINGER_S, self._let_go, client)

    def _let_go(self, client: socket.socket) -> None:
        if client in self._refused:
            self._refused.remove(client)
            client.close()

    def _pause(self, exc: OSError) -> None:
        """The listener stays ready while nothing can be accepted: looking again at once would be all that is done."""
        self._failures.append(exc)
        self._loop.remove_reader(self._listener)
        for _ in range(CLOSED_IN_A_PAUSE):
            if not self._table.make_room(of=("idle",)):
                break
        self._resuming = self._loop.call_later(PAUSE_S, self._resume)

    def _resume(self) -> None:
        self._resuming = None
        if self._is_open:
            self._loop.add_reader(self._listener, self._accept)

    # ------------------------------------------------------------------ once in a while

    def _sweep(self) -> None:
        table = self._table
        has_more = table.close_overdue(CLOSED_AT_ONCE)
        self._tell()
        pause_s = CLOSING_S if has_more else min(SWEEP_S, table.idle_s / 4, table.head_s / 4)
        self._sweeping = self._loop.call_later(pause_s, self._sweep)

    def _tell(self) -> None:
        now = self._loop.time()
        if now - self._told_at < SWEEP_S:
            return
        table = self._table
        news = [text % more for reason, text in _TOLD if (more := table.ended[reason] - self._told[reason])]
        if self._failures:
            news.append(f"{len(self._failures)} times none could be accepted ({self._failures[-1].strerror})")
        if news:
            logger.warning(
                "%s: %s; %d are open of at most %d", self._name, ", ".join(news), table.num_open, table.limit
            )
            self._told_at = now
            self._told = dict(table.ended)
            self._failures.clear()


class _Accepted:
    """A client's socket, and what has become of it. is_cut: it has to go, as soon as it has a transport."""

    __slots__ = ("is_cut", "socket", "transport")

    def __init__(self, client: socket.socket) -> None:
        self.socket = client
        self.is_cut = False
        self.transport: asyncio.Transport | None = None

    def begin(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        if self.is_cut:
            transport.abort()

    def cut(self, force: bool) -> bool:
        """Close it, unless its client has not taken all of its last answer yet and nobody insists."""
        if self.transport is None:
            self.is_cut = True  # the loop is at it: its task is not to be cancelled in the middle
        elif self.transport.get_write_buffer_size() and not force:
            return False
        else:
            self.transport.abort()
        return True

    def finish(self) -> None:
        if self.transport is None:
            self.socket.close()
        elif not self.transport.is_closing():
            self.transport.close()
