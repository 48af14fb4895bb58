"""A model's text host as the daemon sees it: a process, what it has loaded, and orders to it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress

import msgspec

from neuron.daemon.supervisor.process import EngineProcess
from neuron.daemon.text_workers.connections import FrameConnection
from neuron.daemon.text_workers.limits import LOAD_CPU_S, wall_budget_s
from neuron.daemon.text_workers.messages import (
    FORK,
    KILL,
    YIELD,
    Loading,
    LoadText,
    TextInfo,
    TextLoaded,
    TextRefused,
    WorkerEnded,
    decode_from_host,
)
from neuron.daemon.text_workers.settings import TextSettings

_REAP_TIMEOUT_S = 10.0


class TextLoadError(Exception):
    """The checkpoint's text files cannot be used; the message says which, and why."""


class HostProcess:
    """on_worker_ended: for each worker that ended. on_lost: the process is gone, though it was loaded."""

    def __init__(
        self,
        path: str,
        settings: TextSettings,
        *,
        label: str,
        on_worker_ended: Callable[[WorkerEnded], None],
        on_lost: Callable[[HostProcess], None],
    ) -> None:
        self._order = LoadText(path, settings.drops_attribution, settings.memory_bytes, settings.cpu_s)
        self._label = label
        self._on_worker_ended = on_worker_ended
        self._on_lost = on_lost
        self._process: EngineProcess | None = None
        self._orders: socket.socket | None = None
        self._connection = FrameConnection(self._on_frame, self._disconnected)
        self._loaded: asyncio.Future[TextInfo] = asyncio.get_running_loop().create_future()
        self._stage = "program"
        self._stage_cpu_s = LOAD_CPU_S
        self._is_stopped = False
        self._failing: asyncio.Future[None] | None = None

    @property
    def pid(self) -> int:
        return 0 if self._process is None else self._process.pid

    async def start(self) -> TextInfo:
        """Spawn and load. Raises `TextLoadError`; the caller stops it then."""
        ours, theirs = socket.socketpair()
        orders, their_orders = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._orders = orders
        orders.setblocking(False)
        ours.setblocking(False)
        with theirs, their_orders:
            descriptors = (theirs.fileno(), their_orders.fileno())
            # fmt: off
            command = [
                sys.executable, "-P", "-m", "neuron.daemon.text_workers",
                *map(str, descriptors), str(os.getpid()),
            ]
            # fmt: on
            environ = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
            try:
                self._process = EngineProcess.spawn(
                    command, environ=environ, label=f"text {self._label}", descriptors=descriptors
                )
            except OSError as exc:
                ours.close()
                raise TextLoadError(f"the process that reads it cannot be started: {exc}") from exc
        await asyncio.get_running_loop().create_unix_connection(lambda: self._connection, sock=ours)
        self._send(msgspec.msgpack.encode(self._order))
        limit_s = wall_budget_s(LOAD_CPU_S)
        await asyncio.wait((self._loaded,), timeout=limit_s)
        if not self._loaded.done():
            raise TextLoadError(f"the {self._stage} was not read within {limit_s:.0f} s")
        return self._loaded.result()

    def fork(self, connection: socket.socket) -> None:
        """A worker with `connection`, whose descriptor is copied."""
        self._send(FORK, connection)

    def kill(self, worker: int) -> None:
        self._send(KILL + worker.to_bytes(4, "little"))

    def give_way(self, worker: int) -> None:
        """Lower the worker's priority, for good."""
        self._send(YIELD + worker.to_bytes(4, "little"))

    async def stop(self) -> None:
        """Kill it and its workers; returns when it has been reaped."""
        self._is_stopped = True
        self._connection.close()
        if self._orders is not None:
            self._orders.close()
        if not self._loaded.cancel() and not self._loaded.cancelled():
            self._loaded.exception()  # seen, even where nobody waited for it any more
        if self._process is not None:
            self._process.kill()
            with suppress(TimeoutError):
                async with asyncio.timeout(_REAP_TIMEOUT_S):
                    await self._process.wait()

    # ------------------------------------------------------------------ inside

    def _send(self, data: bytes, connection: socket.socket | None = None) -> None:
        """An order; it is lost with a host that is gone, which `on_lost` tells of."""
        if self._orders is None or self._is_stopped:
            return
        descriptors = [] if connection is None else [connection.fileno()]
        with suppress(OSError):
            socket.send_fds(self._orders, [data], descriptors)

    def _on_frame(self, payload: bytes) -> None:
        message = decode_from_host(payload)
        if isinstance(message, WorkerEnded):
            self._on_worker_ended(message)
        elif isinstance(message, Loading):
            self._stage, self._stage_cpu_s = message.stage, message.cpu_s
        elif not self._loaded.done():
            if isinstance(message, TextLoaded):
                self._loaded.set_result(message.info)
            elif isinstance(message, TextRefused):
                self._loaded.set_exception(TextLoadError(f"the {self._stage} cannot be used: {message.reason}"))

    def _disconnected(self, reason: str) -> None:
        if self._is_stopped:
            return
        if not self._loaded.done():
            self._failing = asyncio.ensure_future(self._fail_load())
        else:
            self._on_lost(self)

    async def _fail_load(self) -> None:
        """The process ended before it had loaded: say in what."""
        process = self._process
        if process is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(_REAP_TIMEOUT_S):
                    await process.wait()
        if self._loaded.done():
            return
        ending = "ended" if process is None else process.describe_exit()
        if process is not None and process.exited.done() and process.exited.result() == -signal.SIGPROF:
            ending = f"took more than {self._stage_cpu_s:.1f} s of processor time"
        self._loaded.set_exception(TextLoadError(f"the {self._stage} cannot be used: reading it {ending}"))
