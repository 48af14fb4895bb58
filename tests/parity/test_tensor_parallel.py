"""Ranks that each hold a part of a model compute the logits of the whole (gloo, real processes)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from neuron.parallel.group import ParallelGroup

from .paged_model import PagedModel, load

TOKENS = [7, 1, 190, 44, 3, 3, 60, 12, 101, 5, 88]
# Each family; fewer KV heads than ranks; biases, which must be added once; a vocabulary that does not divide.
NAMES = ("qwen3-wide-heads-mqa", "qwen2-tied", "llama-mlp-bias-tied", "llama-linear-rope-biases", "mistral-window")


def logits_of(path: Path, group: ParallelGroup) -> torch.Tensor:
    """A chunked prefill and a decode."""
    model = PagedModel(load(path, parallel=group), page_size=4)
    sequence, prefill = model.prefill(TOKENS[:-1], chunk=6)
    return torch.cat((prefill, *model.step([(sequence, TOKENS[-1:])], num_decodes=1)))


def _rank(rank: int, world_size: int, rendezvous: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    try:
        for name in NAMES:
            path = Path(folder, name)
            expected = torch.load(path / "expected.pt")
            torch.testing.assert_close(logits_of(path, ParallelGroup(rank, world_size)), expected, atol=1e-4, rtol=0)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ranks_compute_what_one_does(tmp_path: Path) -> None:
    # Not at the top: the ranks import this module, and transformers is slow to import.
    from .checkpoints import VARIANTS, save_checkpoint

    for variant in VARIANTS:
        if variant.name in NAMES:
            path = save_checkpoint(variant, tmp_path / variant.name)
            torch.save(logits_of(path, ParallelGroup.single()), path / "expected.pt")
    mp.spawn(_rank, args=(2, f"file://{tmp_path / 'rendezvous'}", str(tmp_path)), nprocs=2)
