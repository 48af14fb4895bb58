"""Rotary embedding and page writes in one, against the torch functions of the CPU path."""

from __future__ import annotations

import pytest
import torch
from neuron.checkpoint.rope import RopeScaling
from neuron.engine.layers import norm as torch_norm
from neuron.engine.layers.norm import QKNorm
from neuron.engine.layers.rotary import RotaryEmbedding, split_and_rotate

from tests.kernels.harness import DTYPES, close, normal


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "partial", "with_norm"),
    [
        (4, 2, 64, 1.0, True),
        (7, 1, 128, 1.0, False),
        (3, 3, 80, 1.0, True),
        (8, 2, 256, 0.25, True),
        (2, 1, 96, 0.5, False),
    ],
)
def test_rotate_and_write(
    device: torch.device,
    dtype: torch.dtype,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    partial: float,
    with_norm: bool,
) -> None:
    from neuron.engine.kernels.attention.rotary import rotate_and_write

    num_tokens, page_size = 5, 16
    qkv = normal(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
    positions = torch.tensor([0, 1, 17, 1000, 1999])
    slots = torch.tensor([16, 31, -1, 50, 47])
    norm = None
    if with_norm:
        norm = QKNorm(num_heads, num_kv_heads, head_dim, 1e-6)
        norm.q.data = normal(head_dim, dtype=dtype, seed=1)
        norm.k.data = normal(head_dim, dtype=dtype, seed=2)
        norm.finish_loading()
    embedding = RotaryEmbedding(RopeScaling(partial_rotary_factor=partial), head_dim)
    rotary = embedding.at(positions, 2000, torch.float32)
    # The twin's angles stay in fp32 here: in the activations' dtype they would be less exact than the kernel's.
    upcast = qkv.float()
    if norm is not None:
        heads = qkv.view(num_tokens, -1, head_dim)
        normed = torch_norm.rms_norm(heads[:, : num_heads + num_kv_heads], norm.joint, norm.eps)
        upcast = torch.cat([normed, heads[:, num_heads + num_kv_heads :]], dim=1).flatten(1).float()
    shape = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    q, k, v = split_and_rotate(upcast, rotary, qk_norm=None, **shape)

    kv = torch.full((4, 2, page_size, num_kv_heads, head_dim), float("nan"), dtype=dtype, device=device)
    actual = rotate_and_write(
        qkv.to(device),
        positions.to(device),
        rotary.cos_sin.to(device),
        kv,
        slots.to(device),
        q_weight=norm.q.to(device) if norm else None,
        k_weight=norm.k.to(device) if norm else None,
        eps=1e-6,
        **shape,
    )
    close(actual, q.to(dtype))
    cells = kv.cpu().transpose(1, 2).flatten(0, 1)  # [slots, 2, Hkv, D]
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            close(cells[slot, 0], k[token].to(dtype))
            assert torch.equal(cells[slot, 1], v[token].to(dtype))
    untouched = [slot for slot in range(64) if slot not in slots.tolist()]
    assert torch.isnan(cells[untouched]).all()
