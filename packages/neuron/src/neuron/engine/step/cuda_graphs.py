"""Decode steps as CUDA graphs: what the host would launch again and again, recorded once and replayed by one call.

A graph repeats its launches with the arguments of the moment of recording: pointers, grids and every Python integer
that a launcher computed. So a graph is known by a key from which all of these follow, and is recorded from the key
alone (`BatchBuilder.graph_batch`), never from a step that happens to be there. What varies between two steps of one key
lies in memory at fixed addresses. (Replaying with another `max_seqlen_k` than that of the recording once halved the
accuracy of a serving engine, transformers#45323.)

All graphs share one memory pool, which works because they run one after the other on one stream. The largest is
recorded first, so that the pool has room for all others. A few are recorded at load and cover every batch size with
some padding; the others follow when the engine is idle.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

import torch

from neuron.checkpoint.layout import GRAPH_SIZES
from neuron.engine.errors import DeviceError, describe, is_capture_refusal, is_device_fault, is_out_of_memory
from neuron.engine.parallel.messages import Ending, GraphKey

logger = logging.getLogger(__name__)

# Recorded at load, beside the largest: with at most four times as many rows as it has, any step finds one of these.
_SIZES_AT_LOAD = (1, 4, 16, 64)
_MAX_PADDING = 4
# A key that so many steps have asked for is recorded between two steps of an engine that is never idle.
_STEPS_UNTIL_WORTH_IT = 64


_ENDS: tuple[Ending, ...] = ("tokens", "logits")


class Graph(Protocol):
    """What was recorded."""

    def replay(self) -> Any: ...

    def reset(self) -> Any:
        """Give up the recording and its hold on the pool."""
        ...


class GraphDevice(Protocol):
    """Records work instead of doing it."""

    def record(self, work: Callable[[], None]) -> Graph:
        """Into the pool that all recordings of this object share. Raises what `work` raises."""
        ...

    def release_pool(self) -> None:
        """Every recording has been reset: the memory they shared is free."""
        ...


class CudaGraphDevice:
    """torch.cuda.CUDAGraph on the current stream, or on one beside it where that is the default one."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None

    def record(self, work: Callable[[], None]) -> Graph:
        torch.cuda.synchronize()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.current_stream()
        if stream == torch.cuda.default_stream():
            self._stream = stream = self._stream or torch.cuda.Stream()  # type: ignore[no-untyped-call]
        graph = torch.cuda.CUDAGraph()
        # As `torch.cuda.graph` does, but without collecting garbage and emptying caches: a request may be waiting.
        with torch.cuda.stream(stream):
            # Of this thread alone: others may use the device's API.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            except BaseException:
                with contextlib.suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
        torch.cuda.synchronize()
        return graph

    def release_pool(self) -> None:
        self._pool = None


def graph_sizes(max_rows: int) -> list[int]:
    """The sizes of `GRAPH_SIZES` up to a step's most rows, which is one of them."""
    return sorted({size for size in GRAPH_SIZES if size < max_rows} | {min(max_rows, GRAPH_SIZES[-1])})


