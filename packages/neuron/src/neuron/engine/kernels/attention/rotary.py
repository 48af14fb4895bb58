"""From packed QKV rows to rotated queries and written keys and values, in one pass.

Per head: RMSNorm where the family has one (Qwen3), rotary embedding (Su et al. 2021, rotated by halves) in fp32, then
queries go to a contiguous tensor and keys and values straight into their pages. What would be five kernels and as
many trips through memory is one. Torch twin: `neuron.engine.layers.rotary.split_and_rotate` followed by the page
write of `neuron.engine.attention.attention_cpu`.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disallow-untyped-calls=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from neuron.engine.kernels import KernelUnsupported

# Elements of a program's tile: a few heads, so that 32 threads have 16 bytes each to load several times over.
_TILE = 512


@triton.jit
def _normalise_and_rotate(
    heads,
    head_mask,
    weight,
    cos,
    sin,
    eps,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    """heads: [N] pointers to the first element of each head. Returns both rotated halves and what is not rotated."""
    pair = tl.arange(0, BLOCK_HALF)
    pair_mask = head_mask[:, None] & (pair[None, :] < HALF)
    first = tl.load(heads[:, None] + pair[None, :], mask=pair_mask, other=0.0)
    second = tl.load(heads[:, None] + HALF + pair[None, :], mask=pair_mask, other=0.0)
    dtype = first.dtype
    first = first.to(tl.float32)
    second = second.to(tl.float32)
    if REST > 0:
        tail = tl.arange(0, BLOCK_REST)
        rest = tl.load(
            heads[:, None] + 2 * HALF + tail[None, :], mask=head_mask[:, None] & (tail[None, :] < REST), other=0.0
        ).to(tl.float32)
    else:
        rest = first
    if HAS_NORM:
        squares = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
        if REST > 0:
            squares += tl.sum(rest * rest, axis=1)
        scale = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
        # Rounded before and after the multiplication with the weight, as the twin (and Hugging Face) does.
        weight_first = tl.load(weight + pair, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
        weight_second = tl.load(weight + HALF + pair, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
        first = ((first * scale).to(dtype).to(tl.float32) * weight_first).to(dtype).to(tl.float32)
        second = ((second * scale).to(dtype).to(tl.float32) * weight_second).to(dtype).to(tl.float32)
        if REST > 0:
            weight_rest = tl.load(weight + 2 * HALF + tail, mask=tail < REST, other=0.0).to(tl.float32)[None, :]
            rest = ((rest * scale).to(dtype).to(tl.float32) * weight_rest).to(dtype).to(tl.float32)
    return first * cos - second * sin, second * cos + first * sin, rest


@triton.jit
def _store_heads(
    heads,
    head_mask,
    first,
    second,
    rest,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    dtype = heads.dtype.element_ty
    pair = tl.arange(0, BLOCK_HALF)
    pair_mask = head_mask[:, None] & (pair[None, :] < HALF)
    tl.store(heads[:, None] + pair[None, :], first.to(dtype), mask=pair_mask)
    tl.store(heads[:, None] + HALF + pair[None, :], second.to(dtype), mask=pair_mask)
    if REST > 0:
        tail = tl.arange(0, BLOCK_REST)
        rest_mask = head_mask[:, None] & (tail[None, :] < REST)
        tl.store(heads[:, None] + 2 * HALF + tail[None, :], rest.to(dtype), mask=rest_mask)


@triton.jit
def _rotary_kernel(
    q_out,
    kv,
    qkv,
    positions,
    cos_sin,
    slot_mapping,
    q_weight,
    k_weight,
    eps,
    stride_qkv,
    stride_cos_sin,
    stride_page,
    stride_half,
    stride_slot,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    row = qkv + token * stride_qkv
    pair = tl.arange(0, BLOCK_HALF)
    angles = cos_sin + tl.load(positions + token).to(tl.int64) * stride_cos_sin
    cos = tl.load(angles + pair, mask=pair < HALF, other=0.0)[None, :]
    sin = tl.load(angles + HALF + pair, mask=pair < HALF, other=0.0)[None, :]
    num_query_blocks: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    if block < num_query_blocks:
        head = block * HEADS + tl.arange(0, HEADS)
        mask = head < NUM_HEADS
        first, second, rest = _normalise_and_rotate(
            row + head * HEAD_DIM, mask, q_weight, cos, sin, eps,
            HEAD_DIM, HALF, BLOCK_HALF, REST, BLOCK_REST, HAS_NORM,
        )  # fmt: skip
        target = q_out + token * (NUM_HEADS * HEAD_DIM) + head * HEAD_DIM
        _store_heads(target, mask, first, second, rest, HALF, BLOCK_HALF, REST, BLOCK_REST)
    else:
        slot = tl.load(slot_mapping + token).to(tl.int64)
        head = (block - num_query_blocks) * HEADS + tl.arange(0, HEADS)
        mask = (head < NUM_KV_HEADS) & (slot >= 0)
        first, second, rest = _normalise_and_rotate(
            row + (NUM_HEADS + head) * HEAD_DIM, mask, k_weight, cos, sin, eps,
            HEAD_DIM, HALF, BLOCK_HALF, REST, BLOCK_REST, HAS_NORM,
        )  # fmt: skip
        cell = kv + (slot // PAGE_SIZE) * stride_page + (slot % PAGE_SIZE) * stride_slot + head * HEAD_DIM
        _store_heads(cell, mask, first, second, rest, HALF, BLOCK_HALF, REST, BLOCK_REST)
        dim = tl.arange(0, BLOCK_D)
        value_mask = mask[:, None] & (dim[None, :] < HEAD_DIM)
        source = row + (NUM_HEADS + NUM_KV_HEADS + head) * HEAD_DIM
        value = tl.load(source[:, None] + dim[None, :], mask=value_mask)
        tl.store(cell[:, None] + stride_half + dim[None, :], value.to(kv.dtype.element_ty), mask=value_mask)


def rotate_and_write(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    kv_layer: Tensor,
    slot_mapping: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Normalise and rotate queries and keys of packed rows, write keys and values into their pages, return queries.

    qkv: [T, (Hq + 2·Hkv)·D], elements contiguous. positions: [T] int64. cos_sin: [P, R] fp32, cosines then sines; the
    first R elements of a head are rotated. kv_layer: [num_pages, 2, page_size, Hkv, D]. slot_mapping: [T] int64,
    negative = write nowhere. q_weight, k_weight: [D] scales of the per-head RMSNorm, both or neither. Returns
    q [T, Hq, D], contiguous, in qkv's dtype. Raises `KernelUnsupported` if strides do not fit.
    """
    num_tokens = qkv.shape[0]
    rotary_dim = cos_sin.shape[1]
    if qkv.stride(1) != 1 or kv_layer.stride(4) != 1 or kv_layer.stride(3) != head_dim or cos_sin.stride(1) != 1:
        raise KernelUnsupported("packed rows, tables and pages must be contiguous in their last dimensions")
    if (q_weight is None) != (k_weight is None):
        raise KernelUnsupported("per-head norms come for queries and keys together")
    q = torch.empty(num_tokens, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    if num_tokens == 0:
        return q
    half = rotary_dim // 2
    block_d = triton.next_power_of_2(head_dim)
    heads = max(1, _TILE // block_d)
    grid = (num_tokens, triton.cdiv(num_heads, heads) + triton.cdiv(num_kv_heads, heads))
    _rotary_kernel[grid](
        q,
        kv_layer,
        qkv,
        positions,
        cos_sin,
        slot_mapping,
        q_weight,
        k_weight,
        eps,
        qkv.stride(0),
        cos_sin.stride(0),
        kv_layer.stride(0),
        kv_layer.stride(1),
        kv_layer.stride(2),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        HALF=half,
        BLOCK_HALF=triton.next_power_of_2(half),
        REST=head_dim - rotary_dim,
        BLOCK_REST=max(1, triton.next_power_of_2(head_dim - rotary_dim)),
        BLOCK_D=block_d,
        HEADS=heads,
        PAGE_SIZE=kv_layer.shape[2],
        HAS_NORM=q_weight is not None,
        num_warps=2,
    )
    return q
