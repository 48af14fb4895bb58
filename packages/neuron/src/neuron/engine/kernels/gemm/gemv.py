"""x @ weightᵀ for up to four rows, where the weight's way from memory is all that takes time.

Each program streams a few rows of the weight straight into registers, 16 bytes a thread and load, with several loads
under way that do not depend on one another, and multiplies on the ordinary cores: nothing waits for shared memory. A
thread keeps its sums until the end, where the program's threads meet once. There are programs enough to fill a device
without cutting K, so one launch does it all. (It is the shape that gpt-fast gets from Inductor for batch 1, which
reaches more of the memory's speed than a library's product of matrices.)

With `gated` the weight is gate | up and the result silu(gate) * up, which saves a launch and a trip through memory.
Torch twins: `torch.nn.functional.linear` and `neuron.engine.gemm.activation.silu_mul` after it.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disallow-untyped-calls=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from neuron.engine.kernels.attention.tiling import chip_of
from neuron.engine.kernels.gemm.linear_tiling import check_operands, vector_tiling

MAX_ROWS = 4


@triton.jit
def gated_product(gate, up, dtype: tl.constexpr):
    """silu(gate) * up in fp32, rounded where `silu_mul` of a stored product rounds."""
    gate = gate.to(dtype).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    return silu * up.to(dtype).to(tl.float32)


@triton.jit
def _multiply(
    weight,
    x,
    column,
    num_rows,
    stride_w,
    stride_x,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Rows `column` of the weight times each row of x: four times [BLOCK_N] fp32, of which the first ROWS count."""
    element = tl.arange(0, BLOCK_K)
    pointers = weight + column.to(tl.int64)[:, None] * stride_w + element[None, :]
    # Rows beyond the last are copies of it, whose results nobody stores.
    x0 = x + element
    x1 = x + tl.minimum(1, num_rows - 1) * stride_x + element
    x2 = x + tl.minimum(2, num_rows - 1) * stride_x + element
    x3 = x + tl.minimum(3, num_rows - 1) * stride_x + element
    sum0 = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    sum1 = sum0
    sum2 = sum0
    sum3 = sum0
    for begin in range(0, K, BLOCK_K * UNROLL):
        for part in tl.static_range(UNROLL):
            k = begin + part * BLOCK_K
            if K % (BLOCK_K * UNROLL) == 0:
                w = tl.load(pointers + k, eviction_policy="evict_first").to(tl.float32)
                inside = None
                other = None
            else:
                inside = element + k < K
                other = 0.0
                w = tl.load(pointers + k, mask=inside[None, :], other=0.0, eviction_policy="evict_first").to(tl.float32)
            sum0 += w * tl.load(x0 + k, mask=inside, other=other).to(tl.float32)[None, :]
            if ROWS > 1:
                sum1 += w * tl.load(x1 + k, mask=inside, other=other).to(tl.float32)[None, :]
            if ROWS > 2:
                sum2 += w * tl.load(x2 + k, mask=inside, other=other).to(tl.float32)[None, :]
                sum3 += w * tl.load(x3 + k, mask=inside, other=other).to(tl.float32)[None, :]
    return tl.sum(sum0, axis=1), tl.sum(sum1, axis=1), tl.sum(sum2, axis=1), tl.sum(sum3, axis=1)


@triton.jit
def _store_row(
    out, product, up, bias, column, live, NUM_OUT: tl.constexpr, HAS_BIAS: tl.constexpr, GATED: tl.constexpr
):
    dtype: tl.constexpr = out.dtype.element_ty
    if HAS_BIAS:
        product += tl.load(bias + column).to(tl.float32)
    if GATED:
        if HAS_BIAS:
            up += tl.load(bias + NUM_OUT + column).to(tl.float32)
        product = gated_product(product, up, dtype)
    tl.store(out + column, product.to(dtype), mask=live)


@triton.jit(do_not_specialize=["num_rows"])
def vector_kernel(
    out,
    x,
    weight,
    bias,
    num_rows,
    stride_out,
    stride_x,
    stride_w,
    NUM_OUT: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNROLL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
):
    """NUM_OUT: outputs; with GATED the weight has twice as many rows."""
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = column < NUM_OUT
    column = tl.minimum(column, NUM_OUT - 1)
    product0, product1, product2, product3 = _multiply(
        weight, x, column, num_rows, stride_w, stride_x, K, ROWS, BLOCK_N, BLOCK_K, UNROLL
    )
    up0, up1, up2, up3 = product0, product1, product2, product3
    if GATED:
        up0, up1, up2, up3 = _multiply(
            weight, x, column + NUM_OUT, num_rows, stride_w, stride_x, K, ROWS, BLOCK_N, BLOCK_K, UNROLL
        )
    _store_row(out, product0, up0, bias, column, live, NUM_OUT, HAS_BIAS, GATED)
    if ROWS > 1:
        _store_row(out + stride_out, product1, up1, bias, column, live & (num_rows > 1), NUM_OUT, HAS_BIAS, GATED)
    if ROWS > 2:
        _store_row(out + 2 * stride_out, product2, up2, bias, column, live & (num_rows > 2), NUM_OUT, HAS_BIAS, GATED)
        _store_row(out + 3 * stride_out, product3, up3, bias, column, live & (num_rows > 3), NUM_OUT, HAS_BIAS, GATED)


def vector_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gated: bool = False) -> Tensor:
    """x @ weightᵀ + bias, in x's dtype, accumulated in fp32.

    x: [T, K], at most 4 rows, which may be strided; weight: [N, K] of the same dtype (fp32, bf16, fp16); bias: [N].
    Returns [T, N], or with `gated` silu(first half) * second half, [T, N / 2]. Raises `KernelUnsupported` for more
    rows, and where elements of a row are not contiguous.
    """
    num_rows, k = x.shape
    num_out = check_operands(x, weight, max_rows=MAX_ROWS, gated=gated)
    out = torch.empty(num_rows, num_out, dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return out
    rows = triton.next_power_of_2(num_rows)
    tiling = vector_tiling(
        chip_of(x.device), num_out=num_out, k=k, rows=rows, gated=gated, itemsize=weight.element_size()
    )
    vector_kernel[(triton.cdiv(num_out, tiling.block_n),)](
        out,
        x,
        weight,
        bias,
        num_rows,
        out.stride(0),
        x.stride(0),
        weight.stride(0),
        NUM_OUT=num_out,
        K=k,
        ROWS=rows,
        BLOCK_N=tiling.block_n,
        BLOCK_K=tiling.block_k,
        UNROLL=tiling.unroll,
        HAS_BIAS=bias is not None,
        GATED=gated,
        num_warps=tiling.num_warps,
    )
    return out
