"""Gated activations against the torch function of the CPU path."""

from __future__ import annotations

import pytest
import torch
from neuron.engine.gemm import activation as torch_activation

from tests.kernels.harness import DTYPES, close, normal


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (3, 200), (2, 4096), (4, 3000)])
def test_silu_mul(device: torch.device, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    from neuron.engine.kernels.activation import silu_mul

    gate_up = normal(*shape, dtype=dtype) * 3
    close(silu_mul(gate_up.to(device)), torch_activation.silu_mul(gate_up))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_silu_mul_of_large_values_stays_finite(device: torch.device) -> None:
    from neuron.engine.kernels.activation import silu_mul

    # exp overflows to infinity on purpose: 1 / (1 + inf) is the right 0.
    gate_up = torch.tensor([[-1e4, 1e4, -200.0, 200.0, 1.0, 1.0, 1.0, 1.0]])
    torch.testing.assert_close(silu_mul(gate_up.to(device)).cpu(), torch_activation.silu_mul(gate_up))
