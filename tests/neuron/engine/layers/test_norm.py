from __future__ import annotations

import pytest
import torch
from neuron.engine.layers.norm import QKNorm, RMSNorm, add_rms_norm, rms_norm
from torch import Tensor


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("shape", [(1, 16), (7, 48), (5, 3, 32)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_rms_norm_equals_its_definition(shape: tuple[int, ...], scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * scale
    weight = torch.randn(shape[-1], generator=generator)
    before = x.clone()
    torch.testing.assert_close(rms_norm(x, weight, 1e-5).double(), reference(x, weight, 1e-5), atol=1e-5, rtol=1e-5)
    assert torch.equal(x, before)


def test_a_row_of_zeros_stays_zero() -> None:
    assert rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-6).abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype_and_sums_in_float32(dtype: torch.dtype) -> None:
    x = (torch.randn(4, 4096, generator=torch.Generator().manual_seed(1)) * 20).to(dtype)
    out = rms_norm(x, torch.ones(4096, dtype=dtype), 1e-6)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), reference(x, torch.ones(4096), 1e-6), atol=2e-2, rtol=1e-2)


def test_the_sum_replaces_the_residual() -> None:
    x, residual = torch.randn(3, 8), torch.randn(3, 8)
    expected = x + residual
    normalised, total = add_rms_norm(x, residual, torch.ones(8), 1e-6)
    assert total is residual
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(normalised.double(), reference(expected, torch.ones(8), 1e-6), atol=1e-6, rtol=1e-5)


def test_without_a_residual_the_input_is_the_sum() -> None:
    norm = RMSNorm(8, 1e-6)
    norm.weight.data.fill_(2.0)
    x = torch.randn(3, 8)
    normalised, total = norm(x)
    assert total is x
    torch.testing.assert_close(normalised, rms_norm(x, norm.weight, 1e-6))


def test_joint_scales_are_those_of_query_heads_then_key_heads() -> None:
    norm = QKNorm(num_heads=3, num_kv_heads=2, head_dim=4, eps=1e-6)
    norm.q.data.fill_(2.0)
    norm.k.data.fill_(5.0)
    norm.finish_loading()
    assert norm.joint is not None
    assert norm.joint.tolist() == [[2.0] * 4] * 3 + [[5.0] * 4] * 2
    with pytest.raises(ValueError, match="parts q and k"):
        norm.weight_slices(None)
