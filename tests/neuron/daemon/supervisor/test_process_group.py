"""One life of a group of several ranks, with processes that speak the protocol and compute nothing."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from neuron.daemon.supervisor.allocator import SETTINGS
from neuron.daemon.supervisor.channel import ChannelClosed
from neuron.daemon.supervisor.errors import EngineLoadError
from neuron.daemon.supervisor.process_group import LaunchSettings, ProcessGroup
from neuron.protocol import (
    PROTOCOL_VERSION,
    EngineConfig,
    EngineFault,
    EngineProgress,
    EngineStats,
    Hello,
    Loaded,
    LoadFailed,
    Pong,
    StepOutput,
    encode_frame,
)

LOADED = Loaded(2, "Test", "float32", 64, 100, 8, 4, 16, 1000, 0.0)


def mute(socket_path: Path, epoch: int, rank: int) -> Sequence[str]:
    return [sys.executable, "-c", "import signal; signal.pause()"]


class Ranks:
    """A process group whose processes are mute, and whose ranks' ends of the sockets are held by the test."""

    def __init__(self, folder: Path, world_size: int) -> None:
        self.progress: list[EngineProgress] = []
        self.steps: list[StepOutput] = []
        self.pongs: list[tuple[int, int]] = []
        self.folder = folder
        self.sockets: list[socket.socket] = []
        self.process_group = ProcessGroup(
            EngineConfig(model_id="m", path="/nowhere", tensor_parallel_size=world_size, epoch=2),
            LaunchSettings(runtime_dir=folder, command=mute),
            on_progress=self.progress.append,
            on_step=self.steps.append,
            on_pong=lambda rank, nonce: self.pongs.append((rank, nonce)),
        )

    async def __aenter__(self) -> Ranks:
        self.loading = asyncio.create_task(self.process_group.load())
        async with asyncio.timeout(60):
            while not list(self.folder.glob("*.sock")):
                await asyncio.sleep(0.005)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.loading.cancel()
        await asyncio.wait((self.loading,))
        await self.process_group.kill()
        for stream in self.sockets:
            stream.close()

    def say(self, stream: socket.socket, *frames: Any) -> None:
        for frame in frames:
            stream.sendall(encode_frame(frame))

    def hello(self, rank: int, *, epoch: int = 2) -> socket.socket:
        stream = socket.socket(socket.AF_UNIX)
        stream.connect(str(next(self.folder.glob("*.sock"))))
        self.sockets.append(stream)
        self.say(stream, Hello(PROTOCOL_VERSION, epoch, rank, 1))
        return stream

    async def both(self) -> tuple[socket.socket, socket.socket]:
        """Two ranks that have said hello."""
        ranks = self.hello(0), self.hello(1)
        await self.until(lambda: len(self.process_group.channels) == 2)
        return ranks

    @staticmethod
    async def until(condition: Any) -> None:
        async with asyncio.timeout(60):
            while not condition():
                await asyncio.sleep(0.005)


@pytest.fixture
async def ranks(tmp_path: Path) -> Ranks:
    return Ranks(tmp_path, 2)


async def test_the_configuration_goes_out_when_every_rank_is_here(ranks: Ranks) -> None:
    async with ranks:
        second = ranks.hello(1)
        second.setblocking(False)
        await asyncio.sleep(0.05)
        assert ranks.process_group.channels == []
        with pytest.raises(BlockingIOError):
            second.recv(1)
        ranks.hello(0)
        await ranks.until(lambda: len(ranks.process_group.channels) == 2)
        assert ranks.process_group.channels[0] is ranks.process_group.channel
        second.setblocking(True)
        assert second.recv(1)
        folder = Path(ranks.process_group.config.group_dir)
        assert folder.is_dir() and folder.stat().st_mode & 0o077 == 0
    assert list(ranks.folder.iterdir()) == []


