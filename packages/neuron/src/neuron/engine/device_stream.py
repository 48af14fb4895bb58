"""The order in which a device works: what the host submits runs in that order, perhaps later.

The runner is written against `Stream`: what it submits may only use tensors and what was taken from the host's state
before. On the CPU it runs at once. On CUDA it runs at once too and launches kernels, which is what the device then does
in order. Tests have one that does nothing before somebody waits for it, so that whoever reads a result too early, or
overwrites an input too early, is found without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Fence(Protocol):
    """A place in the order."""

    def wait(self) -> None:
        """Return when everything submitted before is done. Raises what the device has to report of it."""
        ...


class Stream(Protocol):
    """One device's queue of work, filled by one thread.

    is_deferred: results, and the reading of inputs, come after `submit` has returned.
    """

    is_deferred: bool

    def submit(self, work: Callable[[], None]) -> None:
        """Do this after everything submitted before. Raises what cannot be begun (out of memory, a shape error)."""
        ...

    def record(self) -> Fence:
        """The place after everything submitted so far."""
        ...


class _Done:
    def wait(self) -> None:
        pass


class ImmediateStream:
    """A CPU: whatever is submitted is done when `submit` returns."""

    is_deferred = False

    def __init__(self) -> None:
        self._done = _Done()

    def submit(self, work: Callable[[], None]) -> None:
        work()

    def record(self) -> Fence:
        return self._done


class _Recorded:
    def __init__(self) -> None:
        # Blocking: the thread sleeps while it waits, and leaves the interpreter to the one that reads the socket.
        self._event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._event.record()

    def wait(self) -> None:
        self._event.synchronize()


class CudaStream:
    """The current CUDA stream of the device thread."""

    is_deferred = True

    def submit(self, work: Callable[[], None]) -> None:
        work()

    def record(self) -> Fence:
        return _Recorded()


def stream_of(device: torch.device) -> Stream:
    """The queue of a device."""
    return CudaStream() if device.type == "cuda" else ImmediateStream()


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A copy on the device that the host does not wait for: from ordinary memory, CUDA would first finish what runs."""
    if device.type == "cpu":
        return values
    return values.pin_memory().to(device, non_blocking=True)


def to_host(values: Tensor) -> Tensor:
    """A copy for the host, valid once the stream has come so far."""
    if values.device.type == "cpu":
        return values.clone()
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values, non_blocking=True)
