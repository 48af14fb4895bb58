"""Norms against the torch functions of the CPU path."""

from __future__ import annotations

import pytest
import torch
from neuron.engine.kernels import KernelUnsupported
from neuron.engine.layers import norm as torch_norm

from tests.kernels.harness import DTYPES, close, normal


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (3, 100), (5, 1024)])
def test_rms_norm(device: torch.device, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    from neuron.engine.kernels.norm import rms_norm

    x, weight = normal(*shape, dtype=dtype), normal(shape[1], dtype=dtype, seed=1)
    close(rms_norm(x.to(device), weight.to(device), 1e-6), torch_norm.rms_norm(x, weight, 1e-6))


def test_rms_norm_of_strided_heads_with_a_weight_per_head(device: torch.device) -> None:
    from neuron.engine.kernels.norm import rms_norm

    packed = normal(7, 6 * 16, dtype=torch.float32)
    heads = packed.view(7, 6, 16)[:, :5]
    weight = normal(5, 16, dtype=torch.float32, seed=1)
    actual = rms_norm(packed.to(device).view(7, 6, 16)[:, :5], weight.to(device), 1e-6)
    assert actual.is_contiguous()
    close(actual, torch_norm.rms_norm(heads, weight, 1e-6))


def test_rms_norm_of_zeros_and_of_huge_values(device: torch.device) -> None:
    from neuron.engine.kernels.norm import rms_norm

    x = torch.stack([torch.zeros(48), torch.full((48,), 1e15), torch.full((48,), 1e-30)])
    weight = torch.ones(48)
    close(rms_norm(x.to(device), weight.to(device), 1e-6), torch_norm.rms_norm(x, weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm_overwrites_the_residual(device: torch.device, dtype: torch.dtype) -> None:
    from neuron.engine.kernels.norm import add_rms_norm

    x, residual = normal(5, 96, dtype=dtype), normal(5, 96, dtype=dtype, seed=1)
    weight = normal(96, dtype=dtype, seed=2)
    on_device = residual.to(device, copy=True)
    normalised, total = add_rms_norm(x.to(device), on_device, weight.to(device), 1e-5)
    expected, expected_total = torch_norm.add_rms_norm(x, residual.clone(), weight, 1e-5)
    assert total.data_ptr() == on_device.data_ptr()
    assert torch.equal(total.cpu(), expected_total)
    close(normalised, expected)


def test_rows_that_do_not_fit_one_program_are_refused(device: torch.device) -> None:
    from neuron.engine.kernels.norm import rms_norm

    with pytest.raises(KernelUnsupported, match="40000"):
        rms_norm(torch.zeros(1, 40000, device=device), torch.ones(40000, device=device), 1e-6)
