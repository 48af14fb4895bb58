"""Ledger of this host's memory: what is free for another model, and what those that are here were promised.

A free byte may be promised: a CPU's cache is taken page by page as answers come, and a load takes its weights in
minutes. So what is available is what is free now, less what others may still take.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import msgspec

from neuron.checkpoint.config import ModelConfig, read_config
from neuron.checkpoint.errors import CheckpointError
from neuron.checkpoint.layout import StoredTensor, tensors_of_size
from neuron.daemon.hardware.host import anonymous_bytes
from neuron.daemon.hardware.monitor import HardwareReading
from neuron.daemon.memory.memory_fit import DeviceMemory, Fit, Resident, fit
from neuron.protocol import EngineConfig

logger = logging.getLogger(__name__)

_MIB = 2**20


class Promise(msgspec.Struct, frozen=True):
    """Memory that a model was promised, bytes by device (None is the host), and how far it has got with it."""

    model_id: str
    bytes_on: dict[int | None, int]
    stage: Literal["coming", "here", "leaving"]
    pids: tuple[int, ...] = ()
    in_flight: int = 0


class MemoryLedger:
    """measure takes a fresh reading and may block. host_total_bytes: memory there is. floor_bytes: left free of the
    host and of every device. reclaimable: bytes of the host's memory that are in use and would be given up for a
    load (copies of checkpoints)."""

    def __init__(
        self,
        measure: Callable[[], HardwareReading],
        *,
        host_total_bytes: int,
        floor_bytes: int,
        reclaimable: Callable[[], int] = lambda: 0,
    ) -> None:
        self._measure = measure
        self._host_total_bytes = host_total_bytes
        self._floor_bytes = floor_bytes
        self._reclaimable = reclaimable

    def fit(
        self, config: EngineConfig, promises: Sequence[Promise], model: ModelConfig, tensors: Sequence[StoredTensor]
    ) -> Fit | None:
        """The load of `config` with the context that fits beside what others were promised; None where free memory
        cannot be read, which leaves it to the engine. model, tensors: of its checkpoint.

        Blocks (driver). Raises `ApiError`: 422 with the numbers and what would help.
        """
        reclaimable = self._reclaimable()
        memory = self.memory(promises, reclaimable=reclaimable)
        if not _is_known(config, memory):
            return None
        found = fit(
            config,
            model,
            tensors,
            memory,
            floor_bytes=self._floor_bytes,
            residents=[
                Resident(promise.model_id, promise.bytes_on, promise.in_flight)
                for promise in promises
                if promise.stage == "here"
            ],
        )
        missing = found.bytes_on.get(None, 0) + self._floor_bytes - (memory[0].available - reclaimable)
        if None in found.bytes_on and missing > 0:
            found = msgspec.structs.replace(found, reclaim_bytes=min(missing, reclaimable))
        logger.info(
            "memory fits model=%s context=%d of=%d needs_mb=%s available_mb=%s",
            config.model_id,
            found.context_tokens,
            found.full_context_tokens,
            ",".join(f"{_name(index)}:{count // _MIB}" for index, count in found.bytes_on.items()),
            ",".join(f"{_name(each.index)}:{each.available // _MIB}" for each in memory),
        )
        return found

    def check_size(self, config: EngineConfig, hf_config: Mapping[str, Any], num_bytes: int) -> None:
        """Whether weights of so many bytes, of which nothing else is known yet, could ever be loaded on this host, if
        there were nothing else. Blocks. Raises `ApiError` 422."""
        try:
            model = read_config(hf_config)
        except CheckpointError:
            return
        empty = [msgspec.structs.replace(each, available=each.total) for each in self.memory(())]
        if _is_known(config, empty):
            fit(config, model, tensors_of_size(num_bytes, model), empty, floor_bytes=self._floor_bytes)

    def memory(self, promises: Sequence[Promise], *, reclaimable: int = 0) -> list[DeviceMemory]:
        """What is available now, of the host and of every device; a total of 0 is unknown. reclaimable: what is in use
        of the host's, and counts as available."""
        reading = self._measure()
        host_open = host_pending = 0
        for promise in promises:
            if None in promise.bytes_on:
                taken = sum(anonymous_bytes(pid) for pid in promise.pids)
                left = max(0, promise.bytes_on[None] - taken)
                host_open += 0 if promise.stage == "leaving" else left
                host_pending += left if promise.stage == "coming" else taken if promise.stage == "leaving" else 0
        free = reading.memory_free_mb * _MIB
        total = self._host_total_bytes if free else 0  # 0: the system does not say
        found = [DeviceMemory(None, max(0, free + reclaimable - host_open), total, host_pending)]
        for device in reading.devices:
            moving = {"coming": 0, "here": 0, "leaving": 0}
            for promise in promises:
                moving[promise.stage] += promise.bytes_on.get(device.index, 0)
            # A model that is here has taken all it was promised; of one that comes, nobody knows how much.
            available = max(0, device.vram_free_mb * _MIB - moving["coming"])
            total = (device.vram_free_mb + device.vram_used_mb) * _MIB
            found.append(DeviceMemory(device.index, available, total, moving["coming"] + moving["leaving"]))
        return found


def _is_known(config: EngineConfig, memory: Sequence[DeviceMemory]) -> bool:
    """Whether there is a reading of every device that the load is to use."""
    if {each.index for each in memory if each.total}.issuperset(config.devices or (None,)):
        return True
    logger.warning("memory not estimated model=%s reason=free memory cannot be read", config.model_id)
    return False


def _name(index: int | None) -> str:
    return "host" if index is None else str(index)
