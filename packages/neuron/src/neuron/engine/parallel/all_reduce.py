"""All-reduce over the ranks: for each size of message the algorithm that is fastest on these devices.

A decode step sums a few kilobytes twice a layer, where a library's collective spends its time on protocol; a prefill
step sums megabytes, where it is at its best. Between devices that reach each other's memory, the other algorithms are
those of torch's symmetric memory (`torch.distributed._symmetric_memory`):

- `one_shot`: every rank reads all others' buffers and sums them in rank order. One exchange, each byte read n times.
- `two_shot`: each rank sums its part and the others fetch it. Two exchanges, each byte read twice.
- `multimem`: the switch adds (NVLink SHARP), where there is one.
- `library`: NCCL, or gloo on the CPU.
- `gathered`: gather from all, and add up in rank order. Never the fastest, but its result does not depend on the size
  of the message, and it runs everywhere.

All but gloo can be captured in CUDA graphs. Which algorithm takes which size is measured when the ranks meet, and is
decided from the slowest rank's times, so that all decide the same.
"""

from __future__ import annotations

import logging
import socket
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

logger = logging.getLogger(__name__)

# Sizes that are measured, in bytes. A message goes the way of the next larger one.
SIZES = (16 * 2**10, 64 * 2**10, 256 * 2**10, 2**20, 4 * 2**20, 16 * 2**20)
_BUFFER_BYTES = SIZES[-1]
# An algorithm must be faster than the library by this much to replace it: measurements differ by a few percent.
_WORTH_IT = 0.95
_REPEATS = 10
_ROUNDS = 3
# Kernels of symmetric memory move 16 bytes at a time, and in two_shot and multimem each rank has an equal part.
_VECTOR_BYTES = 16
_SYMMETRIC_DTYPES = (torch.bfloat16, torch.float32)
_MAX_SYMMETRIC_RANKS = 8


class Algorithm(Protocol):
    """One way to sum a contiguous tensor over ranks, in place."""

    name: str

    def takes(self, x: Tensor) -> bool:
        """Whether this way is open to a tensor of this shape and dtype: the same answer on all ranks."""
        ...

    def __call__(self, x: Tensor) -> None:
        """x becomes the sum. Every rank calls it with the same shape."""
        ...


class Library:
    """What torch.distributed's backend does."""

    name = "library"

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        self._process_group = process_group

    def takes(self, x: Tensor) -> bool:
        return True

    def __call__(self, x: Tensor) -> None:
        dist.all_reduce(x, group=self._process_group)


class Gathered:
    """Every rank gathers all parts and adds them up in rank order, in float32: each element's sum is the same whatever
    else is in the message, which rings and trees, that cut messages into parts, do not promise."""

    name = "gathered"

    def __init__(self, world_size: int, process_group: dist.ProcessGroup | None = None) -> None:
        self._world_size = world_size
        self._process_group = process_group
        # Renamed in torch 2.13; the old name warns there.
        self._all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

    def takes(self, x: Tensor) -> bool:
        return True

    def __call__(self, x: Tensor) -> None:
        parts = torch.empty((self._world_size, x.numel()), dtype=x.dtype, device=x.device)
        self._all_gather(parts.view(-1), x.view(-1), group=self._process_group)
        total = parts[0].to(torch.float32, copy=True)
        for part in parts[1:]:
            total += part
        x.view(-1).copy_(total)


class Symmetric:
    """An algorithm of symmetric memory: copy into this rank's buffer, which the others see, and reduce there.

    The kernels begin and end with a barrier between the ranks' streams, so one buffer serves every call of a stream.
    buffer: [bytes] uint8, symmetric. reduce(buffer part in x's dtype, x) leaves the sum in x.
    """

    def __init__(self, name: str, buffer: Tensor, reduce: Callable[[Tensor, Tensor], None], *, unit_bytes: int) -> None:
        self.name = name
        self._buffer = buffer
        self._reduce = reduce
        self._unit_bytes = unit_bytes

    def takes(self, x: Tensor) -> bool:
        return (
            x.dtype in _SYMMETRIC_DTYPES
            and _is_aligned(x)
            and 0 < x.nbytes <= self._buffer.nbytes
            and x.nbytes % self._unit_bytes == 0
        )

    def __call__(self, x: Tensor) -> None:
        flat = x.view(-1)
        mine = self._buffer[: x.nbytes].view(x.dtype)
        mine.copy_(flat)
        self._reduce(mine, flat)


