"""Products of a few rows, on the ordinary cores."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from neuron.engine.kernels.gemm.gemm import split_linear
from neuron.engine.kernels.gemm.gemv import vector_linear
from torch import Tensor

from tests.kernels.gemm.harness import SHAPES, check, normal


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_vector_product(device: torch.device, shape: tuple[int, int], rows: int) -> None:
    dtype = (torch.float32, torch.bfloat16, torch.float16, torch.bfloat16)[rows - 1]
    weight, bias = normal(*shape, dtype=dtype), normal(shape[0], dtype=dtype, seed=1)
    x = normal(rows, shape[1], dtype=dtype, seed=2)
    actual = vector_linear(x.to(device), weight.to(device), bias.to(device))
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
