"""How much memory a host has for the engine, and how many threads: what torch does not tell."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None


def available_host_bytes() -> int:
    """Memory that can be allocated now without swapping, within the limit of the container if there is one."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
                break
    except (OSError, ValueError):
        pass
    limit, used = _read_int(_CGROUP / "memory.max"), _read_int(_CGROUP / "memory.current")
    if limit is not None and used is not None:
        available = min(available, max(limit - used, 0))
    return available


def total_host_bytes() -> int:
    """Memory of the host, or of the container if it is limited."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _read_int(_CGROUP / "memory.max")
    return total if limit is None else min(total, limit)


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
