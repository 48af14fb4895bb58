"""The cached view of the hardware: discovered once, its health polled by one background thread.

A driver call can block for as long as the driver likes, so neither the event loop nor any pool that requests use
ever makes one; endpoints read what the last poll left here.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping

import msgspec
from cortex_core.fleet import DeviceHealth, DiscoveryResponse

from neuron.daemon.hardware.host import HostFacts, memory_free_mb, read_host_facts
from neuron.daemon.hardware.nvml import DeviceInventory, Nvml, open_nvml

logger = logging.getLogger(__name__)

POLL_INTERVAL_S = 5.0


class HardwareReading(msgspec.Struct, frozen=True):
    """Devices and free host memory (MiB) at one moment."""

    devices: tuple[DeviceHealth, ...] = ()
    memory_free_mb: int = 0


class HardwareMonitor:
    """Discovery at construction, then a health reading every `interval_s` between `start` and `stop`."""

    def __init__(
        self,
        *,
        harnesses: tuple[str, ...],
        environ: Mapping[str, str] | None = None,
        interval_s: float = POLL_INTERVAL_S,
        host: HostFacts | None = None,
        session: tuple[Nvml | None, DeviceInventory] | None = None,
    ) -> None:
        self._nvml, inventory = session or open_nvml(os.environ if environ is None else environ)
        host = host or read_host_facts()
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._was_failing = False
        self.discovery = DiscoveryResponse(
            hostname=host.hostname,
            os=host.os,
            kernel=host.kernel,
            cuda_version=inventory.cuda_version,
            driver_version=inventory.driver_version,
            devices=inventory.devices,
            harnesses=harnesses,
            cuda_unavailable_reason=inventory.unavailable_reason,
            cpu_count=host.cpu_count,
            memory_total_mb=host.memory_total_mb,
        )
        self.reading = HardwareReading(memory_free_mb=memory_free_mb())
        self.poll()

    def poll(self) -> None:
        """Take one reading. On failure the devices' last one stays (absent evidence is no evidence of failure)."""
        devices = self.reading.devices
        if self._nvml is not None:
            try:
                devices = self._nvml.health()
                self._was_failing = False
            except Exception as exc:  # a binding that breaks in a new way must not end the poller
                if not self._was_failing:
                    logger.warning("device health cannot be read, the last reading stays: %s", exc)
                self._was_failing = True
        self.reading = HardwareReading(devices=devices, memory_free_mb=memory_free_mb())

    def free_mb(self) -> dict[int, int]:
        """Free memory by device, as last read."""
        return {device.index: device.vram_free_mb for device in self.reading.devices}

    def measure(self) -> HardwareReading:
        """A fresh reading; blocks in the driver."""
        self.poll()
        return self.reading

    def start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="hardware-monitor", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Does not wait: the thread may be inside the driver, and it is a daemon thread."""
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            self.poll()
