"""Frames survive any cut, and a broken peer ends the channel once."""

from __future__ import annotations

import asyncio
import socket

import pytest
from neuron.daemon.supervisor.channel import ChannelClosed, EngineChannel
from neuron.protocol import Cancel, EngineStats, FromEngine, Hello, SequenceUpdate, StepOutput, encode_frame

FRAMES: list[FromEngine] = [
    Hello(1, 0, 0, 42),
    StepOutput(0, EngineStats(step=1), [SequenceUpdate(1, [5], None)]),
    StepOutput(0, EngineStats(step=2), [SequenceUpdate(1, list(range(300)), "stop")]),
]


class Ends:
    def __init__(self) -> None:
        self.frames: list[FromEngine] = []
        self.lost: list[str] = []
        self.channel = EngineChannel(lambda _, frame: self.frames.append(frame), lambda _, why: self.lost.append(why))


@pytest.mark.parametrize("size", [1, 3, 4, 7, 64, 10_000])
async def test_frames_do_not_depend_on_how_the_stream_is_cut(size: int) -> None:
    ends = Ends()
    stream = b"".join(map(encode_frame, FRAMES))
    for start in range(0, len(stream), size):
        ends.channel.data_received(stream[start : start + size])
    assert ends.frames == FRAMES and not ends.lost


@pytest.mark.parametrize("noise", [b"\x02\0\0\0\xc1\xc1", b"\xff\xff\xff\xff", b"\x01\0\0\0\x07"])
async def test_noise_ends_the_channel_once(noise: bytes) -> None:
    ends = Ends()
    ends.channel.data_received(encode_frame(FRAMES[0]) + noise)
    ends.channel.connection_lost(None)
    assert ends.frames == FRAMES[:1] and len(ends.lost) == 1
    with pytest.raises(ChannelClosed):
        ends.channel.send(Cancel(1))


async def test_a_reader_that_does_not_keep_up_holds_writers_back() -> None:
    ours, theirs = socket.socketpair()
    ends = Ends()
    await asyncio.get_running_loop().create_unix_connection(lambda: ends.channel, sock=ours)
    while ends.channel._writable.is_set():
        ends.channel.send(Cancel(7))
    waiting = asyncio.create_task(ends.channel.writable())
    await asyncio.sleep(0)
    assert not waiting.done()
    theirs.setblocking(False)
    while not waiting.done():
        try:
            theirs.recv(2**16)
        except BlockingIOError:
            await asyncio.sleep(0)
    ends.channel.close()
    theirs.close()
    assert ends.lost == []  # closing it ourselves is no loss


async def test_a_peer_that_goes_is_lost_and_frees_writers() -> None:
    ours, theirs = socket.socketpair()
    ends = Ends()
    await asyncio.get_running_loop().create_unix_connection(lambda: ends.channel, sock=ours)
    while ends.channel._writable.is_set():
        ends.channel.send(Cancel(7))
    waiting = asyncio.create_task(ends.channel.writable())
    theirs.close()
    with pytest.raises(ChannelClosed):
        await waiting
    assert len(ends.lost) == 1
