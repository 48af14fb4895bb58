"""Norms, activation, rotary embedding and page writes against the torch functions of the CPU path."""

from __future__ import annotations

import torch


def test_no_tokens_is_no_work(device: torch.device) -> None:
    from neuron.engine.kernels.activation import silu_mul
    from neuron.engine.kernels.norm import rms_norm

    assert silu_mul(torch.empty(0, 8, device=device)).shape == (0, 4)
    assert rms_norm(torch.empty(0, 8, device=device), torch.ones(8, device=device), 1e-6).shape == (0, 8)
