"""The order in which a device works, on a CPU, and copies from and to it."""

from __future__ import annotations

import pytest
import torch
from neuron.engine.device_stream import ImmediateStream, stream_of, to_device, to_host

from tests.neuron.engine.lazy_stream import LazyStream

CPU = torch.device("cpu")


def test_a_cpu_is_done_when_it_returns() -> None:
    stream = stream_of(CPU)
    assert isinstance(stream, ImmediateStream) and not stream.is_deferred
    done: list[int] = []
    stream.submit(lambda: done.append(1))
    assert done == [1]
    stream.record().wait()


def test_what_cannot_be_begun_is_raised_where_it_is_submitted() -> None:
    def fail() -> None:
        raise RuntimeError("shape error")

    with pytest.raises(RuntimeError, match="shape error"):
        ImmediateStream().submit(fail)


def test_a_deferred_device_does_all_before_a_fence_in_order_and_nothing_behind_it() -> None:
    """The stand-in that tests find too early readers with."""
    stream = LazyStream()
    done: list[int] = []
    stream.submit(lambda: done.append(1))
    stream.submit(lambda: done.append(2))
    fence = stream.record()
    stream.submit(lambda: done.append(3))
    assert stream.is_deferred and done == []
    fence.wait()
    assert done == [1, 2]


def test_a_copy_for_the_host_does_not_change_with_the_device() -> None:
    values = torch.arange(4)
    host = to_host(values)
    values.add_(1)
    assert host.tolist() == [0, 1, 2, 3]
    assert to_device(values, CPU) is values, "a CPU needs none"
