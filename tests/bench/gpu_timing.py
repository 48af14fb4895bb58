"""Device time of GPU work, and the ceilings of the device that it is compared with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Work = Callable[[], object]


@dataclass(frozen=True)
class Ceilings:
    """Measured in this run. bytes_per_s: a copy, bytes read and written; flops_per_s: a large matrix product."""

    bytes_per_s: float
    flops_per_s: float

    def seconds(self, *, num_bytes: float = 0.0, flops: float = 0.0) -> float:
        """The least time that moving these bytes and computing these operations can take, done at once."""
        return max(num_bytes / self.bytes_per_s, flops / self.flops_per_s)


class Timer:
    """Times work on one device: CUDA events around graph replays, or a wall clock on the CPU."""

    def __init__(self, device: torch.device, *, rounds: int) -> None:
        self.device = device
        self.rounds = rounds
        self.is_cuda = device.type == "cuda"

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def rounds_of(self, work: Work) -> list[float]:
        """Seconds of each of `rounds` runs of `work`, after one that is not counted."""
        work()
        self.synchronize()
        seconds = []
        for _ in range(self.rounds):
            if self.is_cuda:
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                work()
                end.record()
                end.synchronize()
                seconds.append(begin.elapsed_time(end) / 1e3)
            else:
                started = time.perf_counter()
                work()
                seconds.append(time.perf_counter() - started)
        return seconds

    def device_seconds(self, works: Sequence[Work]) -> float:
        """Median device time of one of `works`, which do the same on different memory (so that L2 does not help).

        On CUDA they are captured into one graph, so that launches cost the host nothing; on the CPU they just run.
        """
        if not self.is_cuda:
            return statistics.median(self.rounds_of(lambda: [work() for work in works])) / len(works)
        replay = capture(lambda: [work() for work in works])
        return statistics.median(self.rounds_of(replay)) / len(works)

    def wall_seconds(self, work: Work) -> list[float]:
        """Seconds until the result is there, host time included."""
        work()
        self.synchronize()
        seconds = []
        for _ in range(self.rounds):
            started = time.perf_counter()
            work()
            self.synchronize()
            seconds.append(time.perf_counter() - started)
        return seconds


def capture(work: Work, *, before: Work = lambda: None) -> Work:
    """A CUDA graph of `work`; the returned function replays it. `before` runs ahead of each warm-up and the capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            before()
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    before()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def measure_ceilings(timer: Timer, *, small: bool) -> Ceilings:
    """Memory bandwidth from a copy of 4 GiB, arithmetic from a bf16 product of 8192³ on random data."""

    def copy() -> float:
        source = torch.zeros(2**16 if small else 2**30, dtype=torch.float32, device=timer.device)
        target = torch.empty_like(source)
        seconds = statistics.median(timer.rounds_of(lambda: target.copy_(source)))
        return 2 * source.numel() * source.element_size() / seconds

    def product() -> float:
        size = 64 if small else 8192
        dtype = torch.float32 if small else torch.bfloat16
        left, right = (torch.randn(size, size, device=timer.device).to(dtype) for _ in range(2))
        return 2 * size**3 / statistics.median(timer.rounds_of(lambda: left @ right))

    return Ceilings(bytes_per_s=copy(), flops_per_s=product())
