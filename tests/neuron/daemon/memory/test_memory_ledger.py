from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from cortex_core.errors import ApiError
from cortex_core.fleet import DeviceHealth
from neuron.checkpoint.config import ModelConfig, read_config
from neuron.checkpoint.folder import weight_paths
from neuron.checkpoint.layout import StoredTensor, stored_tensors
from neuron.daemon.hardware.host import anonymous_bytes
from neuron.daemon.hardware.monitor import HardwareReading
from neuron.daemon.memory.memory_fit import DeviceMemory
from neuron.daemon.memory.memory_ledger import MemoryLedger, Promise
from neuron.protocol import EngineConfig

from tests.neuron.engine.checkpoints import SHAPE, write_qwen3

MIB, GIB = 2**20, 2**30


def ledger(*, free_mb: int = 10_000, devices: tuple[DeviceHealth, ...] = ()) -> MemoryLedger:
    reading = HardwareReading(devices=devices, memory_free_mb=free_mb)
    return MemoryLedger(lambda: reading, host_total_bytes=16 * GIB, floor_bytes=512 * MIB)


def checkpoint_in(folder: Path) -> tuple[EngineConfig, ModelConfig, list[StoredTensor]]:
    path = write_qwen3(folder / "model")
    config = EngineConfig(model_id="tiny", path=str(path))
    return config, read_config(SHAPE), stored_tensors(weight_paths(path))


def host_of(memory: list[DeviceMemory]) -> DeviceMemory:
    return memory[0]


def test_a_process_counts_with_what_it_has_written(tmp_path: Path) -> None:
    program = "import sys; block = bytearray(64 << 20); print('ready', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdin is not None
        process.stdout.readline()
        assert 64 * MIB <= anonymous_bytes(process.pid) < 200 * MIB
        process.stdin.close()
    assert anonymous_bytes(process.pid) == 0


def test_what_was_promised_and_not_taken_yet_is_not_available() -> None:
    mine = os.getpid()
    taken = anonymous_bytes(mine)
    here = Promise("a", {None: taken + 3 * GIB}, "here", pids=(mine,))
    memory = host_of(ledger().memory([here]))
    assert memory.available == pytest.approx(10_000 * MIB - 3 * GIB, abs=64 * MIB) and memory.pending == 0
    assert memory.total == 16 * GIB


def test_loads_and_unloads_that_are_going_on_are_pending() -> None:
    coming = Promise("a", {None: 3 * GIB}, "coming")
    memory = host_of(ledger().memory([coming]))
    assert (memory.available, memory.pending) == (10_000 * MIB - 3 * GIB, 3 * GIB)
    mine = os.getpid()
    leaving = Promise("a", {None: 3 * GIB}, "leaving", pids=(mine,))
    memory = host_of(ledger().memory([leaving]))
    assert memory.available == 10_000 * MIB
    assert memory.pending == pytest.approx(anonymous_bytes(mine), abs=64 * MIB)


def test_a_device_that_a_load_is_filling_has_nothing_for_others() -> None:
    devices = (DeviceHealth(0, vram_used_mb=1000, vram_free_mb=79_000), DeviceHealth(1, vram_free_mb=80_000))
    promises = [Promise("a", {0: 78_000 * MIB}, "coming"), Promise("b", {1: 70_000 * MIB}, "here")]
    _, first, second = ledger(devices=devices).memory(promises)
    assert (first.index, first.available, first.pending) == (0, 1000 * MIB, 78_000 * MIB)
    assert (second.index, second.available, second.pending) == (1, 80_000 * MIB, 0)  # it has taken what it was promised


def test_a_host_that_does_not_tell_its_memory_leaves_it_to_the_engine(tmp_path: Path) -> None:
    config, shape, tensors = checkpoint_in(tmp_path)
    assert ledger(free_mb=0).fit(config, [], shape, tensors) is None
    assert ledger().fit(msgspec.structs.replace(config, devices=(3,)), [], shape, tensors) is None
    found = ledger().fit(config, [], shape, tensors)
    assert found is not None and found.context_tokens == 512


def test_a_download_that_this_host_could_never_load_is_refused() -> None:
    config = EngineConfig(model_id="tiny", path="")
    desk = ledger(free_mb=100)  # there may be more when it is here
    desk.check_size(config, SHAPE, 4 * GIB)
    with pytest.raises(ApiError) as caught:
        desk.check_size(config, SHAPE, 17 * GIB)
    assert caught.value.code == "insufficient_memory" and caught.value.extras["free_mb"] == 16 * 1024
    assert "16384 MiB are all it has" in caught.value.message
    desk.check_size(config, {"model_type": "qwen3"}, 900 * GIB)
    ledger(free_mb=0).check_size(config, SHAPE, 900 * GIB)


def test_memory_that_would_be_given_up_counts_as_available_and_the_load_says_how_much_of_it(tmp_path: Path) -> None:
    config, shape, tensors = checkpoint_in(tmp_path)
    config = msgspec.structs.replace(config, kv_cache_tokens=2048)
    reading = HardwareReading(memory_free_mb=600)

    def with_reclaimable(num_bytes: int) -> MemoryLedger:
        return MemoryLedger(
            lambda: reading, host_total_bytes=16 * GIB, floor_bytes=512 * MIB, reclaimable=lambda: num_bytes
        )

    with pytest.raises(ApiError, match="does not fit"):
        with_reclaimable(0).fit(config, (), shape, tensors)
    found = with_reclaimable(4 * GIB).fit(config, (), shape, tensors)
    assert found is not None
    assert found.reclaim_bytes == found.bytes_on[None] + 512 * MIB - 600 * MIB
    reading = HardwareReading(memory_free_mb=10_000)
    plenty = with_reclaimable(4 * GIB).fit(config, (), shape, tensors)
    assert plenty is not None and plenty.reclaim_bytes == 0
