"""A load that stays busy and never ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from neuron.daemon.supervisor.engine_group import GroupFailed, GroupLoading

from tests.neuron.scripted_engine import Events, make_group

CREEPING_WORKER = """
import os, socket, sys, time
from neuron.protocol import PROTOCOL_VERSION, Hello, EngineProgress, encode_frame
stream = socket.socket(socket.AF_UNIX)
stream.connect(sys.argv[1])
stream.sendall(encode_frame(Hello(PROTOCOL_VERSION, int(sys.argv[2]), int(sys.argv[3]), os.getpid())))
for number in range(10**9):
    stream.sendall(encode_frame(EngineProgress("weights", number, 10**9)))
    time.sleep(0.02)
"""


def creeping_command(socket_path: Path, epoch: int, rank: int) -> Sequence[str]:
    return [sys.executable, "-c", CREEPING_WORKER, str(socket_path), str(epoch), str(rank)]


async def test_a_load_that_creeps_is_killed_at_its_deadline(tmp_path: Path) -> None:
    events = Events()
    group = make_group(tmp_path, events, command=creeping_command, stall_timeout_s=60, load_timeout_s=0.5)
    group.start()
    failed = await events.until(GroupFailed)
    assert failed.kind == "load_timeout" and "not done after" in failed.reason
    assert sum(isinstance(event, GroupLoading) for event in events.seen) > 1, "it was never silent"
    (pid,) = group.pids
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert list(tmp_path.iterdir()) == []
    await group.stop()
