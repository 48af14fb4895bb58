"""Scatter new keys and values into their pages."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disallow-untyped-calls=False

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from neuron.engine.kernels import KernelUnsupported

_BLOCK = 1024


@triton.jit
def _kv_write_kernel(
    k,
    v,
    kv,
    slot_mapping,
    stride_k,
    stride_v,
    stride_page,
    stride_half,
    stride_slot,
    ROW: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    if slot >= 0:
        element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        mask = element < ROW
        cell = kv + (slot // PAGE_SIZE) * stride_page + (slot % PAGE_SIZE) * stride_slot + element
        key = tl.load(k + token * stride_k + element, mask=mask)
        value = tl.load(v + token * stride_v + element, mask=mask)
        tl.store(cell, key.to(kv.dtype.element_ty), mask=mask)
        tl.store(cell + stride_half, value.to(kv.dtype.element_ty), mask=mask)


def kv_write(k: Tensor, v: Tensor, kv: Tensor, slot_mapping: Tensor) -> None:
    """Write each token's K and V into its slot.

    k, v: [T, Hkv, D], rows may be strided; kv: [num_pages, 2, page_size, Hkv, D]; slot_mapping: [T] int64, page *
    page_size + offset, negative = nowhere. Two tokens with the same slot leave either's row (padding on page 0).
    Raises `KernelUnsupported` if heads and elements of a row are not contiguous.
    """
    num_tokens, num_kv_heads, head_dim = k.shape
    for tensor in (k, v, kv[0, 0]):
        if tensor.stride(-1) != 1 or tensor.stride(-2) != head_dim:
            raise KernelUnsupported(f"K/V rows must be contiguous, got strides {tensor.stride()}")
    if num_tokens == 0:
        return
    row = num_kv_heads * head_dim
    block = min(_BLOCK, triton.next_power_of_2(row))
    _kv_write_kernel[(num_tokens, triton.cdiv(row, block))](
        k,
        v,
        kv,
        slot_mapping,
        k.stride(0),
        v.stride(0),
        kv.stride(0),
        kv.stride(1),
        kv.stride(2),
        ROW=row,
        PAGE_SIZE=kv.shape[2],
        BLOCK=block,
        num_warps=4,
    )
