"""Small forms of the layers' products, against torch's."""

from __future__ import annotations

import pytest
import torch
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


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    limit = TOLERANCE[dtype] * max(expected.abs().max().item(), 1.0)
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=0, atol=limit)
