"""Queues between the socket and the device thread. Nothing here imports torch, and nobody spins."""

from __future__ import annotations

import socket
import threading
import time
from collections import deque
from collections.abc import Callable

from neuron.protocol import Cancel, Generate

Command = Generate | Cancel


class Inbox:
    """Commands for the device thread; any thread may put, one takes."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._commands: deque[Command] = deque()
        self._is_awake = False
        self._is_closed = False
        self._on_close: Callable[[], None] | None = None

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def put(self, command: Command) -> None:
        with self._condition:
            self._commands.append(command)
            self._condition.notify()

    def wake(self) -> None:
        """Make a waiting `take` return although there is no command."""
        with self._condition:
            self._is_awake = True
            self._condition.notify()

    def close(self) -> None:
        """No more commands will come: the device thread is to stop after its step."""
        with self._condition:
            self._is_closed = True
            self._condition.notify()
            on_close = self._on_close
        if on_close is not None:
            on_close()

    def when_closed(self, callback: Callable[[], None]) -> None:
        """Call back when the inbox is closed, on the thread that closes it; at once if it is already."""
        with self._condition:
            self._on_close = callback
            is_closed = self._is_closed
        if is_closed:
            callback()

    def take(self, *, wait: bool, timeout_s: float | None = None) -> list[Command]:
        """All commands that are there. With `wait`, sleeps until there is one, or `wake` or `close` is called, or
        `timeout_s` has passed."""
        with self._condition:
            if wait:
                self._condition.wait_for(lambda: self._commands or self._is_awake or self._is_closed, timeout=timeout_s)
            self._is_awake = False
            commands = list(self._commands)
            self._commands.clear()
        return commands


class Outbox:
    """Frames to the daemon, in order. The device thread hands them over without waiting for a slow reader.

    What the socket takes at once is sent by the caller (no thread switch per step); the rest is queued for a writer
    thread. Above `limit_bytes` of queued frames `send` waits, so that a daemon that reads nothing stops the engine
    and does not fill its memory. When the socket fails, frames are dropped: nobody reads them.
    """

    def __init__(self, connection: socket.socket, *, limit_bytes: int = 64 * 2**20) -> None:
        self._socket = connection
        self._limit = limit_bytes
        self._condition = threading.Condition()
        self._queue: deque[memoryview] = deque()
        self._queued_bytes = 0
        self._is_broken = False
        self._writer = threading.Thread(target=self._write, name="frame-writer", daemon=True)
        self._writer.start()

    def send(self, frame: bytes) -> None:
        with self._condition:
            while self._queued_bytes > self._limit and not self._is_broken:
                self._condition.wait()
            if self._is_broken:
                return
            rest = memoryview(frame)
            if not self._queue:
                try:
                    rest = rest[self._socket.send(rest, socket.MSG_DONTWAIT) :]
                except BlockingIOError:
                    pass
                except OSError:
                    self._break()
                    return
            if rest:
                self._queue.append(rest)
                self._queued_bytes += len(rest)
                self._condition.notify_all()

    def drop(self) -> None:
        """Nobody will read any more: wake whoever waits in `send` or `flush`."""
        with self._condition:
            self._break()

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything is sent; False if the deadline passed or the socket failed."""
        deadline = time.monotonic() + timeout_s
        with self._condition:
            while self._queue and not self._is_broken:
                remaining = deadline - time.monotonic()
                if remaining <= 0 or not self._condition.wait(remaining):
                    return False
            return not self._is_broken

    def _break(self) -> None:
        self._is_broken = True
        self._queue.clear()
        self._queued_bytes = 0
        self._condition.notify_all()

    def _write(self) -> None:
        while True:
            with self._condition:
                while not self._queue and not self._is_broken:
                    self._condition.wait()
                if self._is_broken:
                    return
                frame = self._queue[0]
            try:
                self._socket.sendall(frame)
            except OSError:
                self.drop()
                return
            with self._condition:
                # The frame stays at the head while it is being sent, so that `send` does not overtake it.
                if self._queue:
                    self._queue.popleft()
                    self._queued_bytes -= len(frame)
                    self._condition.notify_all()
