"""Merging the partial results of blocks that were split along their context (FlashDecoding, Dao et al. 2023)."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disallow-untyped-calls=False

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from neuron.engine.kernels.attention.attention_plan import AttentionPlan


@triton.jit
def _merge_kernel(
    out,
    query_start,
    block_sequence,
    block_start,
    block_first_item,
    block_num_segments,
    partial_out,
    partial_max,
    partial_sum,
    sinks,
    stride_out,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    MAX_SEGMENTS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_BLOCKS: tl.constexpr,
):
    """One program per (query block, row): weigh the segments' partial results by their softmax sums and add them."""
    block = tl.program_id(0)
    head = tl.program_id(1) // (BLOCK_Q * GROUP)
    row = tl.program_id(1) % (BLOCK_Q * GROUP)
    num_segments = tl.load(block_num_segments + block)
    if HAS_BLOCKS:
        sequence = tl.load(block_sequence + block)
        start = tl.load(block_start + block)
    else:
        sequence = block
        start = 0
    first_token = tl.load(query_start + sequence)
    token = start + row // GROUP
    if (num_segments > 1) & (first_token + token < tl.load(query_start + sequence + 1)):
        segment = tl.arange(0, MAX_SEGMENTS)
        dim = tl.arange(0, BLOCK_D)
        live = segment < num_segments
        item = (tl.load(block_first_item + block) + segment).to(tl.int64)
        partial_row = (item * NUM_KV_HEADS + head) * (BLOCK_Q * GROUP) + row
        maxima = tl.load(partial_max + partial_row, mask=live, other=float("-inf"))
        sums = tl.load(partial_sum + partial_row, mask=live, other=0.0)
        parts = tl.load(
            partial_out + partial_row[:, None] * BLOCK_D + dim[None, :],
            mask=live[:, None] & (dim[None, :] < HEAD_DIM),
            other=0.0,
        )
        q_head = head * GROUP + row % GROUP
        maximum = tl.max(maxima, axis=0)
        if HAS_SINKS:
            sink = tl.load(sinks + q_head).to(tl.float32) * 1.4426950408889634
            maximum = tl.maximum(maximum, sink)
        shift = tl.where(maximum == float("-inf"), 0.0, maximum)
        weight = tl.exp2(maxima - shift)
        total = tl.sum(weight * sums, axis=0)
        if HAS_SINKS:
            total += tl.exp2(sink - shift)
        result = tl.sum(weight[:, None] * parts, axis=0) / tl.where(total == 0.0, 1.0, total)
        out_row = out + (first_token + token).to(tl.int64) * stride_out + q_head * HEAD_DIM
        tl.store(out_row + dim, result.to(out.dtype.element_ty), mask=dim < HEAD_DIM)


def merge_segments(
    plan: AttentionPlan,
    out: Tensor,
    partial_out: Tensor,
    partial_max: Tensor,
    partial_sum: Tensor,
    *,
    query_start: Tensor,
    num_kv_heads: int,
    group: int,
    sinks: Tensor | None,
) -> None:
    """Write the rows of `out` whose blocks have several segments; others are left alone.

    out: [T, Hq, D]. Per item, KV head and row of its block (the last with BLOCK_Q * group rows): partial_out
    [rows, block_d] fp32, unnormalised sums; partial_max, partial_sum [rows] fp32, of the softmax in base 2. Segments
    are added in the order of the context, whoever computed them first. sinks: see `run_attention`.
    """
    tiling = plan.tiling
    block_d = partial_out.shape[1]
    _merge_kernel[(plan.num_blocks, num_kv_heads * tiling.block_q * group)](
        out,
        query_start,
        plan.block_sequence,
        plan.block_start,
        plan.block_first_item,
        plan.block_num_segments,
        partial_out,
        partial_max,
        partial_sum,
        sinks,
        out.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=out.shape[2],
        BLOCK_D=block_d,
        BLOCK_Q=tiling.block_q,
        MAX_SEGMENTS=tiling.max_segments,
        HAS_SINKS=sinks is not None,
        HAS_BLOCKS=plan.block_sequence is not None,
        num_warps=4 if tiling.max_segments * block_d >= 2048 else 2,
    )
