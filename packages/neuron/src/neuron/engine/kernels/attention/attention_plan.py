"""Work list of an attention launch: query blocks times segments of their contexts, listed on the device.

How a context is cut depends on that sequence alone (`Tiling.min_segment_tokens`, `max_segments`), never on its
neighbours. See `neuron.engine.kernels.attention.paged_attention`.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disallow-untyped-calls=False

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from neuron.engine.kernels.attention.tiling import Tiling

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
def block_range(context_lens, query_start, sequence, start, live, WINDOW: tl.constexpr, BLOCK_Q: tl.constexpr):
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
        begin, end = block_range(context_lens, query_start, sequence, start, live, WINDOW, BLOCK_Q)
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
