from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from neuron.engine.gemm import row_blocks as module
from neuron.engine.gemm.row_blocks import linear, row_blocks

needs_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="the copy is made for MKL only")


@needs_mkl
@pytest.mark.parametrize("rows", [1, 2, 3, 16, 96, 97, 300])
@pytest.mark.parametrize("shape", [(32, 8), (96, 40), (45, 7), (1, 5)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_products_are_those_of_the_weight(monkeypatch, rows, shape, has_bias):
    monkeypatch.setattr(module, "available_host_bytes", module.total_host_bytes)
    weight = torch.randn(shape)
    bias = torch.randn(shape[0]) if has_bias else None
    blocks = row_blocks(weight)
    assert blocks is not None and blocks.shape[1:] == (shape[1], 32)
    x = torch.randn(rows, shape[1])
    result = linear(x, weight, blocks, bias)
    assert result.shape == (rows, shape[0])
    torch.testing.assert_close(result, F.linear(x, weight, bias), atol=1e-5, rtol=1e-5)


def test_a_full_host_keeps_one_copy(monkeypatch):
    weight = torch.randn(64, 16)
    monkeypatch.setattr(module, "total_host_bytes", lambda: 20_000)
    monkeypatch.setattr(module, "available_host_bytes", lambda: 14_095)
    assert row_blocks(weight) is None
    x = torch.randn(8, 16)
    assert torch.equal(linear(x, weight, None), F.linear(x, weight))


def test_other_dtypes_are_left_alone():
    assert row_blocks(torch.zeros(64, 16, dtype=torch.bfloat16)) is None
