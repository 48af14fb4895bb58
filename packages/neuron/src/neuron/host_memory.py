"""Memory and processors of a host, within the limits of its container: what the daemon and the engine both go by."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CPUINFO = Path("/proc/cpuinfo")
_CGROUP = Path("/sys/fs/cgroup")


def available_host_bytes(*, meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int:
    """Memory that can be allocated now without swapping, within the limit of the container if there is one; 0 where the
    system does not say."""
    available = _meminfo_bytes(meminfo, "MemAvailable")
    limit, used = _read_int(cgroup / "memory.max"), _read_int(cgroup / "memory.current")
    if limit is not None and used is not None:
        available = min(available, max(limit - used, 0))
    return available


def total_host_bytes(*, meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int:
    """Memory of the host, or of the container if it is limited; 0 where the system does not say."""
    total = _meminfo_bytes(meminfo, "MemTotal")
    limit = _read_int(cgroup / "memory.max")
    return total if limit is None else min(total, limit)


def _meminfo_bytes(path: Path, key: str) -> int:
    try:
        for line in path.read_text(encoding="ascii").splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return 0


def _read_int(path: Path) -> int | None:
    """None for `max`, too."""
    try:
        return int(path.read_text(encoding="ascii").split()[0])
    except (OSError, ValueError, IndexError):
        return None


def _cgroup_cpus() -> int | None:
    """Whole CPUs that the container's quota allows."""
    try:
        quota, period = (_CGROUP / "cpu.max").read_text().split()[:2]
        return max(int(quota) // int(period), 1)
    except (OSError, ValueError):
        return None


def num_physical_cores() -> int:
    """Physical cores this process may run on: two threads of one core share the units that matrix products need."""
    allowed = os.sched_getaffinity(0)
    cores: set[str] = set()
    for cpu in allowed:
        try:
            siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
        except OSError:
            siblings = str(cpu)
        cores.add(siblings.strip())
    number = max(len(cores), 1)
    quota = _cgroup_cpus()
    return number if quota is None else min(number, quota)


@cache
def multiplies_bfloat16(*, cpuinfo: Path = _CPUINFO) -> bool:
    """Whether the processor has products of bfloat16 of its own (AMX or AVX512-BF16). Without them the library computes
    them slower than float32's. False for processors other than x86: there nothing was measured."""
    try:
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("flags"):
                return not {"amx_bf16", "avx512_bf16"}.isdisjoint(line.split())
    except OSError:
        pass
    return False
