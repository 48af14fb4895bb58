"""x @ weightᵀ in tiles on the tensor cores, with an order of additions that is known.

The weight is the left operand: its rows fill the tensor core's M, and the batch is padded in N, where 16 are enough.
Tiles of the weight stream through shared memory in stages. K is cut into segments. A segment's sum is made by one
program; the sums are added in the order of K, by the same program one after the other (`SPLIT` off) or by a second
launch (`SPLIT` on), with the same additions. There are no atomics: the same bits in every run.

- `split_linear`, up to 16 rows: narrow tiles, K cut until the device is full, because the weight's way from memory is
  what takes time.
- `invariant_linear`, any number of rows: one tile shape and one cut for all of them. A row's result is the same bits
  alone, in any batch and in any chunk: each of its elements is the sum of the same products in the same order,
  whatever lies beside it in the tile. (He et al. 2025, "Defeating Nondeterminism in LLM Inference", names a library's
  choice by batch size as the cause of answers that depend on the load.)
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disallow-untyped-calls=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from neuron.engine.kernels.attention.tiling import chip_of
from neuron.engine.kernels.gemm.gemv import gated_product
from neuron.engine.kernels.gemm.linear_tiling import TileTiling, check_operands, invariant_tiling, split_tiling

SPLIT_MAX_ROWS = 16
_MERGE_BLOCK = 1024


@triton.jit
def _multiply_segment(
    weight,
    x,
    column,
    row,
    begin,
    end,
    stride_w,
    stride_x,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[BLOCK_N, BLOCK_M] fp32: these rows of the weight times these rows of x, over [begin, end) of K."""
    element = tl.arange(0, BLOCK_K)
    w_pointers = weight + column.to(tl.int64)[:, None] * stride_w + element[None, :]
    x_pointers = x + row.to(tl.int64)[None, :] * stride_x + element[:, None]
    total = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for k in range(begin, end, BLOCK_K):
        if K % BLOCK_K == 0:
            w = tl.load(w_pointers + k)
            value = tl.load(x_pointers + k)
        else:
            inside = element + k < K
            w = tl.load(w_pointers + k, mask=inside[None, :], other=0.0)
            value = tl.load(x_pointers + k, mask=inside[:, None], other=0.0)
        total = tl.dot(w, value, acc=total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=["num_rows"])
