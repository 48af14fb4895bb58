"""Heartbeat of a daemon to systemd or our `keeper`: that it serves, that its loop turns, that it ends.

The protocol is sd_notify's. The beat comes from the event loop, so that a loop that is held up is silent.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from pathlib import Path

from cortex_core.serving.keeper import SENT_ON
from cortex_core.serving.keeping import watchdog_seconds


class Heartbeat:
    """address: where to tell it; empty tells nobody. watchdog_s: how often somebody wants to hear of it, at least; 0 is
    never. keeper: process id of our own keeper, where that is who watches."""

    def __init__(self, address: str, watchdog_s: float, *, keeper: int = 0) -> None:
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._interval_s = watchdog_s / 2
        self._keeper = keeper
        self._socket: socket.socket | None = None
        self._beating: asyncio.TimerHandle | None = None

    @classmethod
    def from_environ(cls, environ: MutableMapping[str, str]) -> Heartbeat:
        """As systemd tells it. What was read is taken out: processes that this one starts are not meant."""
        address = environ.pop("NOTIFY_SOCKET", "")
        keeper = environ.pop("CORTEX_KEEPER", "")
        watchdog_s = watchdog_seconds(environ)
        for name in ("WATCHDOG_USEC", "WATCHDOG_PID"):
            environ.pop(name, None)
        return cls(address, watchdog_s, keeper=int(keeper) if keeper.isdigit() else 0)

    def when_asked_to_end(self, call: Callable[[], None]) -> None:
        """Call it for SIGTERM and SIGINT, each time, in the event loop.

        A service manager's signal, or `pkill`'s, goes to every process: to this one and to its keeper, which sends it
        on by a number of its own. What came by both ways was asked once.
        """
        loop = asyncio.get_running_loop()
        counts = [0, 0]
        num_told = 0

        def came(way: int) -> None:
            nonlocal num_told
            counts[way] += 1
            if max(counts) > num_told:
                num_told += 1
                call()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, came, 0)
        if self._keeper:
            loop.add_signal_handler(SENT_ON, came, 1)

    def serving(self) -> None:
        """Requests are answered from here on. In the event loop, which beats from now on."""
        self._tell("READY=1")
        if self._address and self._interval_s > 0 and self._beating is None:
            self._beat()

    def reloading(self) -> None:
        """The configuration is being read again; `serving` tells that it has been."""
        self._tell(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self) -> None:
        """No more work is taken. The beat goes on as long as the loop does."""
        self._tell("STOPPING=1")

    def _beat(self) -> None:
        if self._keeper and _is_stopped(self._keeper):
            # Whoever stops the process that was started means the daemon; nobody is told by the kernel.
            self._tell("X_FOLLOWS=1")
            os.kill(os.getpid(), signal.SIGSTOP)
        self._tell("WATCHDOG=1")
        self._beating = asyncio.get_running_loop().call_later(self._interval_s, self._beat)

    def _tell(self, state: str) -> None:
        if not self._address:
            return
        with suppress(OSError):  # nobody listens any more, or does not read
            if self._socket is None:
                self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            self._socket.sendto(state.encode(), self._address)


def _is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] == b"T"
    except (OSError, IndexError):
        return False
