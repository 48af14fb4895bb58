"""Attention over paged keys and values: one kernel for decode and prefill, split along the context where that pays.

The unit of work is an *item* = (query block, segment). A query block is up to BLOCK_Q consecutive query tokens of one
sequence with all query heads of one KV head beside them (rows = BLOCK_Q * group, padded to a power of two, so that
grouped queries fill the tensor core's M dimension and K and V are read once per group). A segment is a run of the
block's visible context. Blocks with one segment write their output at once; blocks with several write unnormalised
partial results that a second kernel merges (`attention_merge`; split-KV as in FlashDecoding, Dao et al. 2023; online
softmax of Milakov & Gimelshein 2018 and FlashAttention-2, Dao 2023).

How a context is cut depends on that sequence alone (`Tiling.min_segment_tokens`, `max_segments`), never on its
neighbours, and partial results are merged in a fixed order: the attention of a request is bitwise the same in any
batch. The list of items is made on the device (`attention_plan`), so that nothing waits for the host and a CUDA graph
replays correctly while contexts grow; programs walk the list with a stride.

Masks select (`tl.where`, masked loads), they never multiply: a NaN in an unused cell cannot leak.

Shapes: q, out [T, Hq, D]; kv [num_pages, 2, page_size, Hkv, D]; page_tables [S, max_pages] int32;
context_lens [S] int32; query_start [S + 1] int32. Query tokens are the last of their context (bottom-right causal).
"""

# Kernel parameters are pointers and constexprs, which Python types cannot express.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disallow-untyped-calls=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from neuron.engine.kernels.attention.attention_merge import merge_segments
from neuron.engine.kernels.attention.attention_plan import AttentionPlan, block_range

_LOG2_E = 1.4426950408889634


