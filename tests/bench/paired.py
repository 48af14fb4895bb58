"""Two builds measured in turn: processor time of process trees, and intervals of paired ratios."""

from __future__ import annotations

import os
import random
import statistics
from collections.abc import Sequence
from pathlib import Path

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def tree(root: int) -> list[int]:
    """Pids of a process and of all that descend from it."""
    pids = [root]
    for pid in pids:
        for task in _tasks(pid):
            try:
                pids += [int(child) for child in (task / "children").read_text().split()]
            except OSError:
                continue
    return pids


def cpu_s(root: int) -> dict[str, float]:
    """Processor seconds of a process tree, by what each process is, those that it has reaped included.

    A thread's time is read in nanoseconds (schedstat); that of children that have ended in ticks of 10 ms.
    """
    seconds: dict[str, float] = {}
    for pid in tree(root):
        name = _kind(pid)
        spent = sum(_on_cpu_s(task) for task in _tasks(pid)) + _reaped_s(pid)
        seconds[name] = seconds.get(name, 0.0) + spent
    return seconds


def interval(ratios: Sequence[float], *, share: float = 0.9, draws: int = 5000) -> tuple[float, float]:
    """Bootstrap interval of the mean of paired ratios."""
    rng = random.Random(0)
    means = sorted(statistics.fmean(rng.choices(ratios, k=len(ratios))) for _ in range(draws))
    cut = (1 - share) / 2
    return means[int(cut * draws)], means[int((1 - cut) * draws) - 1]


def _tasks(pid: int) -> list[Path]:
    try:
        return list(Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return []


def _on_cpu_s(task: Path) -> float:
    try:
        return int((task / "schedstat").read_text().split()[0]) / 1e9
    except OSError:
        return 0.0


def _reaped_s(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[13]) + int(fields[14])) * _TICK_S


def _kind(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return "gone"
    if b"neuron.engine.worker" in words or b"neuron.worker" in words:  # the latter in builds before the wings
        return "engine"
    return "text" if b"neuron.daemon.text_workers" in words else "daemon"