class StepGraphs:
    """The graphs of one model on one rank.

    run(key): does the work of a step of that key, from and to fixed places. warm_up(key): makes those places harmless,
    runs once for nothing but what first runs make (compiled kernels, workspaces), and returns when that is over. Ranks
    of a group are told to record and to replay by rank 0, so that all do it in the same order.
    """

    def __init__(
        self,
        device: GraphDevice,
        *,
        max_rows: int,
        max_context_len: int,
        run: Callable[[GraphKey], None],
        warm_up: Callable[[GraphKey], None],
    ) -> None:
        self._device = device
        self._max_context_len = max_context_len
        self._run = run
        self._warm_up = warm_up
        self._sizes = graph_sizes(max_rows)
        self._graphs: dict[GraphKey, Graph] = {}
        self._missed: Counter[GraphKey] = Counter()
        self._is_off = False
        self._queue: list[GraphKey] = []
        self._fill_queue()
        self.num_replays = 0
        self.num_misses = 0

    def _fill_queue(self) -> None:
        """Largest first; those that load with the model before all others, and sampled ones before the rest."""
        self._queue = self.keys_at_load()
        for ends_with in _ENDS:
            keys = [self._key(size, ends_with) for size in reversed(self._sizes)]
            self._queue += [key for key in keys if key not in self._queue]

    def _key(self, num_rows: int, ends_with: Ending) -> GraphKey:
        return GraphKey(num_rows, self._max_context_len, ends_with)

    def keys_at_load(self) -> list[GraphKey]:
        """Largest first."""
        sizes = {size for size in _SIZES_AT_LOAD if size in self._sizes} | {self._sizes[-1]}
        return [self._key(size, "tokens") for size in sorted(sizes, reverse=True)]

    @property
    def captured(self) -> list[GraphKey]:
        """In the order of recording."""
        return list(self._graphs)

    def find(self, num_rows: int, max_context_len: int, ends_with: Ending) -> GraphKey | None:
        """The graph for a step of so many decodes, the smallest that was recorded; None if it is to run without one."""
        best: GraphKey | None = None
        wanted: GraphKey | None = None
        if not self._is_off and max_context_len <= self._max_context_len:
            for size in self._sizes:
                if size < num_rows:
                    continue
                if size > _MAX_PADDING * num_rows:
                    break
                key = self._key(size, ends_with)
                if wanted is None:
                    wanted = key
                if key in self._graphs:
                    best = key
                    break
        if wanted is not None and best != wanted:
            self._missed[wanted] += 1
        if best is None:
            self.num_misses += 1
        else:
            self.num_replays += 1
        return best

    def replay(self, key: GraphKey) -> None:
        """Submit the work of `key` to the device."""
        self._graphs[key].replay()

    def next_key(self, *, is_idle: bool) -> GraphKey | None:
        """What to record next: anything when idle, else only what many steps have asked for. None: nothing."""
        if self._is_off:
            return None
        if is_idle:
            return self._queue[0] if self._queue else None
        worth = [key for key, steps in self._missed.items() if steps >= _STEPS_UNTIL_WORTH_IT and key in self._queue]
        return max(worth, key=self._missed.__getitem__, default=None)

    def record(self, key: GraphKey) -> bool:
        """Record one graph, while no step is under way. False where there is no memory for it, or where recording does
        not work at all: then steps go on without. Raises `DeviceError`."""
        if key in self._queue:
            self._queue.remove(key)
        if key in self._graphs:
            return True
        try:
            self._warm_up(key)  # what first runs make may not be made while recording
            self._graphs[key] = self._device.record(lambda: self._run(key))
        except DeviceError:
            raise
        except Exception as exc:
            if is_device_fault(exc) and not is_out_of_memory(exc) and not is_capture_refusal(exc):
                raise DeviceError("device", describe(exc)) from exc
            self._is_off = self._is_off or not is_out_of_memory(exc)
            logger.warning(
                "no CUDA graph for %s%s: %s", key, ", nor any other from now on" if self._is_off else "", describe(exc)
            )
            return False
        self._missed.pop(key, None)
        logger.debug("recorded the CUDA graph %s, %d to go", key, len(self._queue))
        return True

    def forget(self, key: GraphKey) -> None:
        """Another rank could not record it: it is never replayed."""
        graph = self._graphs.pop(key, None)
        if graph is not None:
            graph.reset()

    def forget_misses(self) -> None:
        """Steps so far do not count: they were made for warming up."""
        self._missed.clear()
        self.num_replays = self.num_misses = 0

    def drop(self) -> None:
        """Give up every graph and the pool; all are to be recorded again. For when their memory is needed, or when
        something they point to has moved."""
        self._reset()
        self._fill_queue()

    def close(self) -> None:
        """Give up every graph for good: before the communicator that some of them use goes."""
        self._reset()
        self._queue = []
        self._is_off = True

    def _reset(self) -> None:
        # The youngest first, as anything that others may rest on.
        for key in reversed(list(self._graphs)):
            graph = self._graphs.pop(key)
            with contextlib.suppress(RuntimeError):  # of a device that is lost already
                graph.reset()
        self._device.release_pool()
        self._missed.clear()
