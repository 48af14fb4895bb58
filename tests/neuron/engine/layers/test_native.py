# ruff: noqa: E402
"""Norms and rotary embedding of the native kernels against their twins in torch."""

from __future__ import annotations

from tests.native import import_or_skip

import_or_skip()

import pytest
import torch
from neuron.checkpoint.rope import RopeScaling
from neuron.engine.kernels.native import add_rms_norm, rotate_and_write
from neuron.engine.layers.norm import QKNorm, RMSNorm
from neuron.engine.layers.rotary import RotaryEmbedding, split_and_rotate
from torch import Tensor, nn

EPS = 1e-6


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("has_residual", [True, False])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 37), (5, 64), (200, 512)])
def test_a_norm_is_its_twin_and_a_row_depends_on_nobody(rows: int, width: int, has_residual: bool) -> None:
    x, weight = normal(rows, width, seed=0), normal(width, seed=1)
    residual = normal(rows, width, seed=2) if has_residual else None
    twin = RMSNorm(width, EPS)
    twin.weight = nn.Parameter(weight, requires_grad=False)
    expected, expected_sum = twin(x, None if residual is None else residual.clone())
    memory = None if residual is None else residual.clone()
    result, total = add_rms_norm(x, memory, weight, EPS)
    torch.testing.assert_close(result, expected)
    assert torch.equal(total, expected_sum)
    assert total is (x if memory is None else memory), "the sum is in the residual's memory"
    last, _ = add_rms_norm(x[-1:], None if residual is None else residual[-1:].clone(), weight, EPS)
    assert torch.equal(last, result[-1:])


@pytest.mark.parametrize("has_norm", [True, False])
@pytest.mark.parametrize(("head_dim", "partial"), [(16, 1.0), (40, 0.5), (64, 1.0)])
@pytest.mark.parametrize("rows", [1, 7, 150])
def test_rotated_heads_and_written_pages_are_those_of_the_twin(
    rows: int, head_dim: int, partial: float, has_norm: bool
) -> None:
    heads, kv_heads, page_size = 4, 2, 8
    rotary = RotaryEmbedding(RopeScaling(theta=10_000.0, partial_rotary_factor=partial), head_dim)
    norm = QKNorm(heads, kv_heads, head_dim, EPS) if has_norm else None
    if norm is not None:
        norm.q = nn.Parameter(normal(head_dim, seed=3), requires_grad=False)
        norm.k = nn.Parameter(normal(head_dim, seed=4), requires_grad=False)
        norm.finish_loading()
    qkv = normal(rows, (heads + 2 * kv_heads) * head_dim, seed=5)
    positions = torch.randperm(500, generator=torch.Generator().manual_seed(6))[:rows]
    slots = torch.randperm(40 * page_size, generator=torch.Generator().manual_seed(7))[:rows]
    q, k, v = split_and_rotate(
        qkv.clone(),
        rotary.at(positions, 500, torch.float32),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        qk_norm=norm,
    )
    pages = torch.full((40, 2, page_size, kv_heads, head_dim), 9.0)
    result = rotate_and_write(
        qkv,
        positions,
        rotary.reserve(500, torch.device("cpu")),
        pages,
        slots,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        q_weight=None if norm is None else norm.q,
        k_weight=None if norm is None else norm.k,
        eps=EPS,
    )
    torch.testing.assert_close(result, q)
    torch.testing.assert_close(pages[slots // page_size, 0, slots % page_size], k)
    assert torch.equal(pages[slots // page_size, 1, slots % page_size], v)
    assert (pages == 9.0).sum() == (40 * page_size - rows) * 2 * kv_heads * head_dim, "nothing else is written"
