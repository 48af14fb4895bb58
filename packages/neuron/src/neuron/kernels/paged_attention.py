"""Attention over paged keys and values: one kernel for decode and prefill, split along the context where that pays.

The unit of work is an *item* = (query block, segment). A query block is up to BLOCK_Q consecutive query tokens of one
sequence with all query heads of one KV head beside them (rows = BLOCK_Q * group, padded to a power of two, so that
grouped queries fill the tensor core's M dimension and K and V are read once per group). A segment is a run of the
block's visible context. Blocks with one segment write their output at once; blocks with several write unnormalised
partial results that a second kernel merges (split-KV as in FlashDecoding, Dao et al. 2023; online softmax of
Milakov & Gimelshein 2018 and FlashAttention-2, Dao 2023).

How a context is cut depends on that sequence alone (`Tiling.min_segment_tokens`, `max_segments`), never on its
neighbours, and partial results are merged in a fixed order: the attention of a request is bitwise the same in any
batch. The list of items is made on the device (`plan_attention`), so that nothing waits for the host and a CUDA graph
replays correctly while contexts grow; programs walk the list with a stride.

Masks select (`tl.where`, masked loads), they never multiply: a NaN in an unused cell cannot leak.

Shapes: q, out [T, Hq, D]; kv [num_pages, 2, page_size, Hkv, D]; page_tables [S, max_pages] int32;
context_lens [S] int32; query_start [S + 1] int32. Query tokens are the last of their context (bottom-right causal).
"""

# Kernel parameters are pointers and constexprs, which Python types cannot express.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disallow-untyped-calls=False

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from neuron.kernels.tiling import Tiling

_LOG2_E = 1.4426950408889634
_PLAN_CHUNK = 1024


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """The work of one launch; valid for every layer of a step that has the same window.

    item_block, item_segment: [max_items] int32. num_items: [1] int32, how many of them are real. Per query block:
    block_sequence, block_start (first query token, counted in its chunk; both None when block i is sequence i from
    its first token), block_first_item, block_num_segments, block_segment_tokens: [num_blocks] int32.
    """

    tiling: Tiling
    num_blocks: int
    max_items: int
    split: bool
    window: int | None
    item_block: Tensor
    item_segment: Tensor
    num_items: Tensor
    block_sequence: Tensor | None
    block_start: Tensor | None
    block_first_item: Tensor
    block_num_segments: Tensor
    block_segment_tokens: Tensor


@triton.jit
def _block_range(context_lens, query_start, sequence, start, live, WINDOW: tl.constexpr, BLOCK_Q: tl.constexpr):
    """Visible context [begin, end) of query blocks: elementwise on scalars or vectors. Dead blocks get [0, 0)."""
    context_len = tl.load(context_lens + sequence, mask=live, other=0)
    query_len = tl.load(query_start + sequence + 1, mask=live, other=0) - tl.load(
        query_start + sequence, mask=live, other=0
    )
    first_position = context_len - query_len + start
    end = tl.minimum(first_position + BLOCK_Q, context_len)
    end = tl.maximum(end, 0)
    if WINDOW > 0:  # noqa: SIM108
        begin = tl.minimum(tl.maximum(first_position - WINDOW + 1, 0), end)
    else:
        begin = end * 0
    return begin, end


