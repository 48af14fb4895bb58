"""Budgets of a job, and what the kernel is told of them.

A job's processor time is bounded by an interval timer of its process, whose signal ends it; its memory by the limit on
private writable memory. Neither asks the program that runs there for its cooperation.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal

LOAD_CPU_S = 60.0
"""Of reading a tokenizer. The largest of the field take two seconds."""
LOAD_MEMORY_BYTES = 4 * 2**30
CPU_S_PER_MB = 2.0
"""What each 10^6 bytes of a body add to a job's processor time: text is tokenised at 1 to 5 MB/s."""
WALL_FACTOR = 10.0
WALL_FLOOR_S = 30.0
"""A job may wait for the processor, or for a disk, that much longer than it may compute."""

_PR_SET_PDEATHSIG = 1


def cpu_budget_s(base_s: float, num_bytes: int) -> float:
    """Processor seconds of a job whose body has `num_bytes`."""
    return base_s + CPU_S_PER_MB * num_bytes / 1e6


def wall_budget_s(cpu_s: float) -> float:
    return WALL_FLOOR_S + WALL_FACTOR * cpu_s


def limit_cpu(cpu_s: float) -> None:
    """From now on: this process ends by SIGPROF after so much processor time, of all its threads. 0 lifts it."""
    signal.setitimer(signal.ITIMER_PROF, cpu_s)


def limit_memory(more_bytes: int) -> None:
    """Private memory of this process: what it has now and so much more."""
    limit = _data_bytes() + more_bytes
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def end_with_parent(parent: int) -> None:
    """Be killed when the process `parent`, which must be our own, ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it was over before we asked
        os._exit(0)


def _data_bytes() -> int:
    """Private writable memory that the kernel counts against RLIMIT_DATA; 0 where it does not say."""
    try:
        with open("/proc/self/status", "rb") as status:  # noqa: PTH123 - pathlib is not imported in a worker
            for line in status:
                if line.startswith(b"VmData:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
