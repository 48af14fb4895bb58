"""One life of an engine group: its processes, its socket, from spawn to the last process reaped."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import msgspec

from neuron.protocol import (
    PROTOCOL_VERSION,
    EngineConfig,
    EngineFault,
    FromEngine,
    Hello,
    Loaded,
    LoadFailed,
    LoadProgress,
    Shutdown,
    StepOutput,
)
from neuron.supervisor.channel import ChannelClosed, EngineChannel
from neuron.supervisor.errors import EngineLoadError
from neuron.supervisor.process import EngineProcess

logger = logging.getLogger(__name__)

_EXIT_CODE_WAIT_S = 1.0
_REAP_TIMEOUT_S = 10.0

WorkerCommand = Callable[[Path, int, int], Sequence[str]]
"""(socket path, epoch, rank) -> argument list of a worker process."""


def worker_command(socket_path: Path, epoch: int, rank: int) -> Sequence[str]:
    """The real worker, by the interpreter that runs the daemon; `-P` keeps the working directory off its path."""
    # fmt: off
    return [
        sys.executable, "-P", "-m", "neuron.worker",
        "--socket", str(socket_path), "--epoch", str(epoch), "--rank", str(rank),
    ]
    # fmt: on


class LaunchSettings(msgspec.Struct, frozen=True):
    """start_timeout_s: spawn to Hello. stall_timeout_s: the longest silence while loading. stop_grace_s: from
    Shutdown to SIGKILL. load_timeout_s: the longest a load may take in all, however busy it looks; None is no limit."""

    runtime_dir: Path
    command: WorkerCommand = worker_command
    start_timeout_s: float = 180.0
    stall_timeout_s: float = 600.0
    stop_grace_s: float = 10.0
    load_timeout_s: float | None = None


class Incarnation:
    """Processes of one epoch.

    on_progress: each LoadProgress. on_step: each StepOutput once loaded. `ended` is done, with the reason, as soon
    as the group cannot go on: its socket closed, a process ended, or it said so itself.
    """

    def __init__(
        self,
        config: EngineConfig,
        settings: LaunchSettings,
        *,
        on_progress: Callable[[LoadProgress], None],
        on_step: Callable[[StepOutput], None],
    ) -> None:
        self.config = config
        self._settings = settings
        self._on_progress = on_progress
        self._on_step = on_step
        self._processes: list[EngineProcess] = []
        self._channel: EngineChannel | None = None
        self._server: asyncio.Server | None = None
        self._socket_path = settings.runtime_dir / f"{os.urandom(4).hex()}-{config.epoch}.sock"
        loop = asyncio.get_running_loop()
        self._hello: asyncio.Future[EngineChannel] = loop.create_future()
        self._loaded: asyncio.Future[Loaded] = loop.create_future()
        self._frames_seen = 0
        self.ended: asyncio.Future[str] = loop.create_future()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    @property
    def channel(self) -> EngineChannel:
        """The connection of rank 0. Raises `ChannelClosed` before it said hello or after it has gone."""
        if self._channel is None or self._channel.is_closed:
            raise ChannelClosed
        return self._channel

    async def load(self) -> Loaded:
        """Spawn, connect and load. Raises `EngineLoadError`; the caller kills what is left in any case."""
        try:
            await self._listen()
            self._spawn()
        except OSError as exc:
            raise EngineLoadError("internal", f"the engine process cannot be started: {exc}") from exc
        channel = await self._connected()
        self._stop_listening()
        with suppress(ChannelClosed):  # then `ended` is done, and says why
            channel.send(self.config)
        now = asyncio.get_running_loop().time
        limit_s = self._settings.load_timeout_s
        deadline = math.inf if limit_s is None else now() + limit_s
        while True:
            seen = self._frames_seen
            await asyncio.wait(
                (self._loaded, self.ended),
                timeout=max(0.0, min(self._settings.stall_timeout_s, deadline - now())),
                return_when=asyncio.FIRST_COMPLETED,
            )
            if self._loaded.done():
                return self._loaded.result()
            if self.ended.done():
                return await self._died()
            if limit_s is not None and now() >= deadline:
                raise EngineLoadError("load_timeout", f"the load was not done after {limit_s:.0f} s")
            if self._frames_seen == seen:
                raise EngineLoadError("stalled", f"loading made no progress for {self._settings.stall_timeout_s:.0f} s")

    async def stop(self) -> None:
        """Ask for an orderly end, then insist. Returns when every process has been reaped."""
        with suppress(ChannelClosed):
            self.channel.send(Shutdown())
        if self._processes:
            exits = [process.exited for process in self._processes]
            await asyncio.wait(exits, timeout=self._settings.stop_grace_s)
        await self.kill()

    async def kill(self) -> None:
        """SIGKILL to every rank; returns when all are reaped and the socket file is gone. Idempotent."""
        self._end("the group was stopped")
        for process in self._processes:
            process.kill()
        self._stop_listening()
        if self._channel is not None:
            self._channel.close()
        self._hello.cancel()
        if not self._loaded.cancel() and not self._loaded.cancelled():
            self._loaded.exception()  # seen, even where nobody waited for it any more
        if not self._processes:
            return
        exits = [process.exited for process in self._processes]
        _, pending = await asyncio.shield(asyncio.wait(exits, timeout=_REAP_TIMEOUT_S))
        if pending:
            logger.error("engine processes of %s do not die (pids %s)", self.config.model_id, self.pids)

    def describe_exits(self) -> str:
        return "; ".join(f"{process.label} {process.describe_exit()}" for process in self._processes)

    # ------------------------------------------------------------------ start

    async def _listen(self) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(
            lambda: EngineChannel(self._on_frame, self._on_lost), path=str(self._socket_path)
        )

    def _stop_listening(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        self._socket_path.unlink(missing_ok=True)

    def _spawn(self) -> None:
        environ = child_environ(os.environ)
        for rank in range(self.config.tensor_parallel_size):
            command = self._settings.command(self._socket_path, self.config.epoch, rank)
            process = EngineProcess.spawn(command, environ=environ, label=f"{self.config.model_id} rank {rank}")
            self._processes.append(process)
            process.exited.add_done_callback(partial(self._on_exit, process))
        logger.info(
            "engine started model=%s epoch=%d pids=%s",
            self.config.model_id,
            self.config.epoch,
            ",".join(map(str, self.pids)),
        )

    async def _connected(self) -> EngineChannel:
        timeout_s = self._settings.start_timeout_s
        await asyncio.wait((self._hello, self.ended), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if self._hello.done():
            return self._hello.result()
        if self.ended.done():
            await self._died()
        raise EngineLoadError("start_timeout", f"the engine process did not connect within {timeout_s:.0f} s")

    async def _died(self) -> Loaded:
        """A socket that closes is usually followed by an exit code, which says more."""
        await asyncio.wait([process.exited for process in self._processes], timeout=_EXIT_CODE_WAIT_S)
        if self._loaded.done():
            return self._loaded.result()  # raises what the engine said itself before it went
        raise EngineLoadError("died", f"{self.ended.result()}; {self.describe_exits()}")

    # ------------------------------------------------------------------ what happens

    def _on_frame(self, channel: EngineChannel, frame: FromEngine) -> None:
        self._frames_seen += 1
        if isinstance(frame, StepOutput):
            if frame.epoch == self.config.epoch and channel is self._channel:
                self._on_step(frame)
        elif isinstance(frame, Hello):
            self._on_hello(channel, frame)
        elif channel is not self._channel:
            logger.warning("a frame of a stranger on %s is ignored", self._socket_path)
            channel.close()
        elif isinstance(frame, LoadProgress):
            self._on_progress(frame)
        elif isinstance(frame, Loaded):
            if frame.epoch == self.config.epoch and not self._loaded.done():
                self._loaded.set_result(frame)
        elif isinstance(frame, LoadFailed):
            if frame.epoch == self.config.epoch and not self._loaded.done():
                self._loaded.set_exception(EngineLoadError(frame.kind, frame.message))
        elif isinstance(frame, EngineFault):
            self._end(f"the engine gave up ({frame.kind}): {frame.message}")

    def _on_hello(self, channel: EngineChannel, hello: Hello) -> None:
        expected = (PROTOCOL_VERSION, self.config.epoch, 0)
        if (hello.version, hello.epoch, hello.rank) != expected or self._hello.done():
            logger.warning("a hello that does not belong here is refused: %s", hello)
            channel.close()
            return
        self._channel = channel
        self._hello.set_result(channel)

    def _on_lost(self, channel: EngineChannel, reason: str) -> None:
        if channel is self._channel:
            self._end(reason)

    def _on_exit(self, process: EngineProcess, _: asyncio.Future[int]) -> None:
        self._end(f"{process.label} (pid {process.pid}) {process.describe_exit()}")

    def _end(self, reason: str) -> None:
        if not self.ended.done():
            self.ended.set_result(reason)


def child_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """What a worker inherits: ours, devices numbered as NVML numbers them, and no notify socket of systemd."""
    child = {name: value for name, value in environ.items() if name not in ("NOTIFY_SOCKET", "WATCHDOG_USEC")}
    child["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    child["PYTHONUNBUFFERED"] = "1"
    return child
