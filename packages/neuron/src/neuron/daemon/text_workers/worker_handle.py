"""One worker as the daemon sees it: a connection, what it works on until when, and how it ended."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from neuron.daemon.text_workers.connections import PIECE_BYTES, FrameConnection
from neuron.daemon.text_workers.messages import Done, Hello, Job, Stage, WorkerEnded, decode_from_worker

if TYPE_CHECKING:
    from neuron.daemon.text_workers.host_process import HostProcess

LostReason = Literal["cpu", "wall", "memory", "abandoned", "died"]
LOST_REASONS: tuple[LostReason, ...] = ("cpu", "wall", "memory", "abandoned", "died")

_REPORT_WAIT_S = 5.0
_BUFFER_BYTES = 2**20


class WorkerHandle:
    """on_ready: it takes jobs. on_done: what became of one. on_lost: (number, why, at which stage), once."""

    def __init__(
        self,
        number: int,
        host: HostProcess,
        *,
        on_ready: Callable[[int], None],
        on_done: Callable[[int, Done], None],
        on_lost: Callable[[int, LostReason, Stage], None],
    ) -> None:
        self.number = number
        self.pid = 0
        self.is_ready = False
        self._host = host
        self._on_ready = on_ready
        self._on_done = on_done
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._connection = FrameConnection(self._on_frame, self._disconnected)
        self._timers: list[asyncio.TimerHandle] = []
        self._killed_for: LostReason | None = None
        self._is_over = False
        self._is_disconnected = False
        self._ended: WorkerEnded | None = None
        self._starting: asyncio.Task[None] | None = None
        self._sending: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Have it forked; `on_ready` follows."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        with theirs:
            self._host.fork(theirs)
        self._starting = asyncio.create_task(self._connect(ours))

    async def _connect(self, ours: socket.socket) -> None:
        try:
            await self._loop.create_unix_connection(lambda: self._connection, sock=ours)
        except BaseException:
            ours.close()
            raise
        if self._is_over:
            self._connection.close()

    def give(self, job: Job, body: bytes, *, yield_after_s: float, wall_s: float) -> None:
        """It works on `job`, for `wall_s` at most, and from `yield_after_s` on behind others."""
        self._timers = [
            self._loop.call_later(yield_after_s, self._yield),
            self._loop.call_later(wall_s, self._kill, "wall"),
        ]
        if len(body) <= PIECE_BYTES:
            self._connection.send_at_once(job, body)
        else:
            self._connection.send(job)
            self._sending = asyncio.create_task(self._connection.send_body(body))

    def end_soon(self, after_s: float) -> None:
        """Nobody wants the result: unless it comes within `after_s`, the worker is killed."""
        self._timers.append(self._loop.call_later(after_s, self._kill, "abandoned"))

    def close(self) -> None:
        """It ends when it reads the end of its connection; one that works is killed. No callback follows."""
        self._is_over = True
        if self._timers and self.pid:
            self._host.kill(self.pid)
        self._cancel_timers()
        self._connection.close()

    def ended(self, ended: WorkerEnded) -> None:
        """The host has reaped it."""
        self._ended = ended
        if self._is_disconnected:
            self._lose()

    # ------------------------------------------------------------------ inside

    def _on_frame(self, payload: bytes) -> None:
        message = decode_from_worker(payload)
        if isinstance(message, Hello):
            self.pid = message.pid
            self.is_ready = True
            self._on_ready(self.number)
            return
        self._cancel_timers()
        self._on_done(self.number, message)

    def _disconnected(self, reason: str) -> None:
        self._is_disconnected = True
        self.is_ready = False
        if self._is_over:
            return
        if self._ended is not None:
            self._lose()
        else:  # the host's word comes on another connection
            self._timers.append(self._loop.call_later(_REPORT_WAIT_S, self._lose))

    def _lose(self) -> None:
        if self._is_over:
            return
        self._is_over = True
        self._cancel_timers()
        ended = self._ended
        stage: Stage = "start" if ended is None else ended.stage
        self._on_lost(self.number, self._killed_for or _reason_of(ended), stage)

    def _yield(self) -> None:
        if self.pid and not self._is_over:
            self._host.give_way(self.pid)

    def _kill(self, reason: LostReason) -> None:
        if self.pid and not self._is_over and self._killed_for is None:
            self._killed_for = reason
            self._host.kill(self.pid)

    def _cancel_timers(self) -> None:
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()


def _reason_of(ended: WorkerEnded | None) -> LostReason:
    if ended is None:
        return "died"
    if ended.code == -signal.SIGPROF:
        return "cpu"
    if ended.code == -signal.SIGABRT:  # native code that gets no memory aborts
        return "memory"
    return "died"