@triton.jit
def _attend_tiles(
    accumulator,
    row_max,
    row_sum,
    q,
    kv_head,
    page_table,
    low,
    high,
    begin,
    end,
    position,
    score_scale,
    soft_cap,
    stride_page,
    stride_half,
    stride_slot,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Fold the context tiles of [low, high) into the running softmax. Without MASKED every row sees every cell."""
    dim = tl.arange(0, BLOCK_D)
    for tile in range(low, high, BLOCK_N):
        column = tile + tl.arange(0, BLOCK_N)
        live = (column >= begin) & (column < end)
        if MASKED:
            page = tl.load(page_table + column // PAGE_SIZE, mask=live, other=0)
        else:
            page = tl.load(page_table + column // PAGE_SIZE)
        cell = page.to(tl.int64) * stride_page + (column % PAGE_SIZE) * stride_slot
        k_pointers = kv_head + cell[None, :] + dim[:, None]
        v_pointers = kv_head + stride_half + cell[:, None] + dim[None, :]
        if MASKED:
            k = tl.load(k_pointers, mask=live[None, :] & (dim[:, None] < HEAD_DIM), other=0.0)
            v = tl.load(v_pointers, mask=live[:, None] & (dim[None, :] < HEAD_DIM), other=0.0)
        elif HEAD_DIM != BLOCK_D:
            k = tl.load(k_pointers, mask=dim[:, None] < HEAD_DIM, other=0.0)
            v = tl.load(v_pointers, mask=dim[None, :] < HEAD_DIM, other=0.0)
        else:
            k = tl.load(k_pointers)
            v = tl.load(v_pointers)

        score = tl.dot(q, k.to(q.dtype), input_precision=PRECISION)
        if HAS_SOFT_CAP:
            # soft_cap * tanh(score * scale / soft_cap), tanh(x) = 2 sigmoid(2x) - 1; score_scale: scale / soft_cap.
            score = (2.0 / (1.0 + tl.exp(-2.0 * score_scale * score)) - 1.0) * (soft_cap * 1.4426950408889634)
        else:
            score = score * score_scale
        if MASKED:
            visible = live[None, :] & (column[None, :] <= position[:, None])
            if WINDOW > 0:
                visible = visible & (column[None, :] > position[:, None] - WINDOW)
            score = tl.where(visible, score, float("-inf"))

        new_max = tl.maximum(row_max, tl.max(score, axis=1))
        # A row that has seen nothing yet has maximum -inf; -inf - -inf would be NaN.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        weight = tl.exp2(score - shift[:, None])
        correction = tl.exp2(row_max - shift)
        row_sum = row_sum * correction + tl.sum(weight, axis=1)
        accumulator = accumulator * correction[:, None]
        accumulator = tl.dot(weight.to(q.dtype), v.to(q.dtype), acc=accumulator, input_precision=PRECISION)
        row_max = new_max
    return accumulator, row_max, row_sum


@triton.jit
def _store_rows(
    out,
    sinks,
    accumulator,
    row_max,
    row_sum,
    token_row,
    q_head,
    real,
    stride_out,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """Normalise the rows of a block that was not split and write them."""
    dim = tl.arange(0, BLOCK_D)
    if HAS_SINKS:
        sink = tl.load(sinks + q_head).to(tl.float32) * 1.4426950408889634
        new_max = tl.maximum(row_max, sink)
        correction = tl.exp2(row_max - new_max)
        row_sum = row_sum * correction + tl.exp2(sink - new_max)
        accumulator = accumulator * correction[:, None]
    # An empty context leaves a sum of 0: its output is 0.
    result = accumulator / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    tl.store(
        out + token_row[:, None] * stride_out + q_head[:, None] * HEAD_DIM + dim[None, :],
        result.to(out.dtype.element_ty),
        mask=real[:, None] & (dim[None, :] < HEAD_DIM),
    )


@triton.jit(do_not_specialize=["stride_table"])
def _attention_kernel(
    out,
    q,
    kv,
    page_tables,
    context_lens,
    query_start,
    item_block,
    item_segment,
    num_items,
    block_sequence,
    block_start,
    block_num_segments,
    block_segment_tokens,
    partial_out,
    partial_max,
    partial_sum,
    sinks,
    score_scale,
    soft_cap,
    stride_out,
    stride_q,
    stride_page,
    stride_half,
    stride_slot,
    stride_table,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_BLOCKS: tl.constexpr,
    SPLIT: tl.constexpr,
    SKIP_MASKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, BLOCK_D)
    token = row // GROUP
    member = row % GROUP
    # Heads are the fast index: programs that run together read the same pages.
    for work in range(tl.program_id(0), tl.load(num_items) * NUM_KV_HEADS, tl.num_programs(0)):
        item = work // NUM_KV_HEADS
        head = work % NUM_KV_HEADS
        block = tl.load(item_block + item)
        segment = tl.load(item_segment + item)
        if HAS_BLOCKS:
            sequence = tl.load(block_sequence + block)
            start = tl.load(block_start + block)
        else:
            sequence = block
            start = 0
        first_token = tl.load(query_start + sequence)
        query_len = tl.load(query_start + sequence + 1) - first_token
        first_position = tl.load(context_lens + sequence) - query_len + start
        begin, end = block_range(context_lens, query_start, sequence, start, True, WINDOW, BLOCK_Q)

        real = (token < BLOCK_Q) & (start + token < query_len)
        position = tl.where(real, first_position + token, -1)
        token_row = (first_token + start + token).to(tl.int64)
        q_head = head * GROUP + member
        q_mask = real[:, None] & (dim[None, :] < HEAD_DIM)
        q_tile = tl.load(
            q + token_row[:, None] * stride_q + q_head[:, None] * HEAD_DIM + dim[None, :], mask=q_mask, other=0.0
        )

        segment_tokens = tl.load(block_segment_tokens + block)
        low = begin // BLOCK_N * BLOCK_N + segment * segment_tokens
        high = tl.minimum(low + segment_tokens, end)
        accumulator = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
        row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
        kv_head = kv + head * HEAD_DIM
        page_table = page_tables + sequence.to(tl.int64) * stride_table

        # [low, full_low): the window's edge; [full_low, full_high): seen by all rows; [full_high, high): the diagonal.
        full_low = low
        full_high = low
        if SKIP_MASKS:
            full_high = tl.minimum(first_position + 1, high) // BLOCK_N * BLOCK_N
            if WINDOW > 0:
                full_low = tl.maximum(end - WINDOW, 0)
                full_low = (full_low + BLOCK_N - 1) // BLOCK_N * BLOCK_N
                full_low = tl.minimum(tl.maximum(full_low, low), high)
                accumulator, row_max, row_sum = _attend_tiles(
                    accumulator, row_max, row_sum, q_tile, kv_head, page_table, low, full_low, begin, end, position,
                    score_scale, soft_cap, stride_page, stride_half, stride_slot,
                    True, WINDOW, HAS_SOFT_CAP, HEAD_DIM, BLOCK_D, BLOCK_N, PAGE_SIZE, PRECISION,
                )  # fmt: skip
            full_high = tl.maximum(full_high, full_low)
            accumulator, row_max, row_sum = _attend_tiles(
                accumulator, row_max, row_sum, q_tile, kv_head, page_table, full_low, full_high, begin, end, position,
                score_scale, soft_cap, stride_page, stride_half, stride_slot,
                False, WINDOW, HAS_SOFT_CAP, HEAD_DIM, BLOCK_D, BLOCK_N, PAGE_SIZE, PRECISION,
            )  # fmt: skip
        accumulator, row_max, row_sum = _attend_tiles(
            accumulator, row_max, row_sum, q_tile, kv_head, page_table, full_high, high, begin, end, position,
            score_scale, soft_cap, stride_page, stride_half, stride_slot,
            True, WINDOW, HAS_SOFT_CAP, HEAD_DIM, BLOCK_D, BLOCK_N, PAGE_SIZE, PRECISION,
        )  # fmt: skip

        if SPLIT:
            if tl.load(block_num_segments + block) == 1:
                _store_rows(
                    out, sinks, accumulator, row_max, row_sum, token_row, q_head, real, stride_out,
                    HEAD_DIM, BLOCK_D, HAS_SINKS,
                )  # fmt: skip
            else:
                partial_row = (item.to(tl.int64) * NUM_KV_HEADS + head) * (BLOCK_Q * GROUP) + row
                kept = row < BLOCK_Q * GROUP
                tl.store(partial_max + partial_row, row_max, mask=kept)
                tl.store(partial_sum + partial_row, row_sum, mask=kept)
                tl.store(partial_out + partial_row[:, None] * BLOCK_D + dim[None, :], accumulator, mask=kept[:, None])
        else:
            _store_rows(
                out, sinks, accumulator, row_max, row_sum, token_row, q_head, real, stride_out,
                HEAD_DIM, BLOCK_D, HAS_SINKS,
            )  # fmt: skip


def run_attention(
    plan: AttentionPlan,
    q: Tensor,
    kv: Tensor,
    *,
    page_tables: Tensor,
    context_lens: Tensor,
    query_start: Tensor,
    scale: float,
    out: Tensor,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
) -> None:
    """Attend the query tokens that `plan` lists; other rows of `out` are left alone.

    q, out: [T, Hq, D] fp32/bf16/fp16, heads and elements contiguous (rows may be strided). kv: see the module. scale
    multiplies q·k; soft_cap c bounds scores to c·tanh(score / c); sinks: [Hq], a learnt score per head that takes
    part in the softmax without a value. Accumulates in fp32 and rounds the result to out's dtype.
    """
    tiling = plan.tiling
    num_kv_heads, head_dim = kv.shape[3], kv.shape[4]
    group = q.shape[1] // num_kv_heads
    block_d = triton.next_power_of_2(head_dim)
    split = plan.split
    rows = tiling.block_q * group
    partials: tuple[Tensor, Tensor, Tensor] | None = None
    if split:
        num_rows = plan.max_items * num_kv_heads * rows
        partials = (
            torch.empty(num_rows, block_d, dtype=torch.float32, device=q.device),
            torch.empty(num_rows, dtype=torch.float32, device=q.device),
            torch.empty(num_rows, dtype=torch.float32, device=q.device),
        )
    _attention_kernel[(min(plan.max_items * num_kv_heads, tiling.max_programs),)](
        out,
        q,
        kv,
        page_tables,
        context_lens,
        query_start,
        plan.item_block,
        plan.item_segment,
        plan.num_items,
        plan.block_sequence,
        plan.block_start,
        plan.block_num_segments,
        plan.block_segment_tokens,
        *(partials or (None, None, None)),
        sinks,
        scale * _LOG2_E if soft_cap is None else scale / soft_cap,
        soft_cap or 0.0,
        out.stride(0),
        q.stride(0),
        kv.stride(0),
        kv.stride(1),
        kv.stride(2),
        page_tables.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        BLOCK_M=tiling.block_m,
        BLOCK_Q=tiling.block_q,
        BLOCK_N=tiling.block_n,
        PAGE_SIZE=kv.shape[2],
        WINDOW=plan.window or 0,
        HAS_SOFT_CAP=soft_cap is not None,
        HAS_SINKS=sinks is not None,
        HAS_BLOCKS=plan.block_sequence is not None,
        SPLIT=split,
        SKIP_MASKS=tiling.skip_masks,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )
    if partials is not None:
        merge_segments(
            plan, out, *partials, query_start=query_start, num_kv_heads=num_kv_heads, group=group, sinks=sinks
        )