async def test_progress_is_that_of_the_slowest_rank_with_the_bytes_of_all(ranks: Ranks) -> None:
    async with ranks:
        first, second = await ranks.both()
        ranks.say(first, EngineProgress("weights", 30, 100))
        await ranks.until(lambda: len(ranks.progress) == 1)
        ranks.say(second, EngineProgress("weights", 0, 60))
        await ranks.until(lambda: len(ranks.progress) == 2)
        ranks.say(first, EngineProgress("weights", 100, 100), EngineProgress("kv_cache", 0, 0))
        await ranks.until(lambda: len(ranks.progress) == 4)
        ranks.say(second, EngineProgress("kv_cache", 0, 0))
        await ranks.until(lambda: len(ranks.progress) == 5)
    assert ranks.progress == [
        EngineProgress("starting", 0, 0),
        EngineProgress("weights", 30, 160),
        EngineProgress("weights", 100, 160),
        EngineProgress("weights", 100, 160),
        EngineProgress("kv_cache", 0, 0),
    ]


async def test_only_rank_0_says_that_the_group_is_loaded_and_what_steps_did(ranks: Ranks) -> None:
    async with ranks:
        first, second = await ranks.both()
        ranks.say(second, LOADED, StepOutput(2, EngineStats()), Pong(7))
        await ranks.until(lambda: ranks.pongs == [(1, 7)])
        assert not ranks.loading.done() and ranks.steps == []
        ranks.say(first, LOADED, StepOutput(2, EngineStats(step=1)), StepOutput(1, EngineStats(step=9)), Pong(8))
        await ranks.until(lambda: len(ranks.pongs) == 2)
        assert await ranks.loading == LOADED
        assert [step.stats.step for step in ranks.steps] == [1], "a step of another epoch is discarded"


@pytest.mark.parametrize("rank", [0, 1])
async def test_any_rank_can_fail_the_load(ranks: Ranks, rank: int) -> None:
    async with ranks:
        streams = await ranks.both()
        ranks.say(streams[rank], LoadFailed(2, "out_of_memory", "no room"))
        with pytest.raises(EngineLoadError, match="no room") as caught:
            await ranks.loading
        assert caught.value.kind == "out_of_memory"


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("how", ["fault", "socket", "process"])
async def test_the_end_of_any_rank_ends_the_group(ranks: Ranks, rank: int, how: str) -> None:
    async with ranks:
        streams = await ranks.both()
        ranks.say(streams[0], LOADED)
        await ranks.loading
        if how == "fault":
            ranks.say(streams[rank], EngineFault(2, "device", "it fell off"))
        elif how == "socket":
            streams[rank].close()
        else:
            os.kill(ranks.process_group.pids[rank], signal.SIGKILL)
        async with asyncio.timeout(60):
            reason = await asyncio.shield(ranks.process_group.ended)
        assert f"rank {rank}" in reason


async def test_who_does_not_belong_to_the_group_is_not_let_in(ranks: Ranks) -> None:
    async with ranks:
        ranks.hello(0)
        for stranger in (ranks.hello(0), ranks.hello(2), ranks.hello(-1), ranks.hello(1, epoch=1)):
            stranger.settimeout(60)
            assert await asyncio.to_thread(stranger.recv, 1) == b""
        assert ranks.process_group.channels == []
        ranks.hello(1)
        await ranks.until(lambda: len(ranks.process_group.channels) == 2)
    with pytest.raises(ChannelClosed):
        _ = ranks.process_group.channel


@pytest.mark.parametrize("of_operator", ["", "8"])
async def test_every_rank_gets_the_allocators_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_operator: str
) -> None:
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    if of_operator:
        monkeypatch.setenv("MALLOC_ARENA_MAX", of_operator)
    async with Ranks(tmp_path, 2) as ranks:
        await ranks.until(lambda: len(ranks.process_group.pids) == 2)
        for pid in ranks.process_group.pids:
            environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            found = dict(each.decode().split("=", 1) for each in environ if each.startswith(b"MALLOC_"))
            assert found == ({"MALLOC_ARENA_MAX": of_operator} if of_operator else SETTINGS)
