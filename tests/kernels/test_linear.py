"""Matrix products for few rows, and the one whose order of additions never changes, against float64 products."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from neuron.engine.kernels import KernelUnsupported
from neuron.engine.kernels.attention.tiling import Chip
from neuron.engine.kernels.gemm import linear_tiling
from neuron.engine.kernels.gemm.gemm import invariant_linear, split_linear
from neuron.engine.kernels.gemm.gemv import vector_linear
from neuron.engine.kernels.gemm.linear_tiling import invariant_tiling, split_tiling, vector_tiling
from torch import Tensor

# Relative to the largest result: rounding of the dtype, and of sums of up to a few thousand products.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
# [N, K]: small forms of the layers of Qwen3-0.6B and 8B, and sizes that divide by nothing.
SHAPES = [
    (48, 256),
    (66, 100),
    (3, 1030),
    (129, 33),
    *(
        pytest.param(shape, marks=pytest.mark.full)
        for shape in ((1024, 3072), (4096, 1024), (6144, 1024), (1, 1), (65, 4096), (1000, 1000))
    ),
]
H200 = Chip(num_multiprocessors=132, shared_memory=227 * 1024)


@pytest.fixture(autouse=True)
def short_segments(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """K of a few hundred elements is cut too."""
    monkeypatch.setattr(linear_tiling, "_MIN_SEGMENT", 64)
    yield


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    limit = TOLERANCE[dtype] * max(expected.abs().max().item(), 1.0)
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=0, atol=limit)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_vector_product(device: torch.device, shape: tuple[int, int], rows: int) -> None:
    dtype = (torch.float32, torch.bfloat16, torch.float16, torch.bfloat16)[rows - 1]
    weight, bias = normal(*shape, dtype=dtype), normal(shape[0], dtype=dtype, seed=1)
    x = normal(rows, shape[1], dtype=dtype, seed=2)
    actual = vector_linear(x.to(device), weight.to(device), bias.to(device))
    check(actual, F.linear(x.double(), weight.double(), bias.double()), dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [1, 7, 16])
def test_split_product(device: torch.device, shape: tuple[int, int], rows: int) -> None:
    dtype = {1: torch.float32, 7: torch.bfloat16, 16: torch.float16}[rows]
    weight, bias = normal(*shape, dtype=dtype), normal(shape[0], dtype=dtype, seed=1)
    x = normal(rows, shape[1], dtype=dtype, seed=2)
    actual = split_linear(x.to(device), weight.to(device), bias.to(device))
    check(actual, F.linear(x.double(), weight.double(), bias.double()), dtype)


@pytest.mark.parametrize("product", [vector_linear, split_linear])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gate_and_up_in_one_product(device: torch.device, product: Callable[..., Tensor], with_bias: bool) -> None:
    dtype = torch.bfloat16
    weight, x = normal(2 * 66, 200, dtype=dtype) / 8, normal(3, 200, dtype=dtype, seed=1)
    bias = normal(2 * 66, dtype=dtype, seed=2) if with_bias else None
    actual = product(x.to(device), weight.to(device), None if bias is None else bias.to(device), gated=True)
    assert actual.shape == (3, 66)
    gate, up = F.linear(x.double(), weight.double(), None if bias is None else bias.double()).chunk(2, dim=-1)
    check(actual, F.silu(gate) * up, dtype)


@pytest.mark.parametrize("product", [vector_linear, split_linear, invariant_linear])
def test_rows_may_be_strided_views_and_their_neighbours_do_not_leak(
    device: torch.device, product: Callable[..., Tensor]
) -> None:
    """Around x and the weight lies NaN: nothing beyond their borders is multiplied."""
    x_home = torch.full((5, 300), float("nan"), device=device)
    w_home = torch.full((75, 240), float("nan"), device=device)
    x, weight = normal(3, 150, dtype=torch.float32), normal(70, 150, dtype=torch.float32, seed=1)
    x_home[1:4, 16:166] = x.to(device)
    w_home[2:72, 32:182] = weight.to(device)
    actual = product(x_home[1:4, 16:166], w_home[2:72, 32:182])
    check(actual, x.double() @ weight.double().T, torch.float32)


@pytest.mark.parametrize("product", [vector_linear, split_linear, invariant_linear])
def test_a_nan_stays_in_its_row_and_its_column(device: torch.device, product: Callable[..., Tensor]) -> None:
    x, weight = normal(3, 96, dtype=torch.float32), normal(40, 96, dtype=torch.float32, seed=1)
    expected = x.double() @ weight.double().T
    x[1, 5] = float("nan")
    weight[7, 11] = float("nan")
    actual = product(x.to(device), weight.to(device)).cpu()
    is_nan = torch.zeros_like(expected, dtype=torch.bool)
    is_nan[1] = is_nan[:, 7] = True
    assert torch.equal(actual.isnan(), is_nan)
    check(actual[~is_nan], expected[~is_nan], torch.float32)


@pytest.mark.usefixtures("place_free_dot")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_invariant_product_gives_a_row_the_same_bits_everywhere(
    device: torch.device, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, in any batch, at any place in it; K in one program or in several."""
    num_out, k = 72, 264
    weight, bias = normal(num_out, k, dtype=dtype).to(device), normal(num_out, dtype=dtype, seed=1).to(device)
    x = normal(37 if dtype == torch.float32 else 70, k, dtype=dtype, seed=2).to(device)
    assert invariant_tiling(num_out=num_out, k=k, dtype=dtype).num_segments > 2
    together = invariant_linear(x, weight, bias)
    check(together, F.linear(x.cpu().double(), weight.cpu().double(), bias.cpu().double()), dtype)
    for place in (0, 5, 33, x.shape[0] - 1):
        assert torch.equal(invariant_linear(x[place : place + 1], weight, bias)[0], together[place])
    assert torch.equal(invariant_linear(x[3:20], weight, bias), together[3:20])
    assert torch.equal(invariant_linear(x.flip(0), weight, bias).flip(0), together)
    monkeypatch.setattr(
        "neuron.engine.kernels.gemm.gemm.chip_of", lambda _: Chip(1, 1)
    )  # so small that nothing is split
    assert torch.equal(invariant_linear(x, weight, bias), together)


@pytest.mark.usefixtures("place_free_dot")
def test_a_split_product_gives_a_row_the_same_bits_in_any_batch(device: torch.device) -> None:
    weight, x = (
        normal(100, 500, dtype=torch.bfloat16).to(device),
        normal(16, 500, dtype=torch.bfloat16, seed=1).to(device),
    )
    together = split_linear(x, weight)
    for size in (1, 2, 9):
        assert torch.equal(split_linear(x[:size], weight), together[:size])


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
