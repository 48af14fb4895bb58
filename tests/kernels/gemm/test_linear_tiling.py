"""Tile shapes of matrix products, and what the kernels do not take."""

from __future__ import annotations

import pytest
import torch
from neuron.engine.kernels import KernelUnsupported
from neuron.engine.kernels.attention.tiling import Chip
from neuron.engine.kernels.gemm.gemm import invariant_linear, split_linear
from neuron.engine.kernels.gemm.gemv import vector_linear
from neuron.engine.kernels.gemm.linear_tiling import split_tiling, vector_tiling

H200 = Chip(num_multiprocessors=132, shared_memory=227 * 1024)


def test_refusals_name_the_numbers(device: torch.device) -> None:
    x, weight = torch.zeros(17, 32, device=device), torch.zeros(9, 32, device=device)
    with pytest.raises(KernelUnsupported, match="17 rows"):
        split_linear(x, weight)
    with pytest.raises(KernelUnsupported, match="5 rows"):
        vector_linear(x[:5], weight)
    with pytest.raises(KernelUnsupported, match="9 rows"):
        vector_linear(x[:1], weight, gated=True)
    with pytest.raises(KernelUnsupported, match="strides"):
        vector_linear(x[:1], torch.zeros(32, 9, device=device).T)
    with pytest.raises(KernelUnsupported, match="does not fit"):
        invariant_linear(x.bfloat16(), weight)
    for product in (vector_linear, split_linear, invariant_linear):
        assert product(x[:0], weight).shape == (0, 9)


@pytest.mark.parametrize(
    ("num_out", "k"),
    [(6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288), (4096, 1024), (1024, 3072), (151936, 4096)],
)
def test_real_shapes_fill_the_device(monkeypatch: pytest.MonkeyPatch, num_out: int, k: int) -> None:
    """Qwen3-8B and 0.6B on 132 multiprocessors: programs enough to cover the memory's latency, and no overlong sums."""
    monkeypatch.undo()
    for rows in (1, 2, 4):
        vector = vector_tiling(H200, num_out=num_out, k=k, rows=rows, gated=False, itemsize=2)
        assert vector.block_n * rows * 8 <= 64  # registers of sums
        bytes_in_flight = 16 * 128 * vector.block_n * vector.unroll
        programs = -(-num_out // vector.block_n)
        resident = min(programs / 132, 5)
        assert resident * bytes_in_flight >= 20 * 1024, vector  # 2.7 MB over the device
    tiles = split_tiling(H200, num_out=num_out, k=k, dtype=torch.bfloat16)
    assert tiles.segment_k * (tiles.num_segments - 1) < k <= tiles.segment_k * tiles.num_segments
    programs = -(-num_out // tiles.block_n) * tiles.num_segments
    assert programs >= (64 if num_out * k < 5e6 else 132)  # smaller ones are read in two microseconds
