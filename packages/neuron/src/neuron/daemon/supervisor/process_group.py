"""One life of an engine group: its processes, its socket, from spawn to the last process reaped."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import msgspec

from neuron.daemon.supervisor.allocator import allocator_environ
from neuron.daemon.supervisor.channel import ChannelClosed, EngineChannel
from neuron.daemon.supervisor.errors import EngineLoadError
from neuron.daemon.supervisor.process import EngineProcess
from neuron.protocol import (
    PROTOCOL_VERSION,
    EngineConfig,
    EngineFault,
    EngineProgress,
    FromEngine,
    Hello,
    Loaded,
    LoadFailed,
    Pong,
    Shutdown,
    StepOutput,
)

logger = logging.getLogger(__name__)

_PHASES = ("starting", "weights", "kv_cache", "warm_up")
_EXIT_CODE_WAIT_S = 1.0
_REAP_TIMEOUT_S = 10.0

WorkerCommand = Callable[[Path, int, int], Sequence[str]]
"""(socket path, epoch, rank) -> argument list of a worker process."""


def worker_command(socket_path: Path, epoch: int, rank: int) -> Sequence[str]:
    """The real worker, by the interpreter that runs the daemon; `-P` keeps the working directory off its path."""
    # fmt: off
    return [
        sys.executable, "-P", "-m", "neuron.engine.worker",
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


class ProcessGroup:
    """Processes of one epoch, one for each rank.

    on_progress: each EngineProgress, bytes summed over ranks. on_step: each StepOutput once loaded. on_pong: (rank,
    nonce) of each Pong. `ended` is done, with the reason, as soon as the group cannot go on: a socket closed, a process
    ended, or a rank said so itself. `config` is the given one, with the folder where ranks of a group meet; its
    `weight_descriptors` are ours to close.
    """

    def __init__(
        self,
        config: EngineConfig,
        settings: LaunchSettings,
        *,
        on_progress: Callable[[EngineProgress], None],
        on_step: Callable[[StepOutput], None],
        on_pong: Callable[[int, int], None] = lambda rank, nonce: None,
    ) -> None:
        name = f"{os.urandom(4).hex()}-{config.epoch}"
        self._descriptors = list(config.weight_descriptors.values())
        self._group_dir: Path | None = None
        if config.tensor_parallel_size > 1:
            self._group_dir = settings.runtime_dir / name
            config = msgspec.structs.replace(config, group_dir=str(self._group_dir))
        self.config = config
        self._settings = settings
        self._on_progress = on_progress
        self._on_step = on_step
        self._on_pong = on_pong
        self._processes: list[EngineProcess] = []
        self._channels: dict[int, EngineChannel] = {}
        self._progress: dict[int, EngineProgress] = {}
        self._server: asyncio.Server | None = None
        self._socket_path = settings.runtime_dir / f"{name}.sock"
        loop = asyncio.get_running_loop()
        self._hello: asyncio.Future[None] = loop.create_future()
        self._loaded: asyncio.Future[Loaded] = loop.create_future()
        self._frames_seen = 0
        self.ended: asyncio.Future[str] = loop.create_future()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    @property
    def exit_codes(self) -> list[int | None]:
        """Of the processes by rank; None while one runs."""
        return [process.exited.result() if process.exited.done() else None for process in self._processes]

    @property
    def channel(self) -> EngineChannel:
        """The connection of rank 0. Raises `ChannelClosed` before it said hello or after it has gone."""
        channel = self._channels.get(0)
        if channel is None or channel.is_closed:
            raise ChannelClosed
        return channel

    @property
    def channels(self) -> Sequence[EngineChannel]:
        """The connections by rank, each of which may be closed; empty until every rank has said hello."""
        return [self._channels[rank] for rank in sorted(self._channels)] if self._hello.done() else []

    async def load(self) -> Loaded:
        """Spawn, connect and load. Raises `EngineLoadError`; the caller kills what is left in any case."""
        try:
            await self._listen()
            self._spawn()
        except OSError as exc:
            raise EngineLoadError("internal", f"the engine process cannot be started: {exc}") from exc
        await self._connected()
        self._stop_listening()
        with suppress(ChannelClosed):  # then `ended` is done, and says why
            for channel in self.channels:
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
        """Ask for an orderly end, then insist. Returns when every process has been reaped.

        Rank 0 is asked: when it has left its step it tells the others.
        """
        with suppress(ChannelClosed):
            self.channel.send(Shutdown())
        if self._processes:
            exits = [process.exited for process in self._processes]
            await asyncio.wait(exits, timeout=self._settings.stop_grace_s)
        await self.kill()

    async def kill(self) -> None:
        """SIGKILL to every rank; returns when all are reaped and the socket file is gone. Idempotent."""
        self._end("the group was stopped")
        self._close_descriptors()
        for process in self._processes:
            process.kill()
        self._stop_listening()
        for channel in self._channels.values():
            channel.close()
        self._hello.cancel()
        if not self._loaded.cancel() and not self._loaded.cancelled():
            self._loaded.exception()  # seen, even where nobody waited for it any more
        if self._processes:
            exits = [process.exited for process in self._processes]
            _, pending = await asyncio.shield(asyncio.wait(exits, timeout=_REAP_TIMEOUT_S))
            if pending:
                logger.error("engine processes of %s do not die (pids %s)", self.config.model_id, self.pids)
        if self._group_dir is not None:
            shutil.rmtree(self._group_dir, ignore_errors=True)

    def end(self, reason: str) -> None:
        """From here on the group counts as dead, whatever it still does; the caller kills it."""
        self._end(reason)

    def dump_stacks(self) -> None:
        """Have every rank write the stacks of its threads to our log, once they have said hello."""
        if self._hello.done() and not self._hello.cancelled():
            for process in self._processes:
                process.dump_stacks()

    def describe_exits(self) -> str:
        return "; ".join(f"{process.label} {process.describe_exit()}" for process in self._processes)

    # ------------------------------------------------------------------ start

    async def _listen(self) -> None:
        if self._group_dir is not None:
            self._group_dir.mkdir(mode=0o700)
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
        environ = child_environ(os.environ) | allocator_environ(os.environ)
        for rank in range(self.config.tensor_parallel_size):
            command = self._settings.command(self._socket_path, self.config.epoch, rank)
            process = EngineProcess.spawn(
                command,
                environ=environ,
                label=f"{self.config.model_id} rank {rank}",
                descriptors=self._descriptors,
            )
            self._processes.append(process)
            process.exited.add_done_callback(partial(self._on_exit, process))
        self._close_descriptors()  # the processes have their own
        logger.info(
            "engine started model=%s epoch=%d pids=%s",
            self.config.model_id,
            self.config.epoch,
            ",".join(map(str, self.pids)),
        )

    def _close_descriptors(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()

    async def _connected(self) -> None:
        timeout_s = self._settings.start_timeout_s
        await asyncio.wait((self._hello, self.ended), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if self._hello.done():
            return
        if self.ended.done():
            await self._died()
        raise EngineLoadError("start_timeout", f"the engine process did not connect within {timeout_s:.0f} s")

    async def _died(self) -> Loaded:
        """A socket that closes is usually followed by an exit code, which says more."""
        exits = [process.exited for process in self._processes]
        await asyncio.wait(exits, timeout=_EXIT_CODE_WAIT_S, return_when=asyncio.FIRST_COMPLETED)
        if self._loaded.done():
            return self._loaded.result()  # raises what the engine said itself before it went
        raise EngineLoadError("died", f"{self.ended.result()}; {self.describe_exits()}")

    # ------------------------------------------------------------------ what happens

    def _on_frame(self, channel: EngineChannel, frame: FromEngine) -> None:
        self._frames_seen += 1
        if isinstance(frame, StepOutput):
            if frame.epoch == self.config.epoch and channel is self._channels.get(0):
                self._on_step(frame)
            return
        if isinstance(frame, Hello):
            self._on_hello(channel, frame)
            return
        rank = self._rank_of(channel)
        if rank is None:
            logger.warning("a frame of a stranger on %s is ignored", self._socket_path)
            channel.close()
        elif isinstance(frame, Pong):
            self._on_pong(rank, frame.nonce)
        elif isinstance(frame, EngineProgress):
            known = self._progress.get(rank)
            if known is not None and not frame.bytes_total:
                frame = msgspec.structs.replace(known, phase=frame.phase)
            self._progress[rank] = frame
            self._on_progress(_sum_of(self._progress, self.config.tensor_parallel_size))
        elif isinstance(frame, Loaded):
            if rank == 0 and frame.epoch == self.config.epoch and not self._loaded.done():
                self._loaded.set_result(frame)
        elif isinstance(frame, LoadFailed):
            if frame.epoch == self.config.epoch and not self._loaded.done():
                self._loaded.set_exception(EngineLoadError(frame.kind, frame.message))
        elif isinstance(frame, EngineFault):
            self._end(f"{self._whose(rank)}the engine gave up ({frame.kind}): {frame.message}")

    def _rank_of(self, channel: EngineChannel) -> int | None:
        return next((rank for rank, known in self._channels.items() if known is channel), None)

    def _whose(self, rank: int) -> str:
        return f"rank {rank}: " if self.config.tensor_parallel_size > 1 else ""

    def _on_hello(self, channel: EngineChannel, hello: Hello) -> None:
        is_awaited = 0 <= hello.rank < self.config.tensor_parallel_size and hello.rank not in self._channels
        if (hello.version, hello.epoch) != (PROTOCOL_VERSION, self.config.epoch) or not is_awaited:
            logger.warning("a hello that does not belong here is refused: %s", hello)
            channel.close()
            return
        self._channels[hello.rank] = channel
        if len(self._channels) == self.config.tensor_parallel_size and not self._hello.done():
            self._hello.set_result(None)

    def _on_lost(self, channel: EngineChannel, reason: str) -> None:
        rank = self._rank_of(channel)
        if rank is not None:
            self._end(f"{self._whose(rank)}{reason}")

    def _on_exit(self, process: EngineProcess, _: asyncio.Future[int]) -> None:
        self._end(f"{process.label} (pid {process.pid}) {process.describe_exit()}")

    def _end(self, reason: str) -> None:
        if not self.ended.done():
            self.ended.set_result(reason)


def _sum_of(progress: Mapping[int, EngineProgress], world_size: int) -> EngineProgress:
    """The progress of a group: as far as the rank that has come least far, with the bytes of all."""
    phase = min((one.phase for one in progress.values()), key=_PHASES.index)
    if len(progress) < world_size:
        phase = "starting"
    if phase != "weights":
        return EngineProgress(phase, 0, 0)
    bytes_done = sum(one.bytes_done for one in progress.values())
    return EngineProgress(phase, bytes_done, sum(one.bytes_total for one in progress.values()))


def child_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """What a worker inherits: ours, devices numbered as NVML numbers them, and no notify socket of systemd."""
    child = {name: value for name, value in environ.items() if name not in ("NOTIFY_SOCKET", "WATCHDOG_USEC")}
    child["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    child["PYTHONUNBUFFERED"] = "1"
    return child
