"""Facts of the host itself: a machine without accelerators is described by these alone."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from neuron.host_memory import available_host_bytes, total_host_bytes


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


def memory_total_mb() -> int:
    """MiB of memory; 0 where the system does not say."""
    return total_host_bytes() // 2**20


def memory_free_mb() -> int:
    """MiB that a new process could take: available on the machine, and left within the cgroup's limit."""
    return available_host_bytes() // 2**20


def anonymous_bytes(pid: int, *, proc: Path = Path("/proc")) -> int:
    """Memory that would be free if the process were not: neither files it maps nor what it has yet to touch; 0 when
    it is gone."""
    try:
        lines = (proc / str(pid) / "status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))
