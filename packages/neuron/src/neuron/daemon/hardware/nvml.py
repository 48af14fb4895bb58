"""NVIDIA devices through NVML, as torch will number them.

Device indexes are those a child process sees: PCI bus order, narrowed and reordered by `CUDA_VISIBLE_DEVICES`.
No NVML library, or no driver, is a CPU-only host; a driver that does not match its library is a fault with a reason.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from cortex_core.fleet import DeviceHealth, DeviceInfo

logger = logging.getLogger(__name__)

T = TypeVar("T")

_KERNEL_MODULE = Path("/proc/driver/nvidia/version")
_MIB = 2**20


class DeviceInventory(msgspec.Struct, frozen=True):
    """What was found at start. `unavailable_reason` is set where devices exist but cannot be used."""

    devices: tuple[DeviceInfo, ...] = ()
    driver_version: str | None = None
    cuda_version: str | None = None
    unavailable_reason: str | None = None


class Nvml:
    """An open NVML session. `api` is the `pynvml` module (or, in tests, something like it)."""

    def __init__(self, api: Any, *, environ: Mapping[str, str], kernel_module: Path = _KERNEL_MODULE) -> None:
        self._api = api
        self._environ = environ
        self._kernel_module = kernel_module
        self._handles: list[Any] = []

    def open(self) -> DeviceInventory:
        """Start the session and list the devices. Never raises: every failure is a host without devices."""
        api = self._api
        try:
            api.nvmlInit()
        except api.NVMLError as exc:
            return self._unavailable(exc)
        try:
            handles = [api.nvmlDeviceGetHandleByIndex(index) for index in range(api.nvmlDeviceGetCount())]
            self._handles = self._visible(handles)
            return DeviceInventory(
                devices=tuple(self._describe(index, handle) for index, handle in enumerate(self._handles)),
                driver_version=self._optional(lambda: _text(api.nvmlSystemGetDriverVersion())),
                cuda_version=self._optional(lambda: _cuda_version(api.nvmlSystemGetCudaDriverVersion_v2())),
            )
        except api.NVMLError as exc:
            self._handles = []
            return self._unavailable(exc)

    def health(self) -> tuple[DeviceHealth, ...]:
        """One reading of every device; blocks in the driver. Raises `pynvml.NVMLError` when memory is unreadable."""
        return tuple(self._health_of(index, handle) for index, handle in enumerate(self._handles))

    def _health_of(self, index: int, handle: Any) -> DeviceHealth:
        api = self._api
        memory = api.nvmlDeviceGetMemoryInfo(handle)
        return DeviceHealth(
            index=index,
            vram_used_mb=int(memory.used) // _MIB,
            vram_free_mb=int(memory.free) // _MIB,
            utilization_pct=self._optional(lambda: int(api.nvmlDeviceGetUtilizationRates(handle).gpu)) or 0,
            temp_c=self._optional(lambda: int(api.nvmlDeviceGetTemperature(handle, api.NVML_TEMPERATURE_GPU))) or 0,
        )

    def _describe(self, index: int, handle: Any) -> DeviceInfo:
        api = self._api
        capability = self._optional(lambda: api.nvmlDeviceGetCudaComputeCapability(handle))
        return DeviceInfo(
            index=index,
            name=_text(api.nvmlDeviceGetName(handle)),
            vram_total_mb=int(api.nvmlDeviceGetMemoryInfo(handle).total) // _MIB,
            compute_capability="" if capability is None else f"{capability[0]}.{capability[1]}",
        )

    def _visible(self, handles: list[Any]) -> list[Any]:
        """Apply CUDA_VISIBLE_DEVICES as the CUDA runtime does: in its order, up to the first unknown entry."""
        wanted = self._environ.get("CUDA_VISIBLE_DEVICES")
        if wanted is None:
            return handles
        uuids = [_text(self._api.nvmlDeviceGetUUID(handle)) for handle in handles]
        visible: list[Any] = []
        for entry in (part.strip() for part in wanted.split(",")):
            if entry.isdigit() and int(entry) < len(handles):
                visible.append(handles[int(entry)])
                continue
            matches = [handle for handle, uuid in zip(handles, uuids, strict=True) if entry and uuid.startswith(entry)]
            if len(matches) != 1:
                if entry and entry != "-1":
                    logger.warning("CUDA_VISIBLE_DEVICES entry %r names no single device; it ends the list", entry)
                break
            visible.append(matches[0])
        return visible

    def _unavailable(self, error: Exception) -> DeviceInventory:
        api = self._api
        if isinstance(error, _error_types(api, "NVMLError_LibraryNotFound", "NVMLError_DriverNotLoaded")):
            logger.info("no NVIDIA driver here (%s): this host serves on its CPU", error)
            return DeviceInventory()
        if isinstance(error, _error_types(api, "NVMLError_LibRmVersionMismatch")):
            reason = (
                "NVIDIA driver/library version mismatch: the NVML library is "
                f"{self._library_version() or 'unknown'}, the loaded kernel module is "
                f"{self._module_version() or 'unknown'}; reboot to load the installed driver"
            )
        else:
            reason = f"the NVIDIA driver cannot be used: {error}"
        logger.error("%s", reason)
        return DeviceInventory(unavailable_reason=reason)

    def _library_version(self) -> str | None:
        return self._optional(lambda: _text(self._api.nvmlSystemGetDriverVersion())) or self._optional(
            lambda: _text(self._api.nvmlSystemGetNVMLVersion())
        )

    def _module_version(self) -> str | None:
        try:
            match = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", self._kernel_module.read_text(encoding="utf-8"))
        except OSError:
            return None
        return match[1] if match else None

    def _optional(self, read: Callable[[], T]) -> T | None:
        """A reading that some devices do not support."""
        try:
            return read()
        except self._api.NVMLError:
            return None


def open_nvml(environ: Mapping[str, str]) -> tuple[Nvml | None, DeviceInventory]:
    """The session of this host, or None where the binding itself is missing."""
    try:
        import pynvml
    except ImportError:
        return None, DeviceInventory()
    nvml = Nvml(pynvml, environ=environ)
    return nvml, nvml.open()


def _error_types(api: Any, *names: str) -> tuple[type[Exception], ...]:
    return tuple(getattr(api, name) for name in names if hasattr(api, name))


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