def tile_kernel(
    out,
    partials,
    x,
    weight,
    bias,
    num_rows,
    stride_out,
    stride_x,
    stride_w,
    NUM_OUT: tl.constexpr,
    K: tl.constexpr,
    SEGMENT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """partials: [segments, num_rows, NUM_OUT] fp32, written instead of `out` with SPLIT."""
    # Tiles of x are the fast index: programs that run together read the same rows of the weight.
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = (column < NUM_OUT)[:, None] & (row < num_rows)[None, :]
    # Beyond the borders the last row is read again: no masks in the loop, and nobody stores the result.
    row = tl.minimum(row, num_rows - 1)
    column = tl.minimum(column, NUM_OUT - 1)
    if SPLIT:
        segment = tl.program_id(2)
        begin = segment * SEGMENT_K
        total = _multiply_segment(
            weight, x, column, row, begin, tl.minimum(begin + SEGMENT_K, K), stride_w, stride_x,
            K, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
        )  # fmt: skip
        place = (segment * num_rows + row).to(tl.int64)[None, :] * NUM_OUT + column[:, None]
        tl.store(partials + place, total, mask=live)
    else:
        total = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
        for begin in range(0, K, SEGMENT_K):
            total += _multiply_segment(
                weight, x, column, row, begin, tl.minimum(begin + SEGMENT_K, K), stride_w, stride_x,
                K, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
            )  # fmt: skip
        if HAS_BIAS:
            total += tl.load(bias + column).to(tl.float32)[:, None]
        place = row.to(tl.int64)[None, :] * stride_out + column[:, None]
        tl.store(out + place, total.to(out.dtype.element_ty), mask=live)


@triton.jit
def _merged_columns(
    partials, bias, row, column, live, num_rows, WIDTH: tl.constexpr, SEGMENTS: tl.constexpr, HAS_BIAS: tl.constexpr
):
    total = tl.zeros(column.shape, dtype=tl.float32)
    for segment in range(SEGMENTS):
        place = (segment * num_rows + row).to(tl.int64) * WIDTH + column
        total += tl.load(partials + place, mask=live, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + column, mask=live, other=0.0).to(tl.float32)
    return total


@triton.jit(do_not_specialize=["num_rows"])
def merge_linear_kernel(
    out,
    partials,
    bias,
    num_rows,
    NUM_OUT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
):
    """Add the segments of each element in order. NUM_OUT: outputs; with GATED there are two sums for each."""
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = column < NUM_OUT
    width: tl.constexpr = NUM_OUT * 2 if GATED else NUM_OUT
    total = _merged_columns(partials, bias, row, column, live, num_rows, width, SEGMENTS, HAS_BIAS)
    if GATED:
        up = _merged_columns(partials, bias, row, column + NUM_OUT, live, num_rows, width, SEGMENTS, HAS_BIAS)
        total = gated_product(total, up, out.dtype.element_ty)
    tl.store(out + row.to(tl.int64) * NUM_OUT + column, total.to(out.dtype.element_ty), mask=live)


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, tiling: TileTiling, *, split: bool, gated: bool) -> Tensor:
    num_rows, k = x.shape
    width = weight.shape[0]
    num_out = width // 2 if gated else width
    out = torch.empty(num_rows, num_out, dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return out
    partials = None
    if split:
        partials = torch.empty(tiling.num_segments, num_rows, width, dtype=torch.float32, device=x.device)
    grid = (
        triton.cdiv(num_rows, tiling.block_m),
        triton.cdiv(width, tiling.block_n),
        tiling.num_segments if split else 1,
    )
    tile_kernel[grid](
        out,
        partials,
        x,
        weight,
        bias,
        num_rows,
        out.stride(0),
        x.stride(0),
        weight.stride(0),
        NUM_OUT=width,
        K=k,
        SEGMENT_K=tiling.segment_k,
        BLOCK_M=tiling.block_m,
        BLOCK_N=tiling.block_n,
        BLOCK_K=tiling.block_k,
        SPLIT=split,
        HAS_BIAS=bias is not None,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )
    if partials is not None:
        block = min(_MERGE_BLOCK, triton.next_power_of_2(num_out))
        merge_linear_kernel[(num_rows, triton.cdiv(num_out, block))](
            out,
            partials,
            bias,
            num_rows,
            NUM_OUT=num_out,
            SEGMENTS=tiling.num_segments,
            BLOCK=block,
            HAS_BIAS=bias is not None,
            GATED=gated,
            num_warps=4,
        )
    return out


def split_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gated: bool = False) -> Tensor:
    """x @ weightᵀ + bias for up to 16 rows, in x's dtype, accumulated in fp32.

    x: [T, K], rows may be strided; weight: [N, K] of the same dtype (fp32, bf16, fp16); bias: [N]. Returns [T, N], or
    with `gated` silu(first half) * second half, [T, N / 2]. A row's result does not depend on the other rows. Raises
    `KernelUnsupported` for more rows, and where elements of a row are not contiguous.
    """
    check_operands(x, weight, max_rows=SPLIT_MAX_ROWS, gated=gated)
    tiling = split_tiling(chip_of(x.device), num_out=weight.shape[0], k=x.shape[1], dtype=weight.dtype)
    return _run(x, weight, bias, tiling, split=gated or tiling.num_segments > 1, gated=gated)


def invariant_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weightᵀ + bias, bitwise the same for a row whatever the number of rows and its place among them.

    x: [T, K], rows may be strided; weight: [N, K] of the same dtype (fp32, bf16, fp16); bias: [N]. Returns [T, N] in
    x's dtype. Raises `KernelUnsupported` where elements of a row are not contiguous.
    """
    check_operands(x, weight, max_rows=None, gated=False)
    tiling = invariant_tiling(num_out=weight.shape[0], k=x.shape[1], dtype=weight.dtype)
    tiles = triton.cdiv(weight.shape[0], tiling.block_n) * triton.cdiv(x.shape[0], tiling.block_m)
    # Which launch adds the segments up does not change the sum: with tiles enough, one program does it all.
    split = tiling.num_segments > 1 and tiles < 2 * chip_of(x.device).num_multiprocessors
    return _run(x, weight, bias, tiling, split=split, gated=False)