@triton.jit
def _segment_tokens(begin, end, max_segments, MIN_TOKENS: tl.constexpr, BLOCK_N: tl.constexpr):
    """How a context is cut: (tokens per segment, number of segments >= 1), from the tile that holds `begin`."""
    length = end - begin // BLOCK_N * BLOCK_N
    tokens = (length + max_segments - 1) // max_segments
    tokens = (tokens + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    tokens = tl.maximum(tokens, MIN_TOKENS)
    return tokens, tl.maximum((length + tokens - 1) // tokens, 1)


@triton.jit(do_not_specialize=["num_blocks"])
def _plan_kernel(
    item_block,
    item_segment,
    num_items,
    block_first_item,
    block_num_segments,
    block_segment_tokens,
    context_lens,
    query_start,
    block_sequence,
    block_start,
    block_max_segments,
    num_blocks,
    WINDOW: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_TOKENS: tl.constexpr,
    MAX_SEGMENTS: tl.constexpr,
    HAS_BLOCKS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program per query block: its place in the item list is the number of segments of all blocks before it."""
    block = tl.program_id(0)
    first_item = 0
    for chunk in range(0, block + 1, CHUNK):
        index = chunk + tl.arange(0, CHUNK)
        live = index <= block
        if HAS_BLOCKS:
            sequence = tl.load(block_sequence + index, mask=live, other=0)
            start = tl.load(block_start + index, mask=live, other=0)
            limit = tl.load(block_max_segments + index, mask=live, other=1)
        else:
            sequence = index
            start = index * 0
            limit = index * 0 + MAX_SEGMENTS
        begin, end = _block_range(context_lens, query_start, sequence, start, live, WINDOW, BLOCK_Q)
        tokens, segments = _segment_tokens(begin, end, limit, MIN_TOKENS, BLOCK_N)
        first_item += tl.sum(tl.where(index < block, segments, 0), axis=0)
        own = index == block
        tl.store(block_segment_tokens + index, tokens, mask=own)
        tl.store(block_num_segments + index, segments, mask=own)
        # Only the last chunk holds the block itself; earlier sums are of a mask that is nowhere true.
        own_segments = tl.sum(tl.where(own, segments, 0), axis=0)
        if chunk + CHUNK > block:
            tl.store(block_first_item + block, first_item)
            segment = tl.arange(0, MAX_SEGMENTS)
            real = segment < own_segments
            tl.store(item_block + first_item + segment, segment * 0 + block, mask=real)
            tl.store(item_segment + first_item + segment, segment, mask=real)
            if block == num_blocks - 1:
                tl.store(num_items, first_item + own_segments)


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
        begin, end = _block_range(context_lens, query_start, sequence, start, True, WINDOW, BLOCK_Q)

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


def plan_attention(
    tiling: Tiling,
    *,
    context_lens: Tensor,
    query_start: Tensor,
    num_blocks: int,
    max_items: int,
    split: bool,
    window: int | None = None,
    block_sequence: Tensor | None = None,
    block_start: Tensor | None = None,
    block_max_segments: Tensor | None = None,
) -> AttentionPlan:
    """List the items of a launch on the device, without a sync.

    Without block tensors, block i is sequence i with all its (at most BLOCK_Q) query tokens: decode. With them
    ([num_blocks] int32 each), block i holds the query tokens from block_start[i] of sequence block_sequence[i] and is
    cut into at most block_max_segments[i] segments. max_items: room in the item list, at least the sum of segments.
    split: whether any block may have more than one segment.
    """
    device = context_lens.device
    has_blocks = block_sequence is not None
    # Rows of 128 bytes, so that every pointer is 16-byte aligned and one compiled variant serves all.
    per_block = torch.empty(3, triton.cdiv(num_blocks, 32) * 32, dtype=torch.int32, device=device)
    items = torch.empty(2, triton.cdiv(max_items, 32) * 32, dtype=torch.int32, device=device)
    num_items = torch.empty(1, dtype=torch.int32, device=device)
    _plan_kernel[(num_blocks,)](
        items[0],
        items[1],
        num_items,
        per_block[0],
        per_block[1],
        per_block[2],
        context_lens,
        query_start,
        block_sequence,
        block_start,
        block_max_segments,
        num_blocks,
        WINDOW=window or 0,
        BLOCK_Q=tiling.block_q,
        BLOCK_N=tiling.block_n,
        MIN_TOKENS=tiling.min_segment_tokens,
        MAX_SEGMENTS=tiling.max_segments,
        HAS_BLOCKS=has_blocks,
        CHUNK=min(_PLAN_CHUNK, max(16, triton.next_power_of_2(num_blocks))),
        num_warps=4,
    )
    return AttentionPlan(
        tiling=tiling,
        num_blocks=num_blocks,
        max_items=max_items,
        split=split,
        window=window,
        item_block=items[0],
        item_segment=items[1],
        num_items=num_items,
        block_sequence=block_sequence,
        block_start=block_start,
        block_first_item=per_block[0],
        block_num_segments=per_block[1],
        block_segment_tokens=per_block[2],
    )


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
    partial_out = partial_max = partial_sum = None
    if split:
        num_rows = plan.max_items * num_kv_heads * rows
        partial_out = torch.empty(num_rows, block_d, dtype=torch.float32, device=q.device)
        partial_max = torch.empty(num_rows, dtype=torch.float32, device=q.device)
        partial_sum = torch.empty(num_rows, dtype=torch.float32, device=q.device)
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
        partial_out,
        partial_max,
        partial_sum,
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
    if split:
        _merge_kernel[(plan.num_blocks, num_kv_heads * rows)](
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
            HEAD_DIM=head_dim,
            BLOCK_D=block_d,
            BLOCK_Q=tiling.block_q,
            MAX_SEGMENTS=tiling.max_segments,
            HAS_SINKS=sinks is not None,
            HAS_BLOCKS=plan.block_sequence is not None,
            num_warps=4 if tiling.max_segments * block_d >= 2048 else 2,
        )
