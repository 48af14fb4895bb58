"""Products on the tensor cores: exact, and the same bits wherever that is promised."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from neuron.engine.kernels.attention.tiling import Chip
from neuron.engine.kernels.gemm.gemm import invariant_linear, split_linear
from neuron.engine.kernels.gemm.gemv import vector_linear
from neuron.engine.kernels.gemm.linear_tiling import invariant_tiling
from torch import Tensor

from tests.kernels.gemm.harness import SHAPES, check, normal


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [1, 7, 16])
def test_split_product(device: torch.device, shape: tuple[int, int], rows: int) -> None:
    dtype = {1: torch.float32, 7: torch.bfloat16, 16: torch.float16}[rows]
    weight, bias = normal(*shape, dtype=dtype), normal(shape[0], dtype=dtype, seed=1)
    x = normal(rows, shape[1], dtype=dtype, seed=2)
    actual = split_linear(x.to(device), weight.to(device), bias.to(device))
    check(actual, F.linear(x.double(), weight.double(), bias.double()), dtype)


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
