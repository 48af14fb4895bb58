"""Devices as NVML tells of them, through a stand-in for its binding."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cortex_core.fleet import DeviceHealth, DeviceInfo
from neuron.daemon.hardware.host import HostFacts, memory_free_mb, read_host_facts
from neuron.daemon.hardware.monitor import HardwareMonitor
from neuron.daemon.hardware.nvml import Nvml
from neuron.host_memory import available_host_bytes, total_host_bytes

MIB = 2**20


class NvmlError(Exception):
    pass


class LibraryNotFound(NvmlError):
    pass


class DriverNotLoaded(NvmlError):
    pass


class VersionMismatch(NvmlError):
    pass


class FakeNvml:
    """The part of `pynvml` that is used. Handles are indexes."""

    NVMLError = NvmlError
    NVMLError_LibraryNotFound = LibraryNotFound
    NVMLError_DriverNotLoaded = DriverNotLoaded
    NVMLError_LibRmVersionMismatch = VersionMismatch
    NVML_TEMPERATURE_GPU = 0

    def __init__(self, num_devices: int = 2, *, init: Exception | None = None) -> None:
        self.num_devices = num_devices
        self.init = init
        self.broken = False

    def nvmlInit(self) -> None:
        if self.init is not None:
            raise self.init

    def nvmlDeviceGetCount(self) -> int:
        return self.num_devices

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"GPU-{handle}{handle}{handle}-x"

    def nvmlDeviceGetName(self, handle: int) -> bytes:
        return f"Card {handle}".encode()

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        if self.broken:
            raise NvmlError("GPU is lost")
        return SimpleNamespace(total=1000 * MIB, used=(100 + handle) * MIB, free=(900 - handle) * MIB)

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> tuple[int, int]:
        return 9, 0

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
        if handle == 1:
            raise NvmlError("Not Supported")
        return SimpleNamespace(gpu=77)

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:
        return 50 + handle

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.159"

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        return 13000

    def nvmlSystemGetNVMLVersion(self) -> str:
        return "13.580.159"


def test_devices_are_described_in_order() -> None:
    found = Nvml(FakeNvml(), environ={}).open()
    assert found.devices == (DeviceInfo(0, "Card 0", 1000, "9.0"), DeviceInfo(1, "Card 1", 1000, "9.0"))
    assert (found.driver_version, found.cuda_version, found.unavailable_reason) == ("580.159", "13.0", None)


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        ("1,0", ["Card 1", "Card 0"]),
        ("1", ["Card 1"]),
        ("GPU-000", ["Card 0"]),
        ("", []),
        ("-1", []),
        ("0,9,1", ["Card 0"]),
        ("GPU-none", []),
    ],
)
def test_visible_devices_are_numbered_as_cuda_numbers_them(visible: str, names: list[str]) -> None:
    found = Nvml(FakeNvml(), environ={"CUDA_VISIBLE_DEVICES": visible}).open()
    assert [device.name for device in found.devices] == names
    assert [device.index for device in found.devices] == list(range(len(names)))


def test_health_survives_what_a_card_does_not_report() -> None:
    nvml = Nvml(FakeNvml(), environ={})
    nvml.open()
    assert nvml.health() == (DeviceHealth(0, 100, 900, 77, 50), DeviceHealth(1, 101, 899, 0, 51))


@pytest.mark.parametrize("error", [LibraryNotFound("no library"), DriverNotLoaded("no driver")])
def test_a_host_without_a_driver_is_a_cpu_host(error: Exception) -> None:
    found = Nvml(FakeNvml(init=error), environ={}).open()
    assert found.devices == () and found.unavailable_reason is None


def test_F36_a_driver_that_was_updated_under_us_is_named(tmp_path: Path) -> None:
    module = tmp_path / "version"
    module.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\n")
    found = Nvml(FakeNvml(init=VersionMismatch("mismatch")), environ={}, kernel_module=module).open()
    assert found.unavailable_reason is not None and found.devices == ()
    assert "580.159" in found.unavailable_reason and "570.86.15" in found.unavailable_reason
    assert "reboot" in found.unavailable_reason


def test_any_other_fault_has_its_reason() -> None:
    found = Nvml(FakeNvml(init=NvmlError("Insufficient Permissions")), environ={}).open()
    assert found.unavailable_reason is not None and "Insufficient Permissions" in found.unavailable_reason


def monitor(api: FakeNvml) -> HardwareMonitor:
    nvml = Nvml(api, environ={})
    facts = HostFacts("host", "Linux", "6.1", 8, 32_000)
    return HardwareMonitor(harnesses=("candle",), host=facts, session=(nvml, nvml.open()), interval_s=0.001)


def test_discovery_joins_host_and_devices() -> None:
    found = monitor(FakeNvml()).discovery
    assert (found.hostname, found.cpu_count, found.memory_total_mb, len(found.devices)) == ("host", 8, 32_000, 2)


def test_a_failed_reading_keeps_the_last() -> None:
    api = FakeNvml()
    watch = monitor(api)
    before = watch.reading.devices
    api.broken = True
    watch.poll()
    watch.poll()
    assert watch.reading.devices == before != ()


def test_the_poller_reads_until_it_is_stopped() -> None:
    watch = monitor(FakeNvml())
    first = watch.reading
    watch.start()
    while watch.reading is first:
        watch._stop.wait(0.001)
    watch.stop()
    assert watch._thread is not None
    watch._thread.join(60)
    assert not watch._thread.is_alive()


def test_the_host_describes_itself() -> None:
    facts = read_host_facts()
    assert facts.os == "Linux" and facts.cpu_count >= 1 and facts.memory_total_mb > 0
    assert 0 < memory_free_mb() <= facts.memory_total_mb


@pytest.mark.parametrize(
    ("limit", "used", "total", "free"), [("max", "0", 8000, 4000), (str(6000 * MIB), str(5000 * MIB), 6000, 1000)]
)
def test_a_container_has_the_memory_it_may_use(tmp_path: Path, limit: str, used: str, total: int, free: int) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(f"MemTotal: {8000 * 1024} kB\nMemAvailable: {4000 * 1024} kB\n")
    (tmp_path / "memory.max").write_text(limit)
    (tmp_path / "memory.current").write_text(used)
    assert total_host_bytes(meminfo=meminfo, cgroup=tmp_path) == total * 2**20
    assert available_host_bytes(meminfo=meminfo, cgroup=tmp_path) == free * 2**20
    assert total_host_bytes(meminfo=tmp_path / "gone", cgroup=tmp_path / "gone") == 0
