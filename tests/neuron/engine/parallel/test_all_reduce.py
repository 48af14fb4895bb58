"""Which way a sum takes, decided from times; and the sums themselves, among real processes over gloo."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from neuron.engine.parallel.all_reduce import (
    SIZES,
    AllReduce,
    Choice,
    Library,
    Symmetric,
    build_all_reduce,
    choose,
    slowest_times,
    symmetric_algorithms,
)
from neuron.engine.parallel.group import ParallelGroup
from torch import Tensor

CPU = torch.device("cpu")


class Named:
    """An algorithm that only says that it was taken."""

    def __init__(self, name: str, *, largest: int = 2**62) -> None:
        self.name = name
        self.largest = largest
        self.taken: list[int] = []

    def takes(self, x: Tensor) -> bool:
        return x.nbytes <= self.largest

    def __call__(self, x: Tensor) -> None:
        self.taken.append(x.nbytes)


def bytes_of(num_bytes: int) -> Tensor:
    return torch.zeros(num_bytes, dtype=torch.uint8)


def test_each_size_goes_the_way_that_was_fastest_for_the_next_measured_one() -> None:
    times = {
        "library": {100: 20.0, 1000: 20.0, 10_000: 20.0},
        "one_shot": {100: 5.0, 1000: 18.0},
        "two_shot": {100: 6.0, 1000: 9.0, 10_000: 30.0},
    }
    choice = choose(times)
    assert choice.by_size == {100: "one_shot", 1000: "two_shot", 10_000: "library"}
    assert [choice.name_for(size) for size in (1, 100, 101, 1000, 1001, 10_000, 10_001)] == (
        ["one_shot"] * 2 + ["two_shot"] * 2 + ["library"] * 3
    )


def test_what_is_hardly_faster_than_the_library_does_not_replace_it() -> None:
    assert choose({"library": {8: 10.0}, "one_shot": {8: 9.9}}).by_size == {8: "library"}
    assert choose({"library": {8: 10.0}}).by_size == {8: "library"}


@given(
    st.dictionaries(
        st.sampled_from(["one_shot", "two_shot", "multimem"]),
        st.dictionaries(st.sampled_from(SIZES), st.floats(1e-6, 1e-2)),
    ),
    st.lists(st.floats(1e-6, 1e-2), min_size=len(SIZES), max_size=len(SIZES)),
    st.integers(1, 2**26),
)
def test_no_choice_is_slower_than_the_library(
    others: dict[str, dict[int, float]], usual: list[float], num_bytes: int
) -> None:
    times = others | {"library": dict(zip(SIZES, usual, strict=True))}
    choice = choose(times)
    name = choice.name_for(num_bytes)
    larger = [size for size in SIZES if size >= num_bytes]
    if not larger:
        assert name == "library"
        return
    assert times[name][larger[0]] <= times["library"][larger[0]]


def test_a_message_that_an_algorithm_does_not_take_goes_through_the_library() -> None:
    library, small = Named("library"), Named("small", largest=50)
    all_reduce = AllReduce([library, small], Choice({100: "small"}))
    for size in (10, 50, 51, 100, 101, 10):
        all_reduce(bytes_of(size))
    assert small.taken == [10, 50, 10]
    assert library.taken == [51, 100, 101]
    fixed = Named("fixed")
    all_reduce.fix(fixed)
    all_reduce(bytes_of(10))
    all_reduce(bytes_of(1000))
    assert fixed.taken == [10, 1000]


def test_symmetric_algorithms_are_those_that_torch_and_the_switch_have() -> None:
    everything = SimpleNamespace(one_shot_all_reduce_out=0, two_shot_all_reduce_=0, multimem_all_reduce_=0)
    old = SimpleNamespace(two_shot_all_reduce_=0)

    def names(ops: object, *, has_multicast: bool) -> list[str]:
        found = symmetric_algorithms(bytes_of(64), "0", world_size=2, has_multicast=has_multicast, ops=ops)
        return [algorithm.name for algorithm in found]

    assert names(everything, has_multicast=True) == ["one_shot", "two_shot", "multimem"]
    assert names(everything, has_multicast=False) == ["one_shot", "two_shot"]
    assert names(old, has_multicast=True) == ["two_shot"]
    assert names(SimpleNamespace(), has_multicast=True) == []
    assert hasattr(torch.ops.symm_mem, "one_shot_all_reduce_out")
    assert not hasattr(torch.ops.symm_mem, "three_shot_all_reduce")


def test_symmetric_kernels_get_the_buffer_and_only_what_they_can_take() -> None:
    """With kernels that sum two ranks of which the other holds the same."""
    calls: list[tuple[str, int]] = []

    def into(mine: Tensor, operation: str, group: str, out: Tensor) -> None:
        calls.append((f"into {operation} {group}", mine.nbytes))
        out.copy_(2 * mine)

    def in_place(mine: Tensor, operation: str, group: str) -> None:
        calls.append((f"in place {operation} {group}", mine.nbytes))
        mine.mul_(2)

    ops = SimpleNamespace(one_shot_all_reduce_out=into, two_shot_all_reduce_=in_place)
    one, two = symmetric_algorithms(bytes_of(256), "g", world_size=2, has_multicast=False, ops=ops)
    for algorithm in (one, two):
        x = torch.arange(32, dtype=torch.bfloat16).view(4, 8)
        algorithm(x)
        assert torch.equal(x.flatten(), 2 * torch.arange(32, dtype=torch.bfloat16))
    assert calls == [("into sum g", 64), ("in place sum g", 64)]

    def takes(algorithm: Symmetric, numel: int, dtype: torch.dtype = torch.float32) -> bool:
        return algorithm.takes(torch.zeros(numel, dtype=dtype))

    assert takes(one, 4) and takes(one, 64) and not takes(one, 65) and not takes(one, 3) and not takes(one, 0)
    assert takes(two, 8) and not takes(two, 4)  # each rank has its part
    inside = torch.zeros(68)
    assert one.takes(inside[4:]) and not one.takes(inside[1:65])  # begins in the middle of 16 bytes
    assert not takes(one, 8, torch.float16) and not takes(one, 4, torch.int64)


def _sums(rank: int, world_size: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    try:
        # Every rank has measured otherwise; all take the slowest's times, and so the same way.
        times = {
            "library": {8: 4.0, 16: 3.0},
            "one_shot": {8: 1.0 + rank, 16: 3.0 - rank},
        }
        agreed = slowest_times(times, CPU)
        assert agreed == {"library": {8: 4.0, 16: 3.0}, "one_shot": {8: float(world_size), 16: 3.0}}, agreed

        group = ParallelGroup(rank, world_size)
        group.use(build_all_reduce(CPU, rank=rank, world_size=world_size))
        generator = torch.Generator().manual_seed(rank)
        for shape in ((1,), (3, 5), (70, 64)):
            x = torch.randn(shape, generator=generator)
            plain = x.clone()
            dist.all_reduce(plain)
            assert torch.equal(group.all_reduce(x.clone()), plain)
        # In rank order: a row's sum is the same alone and among others, in any place.
        group.sum_in_order()
        many = torch.randn(50, 33, generator=generator, dtype=torch.float32).to(torch.bfloat16)
        together = group.all_reduce(many.clone())
        parts = [torch.empty_like(many) for _ in range(world_size)]
        dist.all_gather(parts, many)
        in_order = parts[0].float()
        for part in parts[1:]:
            in_order += part.float()
        assert torch.equal(together, in_order.to(torch.bfloat16))
        for row in (0, 17, 49):
            assert torch.equal(group.all_reduce(many[row : row + 1].clone()), together[row : row + 1])
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 4])
def test_sums_of_real_processes(tmp_path: Path, world_size: int) -> None:
    # Processes of a server that has imported torch once, for all of them.
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    arguments = (world_size, f"file://{tmp_path / 'rendezvous'}")
    mp.start_processes(_sums, args=arguments, nprocs=world_size, start_method="forkserver")  # type: ignore[no-untyped-call]


def test_without_devices_the_library_is_all_there_is() -> None:
    all_reduce = build_all_reduce(CPU, rank=0, world_size=4)
    assert all_reduce.algorithm_for(bytes_of(10)).name == Library.name
    assert all_reduce.algorithm_for(bytes_of(2**20)).name == Library.name
