"""Rendezvous of the ranks of a group: a c10d process group over the folder that they share.

The store is a file in that folder, so nothing listens that another process of the host could reach but the sockets of
the backend itself. Ranks of several hosts need nothing new here: a shared folder, and `GLOO_SOCKET_IFNAME` or
`NCCL_SOCKET_IFNAME` set to the interface between them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from neuron.checkpoint.errors import UnsupportedSharding
from neuron.engine.errors import ModelError, describe
from neuron.engine.parallel.all_reduce import build_all_reduce
from neuron.engine.parallel.group import ParallelGroup

_STORE_FILE = "store"


def join_group(
    folder: Path,
    *,
    rank: int,
    world_size: int,
    device: torch.device,
    shares: Sequence[int] = (),
    timeout_s: float,
    use_symmetric_memory: bool = True,
) -> ParallelGroup:
    """Meet the other ranks; returns when all are here and collectives have been seen to work.

    timeout_s bounds the meeting and, from then on, each collective: the last resort behind the daemon's watchdog. A
    collective whose peer dies fails at once. use_symmetric_memory: for sums, where the devices can. Raises `ModelError`
    (`device`), `UnsupportedSharding`.
    """
    try:
        group = ParallelGroup(rank, world_size, shares=shares)
    except ValueError as exc:
        raise UnsupportedSharding(str(exc)) from exc
    if device.type == "cuda":
        # The monitor of a NCCL group is a thread that polls for ever; ours sits in the daemon.
        os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")
    else:
        # gloo would look up this host's name and listen where that leads.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.FileStore(str(folder / _STORE_FILE), world_size),  # type: ignore[attr-defined]
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
            device_id=device if device.type == "cuda" else None,
        )
        check_collectives(group, device)
        if world_size > 1:
            group.use(
                build_all_reduce(device, rank=rank, world_size=world_size, use_symmetric_memory=use_symmetric_memory)
            )
    except (RuntimeError, ValueError) as exc:  # dist.DistError is a RuntimeError
        raise ModelError("device", f"rank {rank} of {world_size} cannot join its group: {describe(exc)}") from exc
    return group


def check_collectives(group: ParallelGroup, device: torch.device) -> None:
    """Run each kind of collective on values whose result is known. Raises `ModelError` (`device`).

    Also makes what the backend makes on first use, before any step depends on it.
    """
    ranks = range(group.world_size)
    summed = group.all_reduce(torch.full((3,), float(group.rank + 1), device=device)).tolist()
    gathered = group.all_gather(torch.full((2, 1), float(group.rank), device=device)).tolist()
    expected_sum = [float(sum(rank + 1 for rank in ranks))] * 3
    expected_rows = [[float(rank) for rank in ranks]] * 2
    if summed != expected_sum or gathered != expected_rows:
        raise ModelError(
            "device",
            f"collectives are wrong on rank {group.rank}: the sum is {summed} and not {expected_sum}, "
            f"the ranks gathered are {gathered[0]} and not {expected_rows[0]}",
        )
