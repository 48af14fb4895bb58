"""Facts of the host itself: a machine without accelerators is described by these alone."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


class HostFacts(msgspec.Struct, frozen=True):
    """cpu_count: cores this process may use. memory_total_mb: MiB, the smaller of the machine's and the cgroup's."""

    hostname: str
    os: str
    kernel: str
    cpu_count: int
    memory_total_mb: int


def read_host_facts() -> HostFacts:
    names = os.uname()
    return HostFacts(
        hostname=names.nodename or "unknown",
        os=names.sysname or "unknown",
        kernel=names.release or "unknown",
        cpu_count=len(os.sched_getaffinity(0)),
        memory_total_mb=memory_total_mb(),
    )


def memory_total_mb(*, meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int:
    """MiB of memory; 0 where the system does not say."""
    total = _meminfo_mb(meminfo, "MemTotal")
    limit = _cgroup_mb(cgroup / "memory.max")
    return min(total, limit) if total and limit is not None else total


def memory_free_mb(*, meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int:
    """MiB that a new process could take: available on the machine, and left within the cgroup's limit."""
    available = _meminfo_mb(meminfo, "MemAvailable")
    limit, used = _cgroup_mb(cgroup / "memory.max"), _cgroup_mb(cgroup / "memory.current")
    if limit is None or used is None:
        return available
    return min(available, max(0, limit - used))


def anonymous_bytes(pid: int, *, proc: Path = Path("/proc")) -> int:
    """Memory that would be free if the process were not: neither files it maps nor what it has yet to touch; 0 when
    it is gone."""
    try:
        lines = (proc / str(pid) / "status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


def _meminfo_mb(path: Path, key: str) -> int:
    try:
        for line in path.read_text(encoding="ascii").splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) // 1024
    except (OSError, ValueError, IndexError):
        return 0
    return 0


def _cgroup_mb(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
        return None if text == "max" else int(text) // 2**20
    except (OSError, ValueError):
        return None