def symmetric_algorithms(
    buffer: Tensor, group_name: str, *, world_size: int, has_multicast: bool, ops: Any = None
) -> list[Symmetric]:
    """The algorithms over a buffer that has met its peers. ops: `torch.ops.symm_mem`; those that exist are used."""
    ops = torch.ops.symm_mem if ops is None else ops
    shared = _VECTOR_BYTES * world_size
    algorithms: list[Symmetric] = []

    def in_place(operation: Any) -> Callable[[Tensor, Tensor], None]:
        def reduce(mine: Tensor, x: Tensor) -> None:
            operation(mine, "sum", group_name)
            x.copy_(mine)

        return reduce

    if hasattr(ops, "one_shot_all_reduce_out"):
        algorithms.append(
            Symmetric(
                "one_shot",
                buffer,
                lambda mine, x: ops.one_shot_all_reduce_out(mine, "sum", group_name, x),
                unit_bytes=_VECTOR_BYTES,
            )
        )
    if hasattr(ops, "two_shot_all_reduce_"):
        algorithms.append(Symmetric("two_shot", buffer, in_place(ops.two_shot_all_reduce_), unit_bytes=shared))
    if has_multicast and hasattr(ops, "multimem_all_reduce_"):
        algorithms.append(Symmetric("multimem", buffer, in_place(ops.multimem_all_reduce_), unit_bytes=shared))
    return algorithms


@dataclass(frozen=True, slots=True)
class Choice:
    """Which algorithm takes which size: names by measured size, ascending. Empty: always the library."""

    by_size: Mapping[int, str] = field(default_factory=dict)

    def name_for(self, num_bytes: int) -> str:
        """The algorithm of a message: that of the next measured size, and the library beyond the largest."""
        sizes = list(self.by_size)
        index = bisect_left(sizes, num_bytes)
        return self.by_size[sizes[index]] if index < len(sizes) else Library.name


def choose(times: Mapping[str, Mapping[int, float]]) -> Choice:
    """The fastest algorithm for each size. times: seconds by algorithm and size, those of the slowest rank; the
    library's must be there, and it keeps what nobody does clearly faster."""
    by_size = {}
    for size, usual in sorted(times[Library.name].items()):
        others = {name: found[size] for name, found in times.items() if name != Library.name and size in found}
        best = min(others, key=lambda name: others[name], default=Library.name)
        by_size[size] = best if best in others and others[best] < _WORTH_IT * usual else Library.name
    return Choice(by_size)


class AllReduce:
    """The all-reduce as a group uses it. algorithms: the library always among them."""

    def __init__(self, algorithms: Sequence[Algorithm], choice: Choice | None = None) -> None:
        self._algorithms = {algorithm.name: algorithm for algorithm in algorithms}
        self.choice = choice or Choice()
        self._decided: dict[tuple[int, torch.dtype, bool], Algorithm] = {}
        self._always: Algorithm | None = None

    def algorithm_for(self, x: Tensor) -> Algorithm:
        """The way a tensor takes, decided once for each size: by what is equal on all ranks alone, so they agree."""
        if self._always is not None:
            return self._always
        key = (x.nbytes, x.dtype, _is_aligned(x))
        algorithm = self._decided.get(key)
        if algorithm is None:
            algorithm = self._algorithms[self.choice.name_for(x.nbytes)]
            if not algorithm.takes(x):
                algorithm = self._algorithms[Library.name]
            self._decided[key] = algorithm
        return algorithm

    def __call__(self, x: Tensor) -> None:
        """x, contiguous, becomes the sum over ranks."""
        self.algorithm_for(x)(x)

    def fix(self, algorithm: Algorithm) -> None:
        """From now on every sum goes this way, whatever its size. On all ranks or none."""
        self._always = algorithm


def build_all_reduce(
    device: torch.device, *, rank: int, world_size: int, use_symmetric_memory: bool = True
) -> AllReduce:
    """The all-reduce of torch.distributed's default group on these devices; every rank calls this at the same place."""
    library = Library()
    symmetric: list[Symmetric] = []
    if device.type == "cuda" and use_symmetric_memory and world_size <= _MAX_SYMMETRIC_RANKS:
        opened = _open_symmetric(device, world_size)
        symmetric = [
            algorithm for algorithm in opened if _agree(_is_right(algorithm, device, rank, world_size), device)
        ]
    if not symmetric:
        return AllReduce([library])
    algorithms: list[Algorithm] = [library, *symmetric]
    times = slowest_times({algorithm.name: measure(algorithm, device) for algorithm in algorithms}, device)
    choice = choose(times)
    torch.cuda.empty_cache()  # what measuring took is about to be counted as free
    for size, name in choice.by_size.items():
        found = " ".join(f"{other}={times[other][size] * 1e6:.1f}" for other in times if size in times[other])
        logger.info("all-reduce bytes=%d algorithm=%s microseconds %s", size, name, found)
    return AllReduce(algorithms, choice)


