"""The ranks that share one model, and the collectives between them. A group of one is a no-op."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from neuron.engine.parallel.all_reduce import AllReduce, Gathered, Library

# Renamed in torch 2.13; the old name warns there.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class ParallelGroup:
    """A tensor-parallel group as one rank sees it.

    Layers are written against this class in their parallel form; with `world_size` 1 no collective is called and no
    process group needs to exist. `process_group`: None with more than one rank means torch.distributed's default
    group, which must then be initialised (NCCL on CUDA, gloo on the CPU). `shares`: relative sizes of the ranks'
    parts, in rank order; empty, also where equal ones were given, means equal parts. Raises `ValueError`.
    """

    def __init__(
        self,
        rank: int = 0,
        world_size: int = 1,
        process_group: dist.ProcessGroup | None = None,
        *,
        shares: Sequence[int] = (),
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in a group of {world_size}")
        if shares and (len(shares) != world_size or min(shares) < 1):
            raise ValueError(f"a group of {world_size} needs as many shares, each at least 1, got {list(shares)}")
        self.rank = rank
        self.world_size = world_size
        self.shares = tuple(shares) if len(set(shares)) > 1 else ()
        self._process_group = process_group
        self._sum: AllReduce = AllReduce([Library(process_group)])

    @classmethod
    def single(cls) -> ParallelGroup:
        """The group of one."""
        return cls()

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks; returns the sum, which is `x` itself where `x` is contiguous.

        Collectives take a tensor's memory as it lies: of a strided view, gloo would sum the wrong elements silently.
        """
        if self.world_size > 1:
            x = x.contiguous()
            self._sum(x)
        return x

    def use(self, all_reduce: AllReduce) -> None:
        """Sum in this way from now on. On all ranks or none."""
        self._sum = all_reduce

    def sum_in_order(self) -> None:
        """From now on add up in rank order, whatever the size of the message: no sum depends on what else is in it."""
        self._sum.fix(Gathered(self.world_size, self._process_group))

    def broadcast(self, x: Tensor) -> Tensor:
        """Overwrite `x`, which must be contiguous, with rank 0's; returns it."""
        if self.world_size > 1:
            dist.broadcast(x, group=self._process_group, group_src=0)
        return x

    def all_gather(self, x: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        """Concatenate the ranks' tensors [..., n] along the last dimension: [..., sum of n], in rank order.

        sizes: n of every rank, where they differ; without it all ranks must pass the same shape.
        """
        if self.world_size == 1:
            return x
        if sizes is not None:
            # Collectives move equal parts only.
            x = F.pad(x, (0, max(sizes) - x.shape[-1]))
        gathered = torch.empty((self.world_size, *x.shape), dtype=x.dtype, device=x.device)
        _all_gather(gathered.flatten(0, 1), x.contiguous(), group=self._process_group)
        if sizes is not None:
            return torch.cat([part[..., :size] for part, size in zip(gathered, sizes, strict=True)], dim=-1)
        return gathered.movedim(0, -2).reshape(*x.shape[:-1], self.world_size * x.shape[-1])

    def __repr__(self) -> str:
        return f"ParallelGroup(rank={self.rank}, world_size={self.world_size})"
