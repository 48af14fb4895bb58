"""Keys and values on their way into pages."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.harness import normal


@pytest.mark.parametrize("num_kv_heads", [1, 3])
def test_kv_write_touches_only_its_slots(device: torch.device, num_kv_heads: int) -> None:
    from neuron.engine.kernels.attention.kv_write import kv_write

    packed = normal(4, 2 * num_kv_heads * 80, dtype=torch.float32)
    k, v = packed.to(device).view(4, 2, num_kv_heads, 80).unbind(1)
    kv = torch.full((3, 2, 16, num_kv_heads, 80), float("nan"), dtype=torch.bfloat16, device=device)
    slots = torch.tensor([47, 16, -1, 17])
    kv_write(k, v, kv, slots.to(device))
    cells = kv.cpu().transpose(1, 2).flatten(0, 1)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            assert torch.equal(cells[slot, 0], k[token].cpu().bfloat16())
            assert torch.equal(cells[slot, 1], v[token].cpu().bfloat16())
    assert torch.isnan(cells[[slot for slot in range(48) if slot not in slots.tolist()]]).all()
