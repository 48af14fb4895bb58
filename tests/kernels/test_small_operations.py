"""Norms, activation, rotary embedding and page writes against the torch functions of the CPU path."""

from __future__ import annotations

import pytest
import torch
from neuron.checkpoint.rope import RopeScaling
from neuron.engine.gemm import activation as torch_activation
from neuron.engine.kernels import KernelUnsupported
from neuron.engine.layers import norm as torch_norm
from neuron.engine.layers.norm import QKNorm
from neuron.engine.layers.rotary import RotaryEmbedding, split_and_rotate
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# One unit in the last place of values below 8.
ULP = {torch.float32: 4e-6, torch.float16: 2**-8, torch.bfloat16: 2**-5}


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=ULP[expected.dtype])


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


def test_no_tokens_is_no_work(device: torch.device) -> None:
    from neuron.engine.kernels.activation import silu_mul
    from neuron.engine.kernels.norm import rms_norm

    assert silu_mul(torch.empty(0, 8, device=device)).shape == (0, 4)
    assert rms_norm(torch.empty(0, 8, device=device), torch.ones(8, device=device), 1e-6).shape == (0, 8)
