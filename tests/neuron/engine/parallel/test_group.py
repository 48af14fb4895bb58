from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from neuron.engine.parallel.group import ParallelGroup


def test_a_group_of_one_needs_no_process_group() -> None:
    group = ParallelGroup.single()
    x = torch.arange(6.0).view(2, 3)
    assert group.all_reduce(x) is x
    assert group.all_gather(x) is x


@pytest.mark.parametrize(("rank", "world_size"), [(-1, 2), (2, 2), (0, 0)])
def test_a_rank_outside_of_its_group_is_refused(rank: int, world_size: int) -> None:
    with pytest.raises(ValueError, match="not in a group"):
        ParallelGroup(rank, world_size)


def _collectives(rank: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    try:
        group = ParallelGroup(rank, 2)
        x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]) * (10 if rank else 1)
        gathered = group.all_gather(x)
        assert gathered.tolist() == [[1, 2, 10, 20], [3, 4, 30, 40], [5, 6, 50, 60]], gathered
        assert group.all_gather(x[:, :1]).tolist() == [[1, 10], [3, 30], [5, 50]]
        uneven = torch.full((2, 1 + 2 * rank), float(rank))
        assert group.all_gather(uneven, [1, 3]).tolist() == [[0, 1, 1, 1], [0, 1, 1, 1]]
        assert group.all_reduce(x) is x
        assert x.tolist() == [[11, 22], [33, 44], [55, 66]]
        strided = torch.arange(12.0).view(3, 4)[:, :3]
        assert group.all_reduce(strided).tolist() == [[0, 2, 4], [8, 10, 12], [16, 18, 20]]
    finally:
        dist.destroy_process_group()


def test_collectives_between_two_processes(tmp_path: Path) -> None:
    mp.spawn(_collectives, args=(f"file://{tmp_path / 'rendezvous'}",), nprocs=2)