def measure(algorithm: Algorithm, device: torch.device) -> dict[int, float]:
    """Seconds of one sum on a CUDA device by size, as in a decode step: inside of a CUDA graph."""
    found = {}
    for size in SIZES:
        x = torch.zeros(size // 2, dtype=torch.bfloat16, device=device)
        if not algorithm.takes(x):
            continue
        for _ in range(2):
            algorithm(x)
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        # Other threads (the backend's own) may look at their events meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for _ in range(_REPEATS):
                algorithm(x)
        graph.replay()
        seconds = []
        for _ in range(_ROUNDS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            seconds.append(begin.elapsed_time(end) / 1e3 / _REPEATS)
        found[size] = min(seconds)
        graph.reset()  # before the collectives that it holds can go
    return found


def slowest_times(times: Mapping[str, Mapping[int, float]], device: torch.device) -> dict[str, dict[int, float]]:
    """The largest of all ranks' times: equal on every rank, and so is what is chosen by it.

    Every rank has the same algorithms and sizes, which follow from agreed facts.
    """
    keys = [(name, size) for name in sorted(times) for size in sorted(times[name])]
    agreed = torch.tensor([times[name][size] for name, size in keys], dtype=torch.float64, device=device)
    dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
    result: dict[str, dict[int, float]] = {name: {} for name in times}
    for (name, size), seconds in zip(keys, agreed.tolist(), strict=True):
        result[name][size] = seconds
    return result


def _is_aligned(x: Tensor) -> bool:
    """Allocations begin at multiples of more, so this is a matter of where in one a tensor lies."""
    return x.data_ptr() % _VECTOR_BYTES == 0


def _agree(is_so: bool, device: torch.device) -> bool:
    """Whether it is so on every rank."""
    everywhere = torch.tensor([int(is_so)], device=device)
    dist.all_reduce(everywhere, op=dist.ReduceOp.MIN)
    return bool(everywhere.item())


def _open_symmetric(device: torch.device, world_size: int) -> list[Symmetric]:
    """The algorithms of symmetric memory that these devices allow; none where they cannot see each other's memory."""
    if not _agree(_reaches_peers(device, world_size), device):
        return []
    try:
        import torch.distributed._symmetric_memory as symmetric_memory

        group = dist.group.WORLD
        assert group is not None
        name = group.group_name
        buffer = symmetric_memory.empty(_BUFFER_BYTES, dtype=torch.uint8, device=device)
        try:
            handle = symmetric_memory.rendezvous(buffer, name)
        except RuntimeError:
            # Some versions want to be told of a group first, and say so before they talk to anybody.
            symmetric_memory.enable_symm_mem_for_group(name)
            handle = symmetric_memory.rendezvous(buffer, name)
        has_multicast = bool(getattr(handle, "multicast_ptr", 0))
        problem = None
    except (RuntimeError, ImportError, AttributeError) as exc:
        problem = exc
    if not _agree(problem is None, device):
        logger.warning("symmetric memory is not used: %s", problem or "another rank has none")
        return []
    has_multicast = _agree(has_multicast, device)
    return symmetric_algorithms(buffer, name, world_size=world_size, has_multicast=has_multicast)


def _reaches_peers(device: torch.device, world_size: int) -> bool:
    """Whether all ranks are on this host and this device can read the others' memory."""
    places: list[tuple[str, int]] = [("", 0)] * world_size
    dist.all_gather_object(places, (socket.gethostname(), device.index))
    mine = (socket.gethostname(), device.index)
    return all(
        place == mine or (place[0] == mine[0] and torch.cuda.can_device_access_peer(device, place[1]))
        for place in places
    )


def _is_right(algorithm: Algorithm, device: torch.device, rank: int, world_size: int) -> bool:
    """Sums of known values, small and large; also makes what is made on first use.

    Both are always asked for: a rank whose first sum is wrong must not leave the others waiting in the second.
    """
    is_right = True
    for numel in (64 * world_size, SIZES[2] // 2):
        x = torch.full((numel,), float(rank + 1), dtype=torch.bfloat16, device=device)
        if algorithm.takes(x):
            algorithm(x)
            is_right &= bool((x == float(sum(range(1, world_size + 1)))).all())
    if not is_right:
        logger.warning("all-reduce algorithm %s gives wrong sums and is not used", algorithm.name)
    return is_right
