"""The CUDA attention backend: decodes and prefill chunks of a step as two launches of one paged kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from neuron.engine.attention.attention_plugins import PrefillPlugin, PromptChunks
from neuron.engine.kernels import KernelUnsupported
from neuron.engine.kernels.attention.attention_plan import AttentionPlan, plan_attention
from neuron.engine.kernels.attention.kv_write import kv_write
from neuron.engine.kernels.attention.paged_attention import run_attention
from neuron.engine.kernels.attention.tiling import (
    Chip,
    Tiling,
    chip_of,
    decode_tiling,
    invariant_tiling,
    prefill_tiling,
)

if TYPE_CHECKING:
    from neuron.engine.attention.interface import StepBatch

MAX_HEAD_DIM = 256


@dataclass(frozen=True, slots=True)
class QueryBlocks:
    """Query blocks of prefill chunks, those with the longest context first.

    table: [3, n] int32 rows (sequence, first query token within the chunk, most segments it may be cut into).
    split: whether these blocks are cut along the context. max_items: how many items they make at most.
    """

    table: npt.NDArray[np.int32]
    split: bool
    max_items: int


def count_segments(length: int, *, max_segments: int, tiling: Tiling) -> int:
    """The most segments that a context of `length` tokens is cut into: an upper bound of the kernel's planner."""
    tiles = -(-length // tiling.block_n) + 1  # a window may begin inside a tile
    return max(1, min(max_segments, -(-tiles * tiling.block_n // tiling.min_segment_tokens)))


def query_blocks(
    query_lens: Sequence[int], context_lens: Sequence[int], *, first_sequence: int, tiling: Tiling, window: int | None
) -> list[QueryBlocks]:
    """Cut chunks into blocks of `tiling.block_q` query tokens; at most one group of each kind (whole, split).

    Long chunks have blocks enough to fill a device; a chunk of few blocks behind a long cached prefix is cut along
    its context as well. What becomes of a chunk depends on itself alone, so its result does not depend on the batch.
    """
    tables: dict[bool, list[npt.NDArray[np.int64]]] = {False: [], True: []}
    max_items = {False: 0, True: 0}
    for index, (query_len, context_len) in enumerate(zip(query_lens, context_lens, strict=True)):
        start = np.arange(0, query_len, tiling.block_q, dtype=np.int64)
        limit = max(1, tiling.max_segments // max(len(start), 1))
        length = context_len if window is None else min(context_len, window + tiling.block_q)
        segments = count_segments(length, max_segments=limit, tiling=tiling)
        visible = np.minimum(context_len - query_len + start + tiling.block_q, length)
        split = segments > 1
        max_items[split] += segments * len(start)
        columns = np.full_like(start, first_sequence + index), start, np.full_like(start, limit), visible
        tables[split].append(np.stack(columns))
    groups = []
    for split, parts in tables.items():
        if parts:
            table = np.concatenate(parts, axis=1)
            order = np.argsort(-table[3], kind="stable")
            groups.append(QueryBlocks(table[:3, order].astype(np.int32), split, max_items[split]))
    return groups


class TritonAttention:
    """`AttentionBackend` on our Triton kernels; see `docs/explanation/kernels.md` for the design.

    `prepare` only forgets the last step's plans. A plan (which items there are) is made on the device by the first
    layer that needs it and kept for the others; layers with another window make their own. So a CUDA graph captures
    planning together with attention: call `prepare`, then capture the forward pass, with `batch.max_context_len` set
    to the longest context that the graph shall serve, because that number sizes scratch memory.
    """

    def __init__(
        self, tune: Callable[[Tiling], Tiling] = lambda tiling: tiling, *, deterministic: bool = False
    ) -> None:
        """tune: changes the tile shapes that would be taken, for measurements. deterministic: decodes and prompts take
        one tile shape and no context is cut, so that a token's bits do not depend on how its prompt came in either."""
        self._tune = tune
        self._deterministic = deterministic
        # Another library's attention for prompt chunks, if start-up has found one that is faster.
        self.prefill_plugin: PrefillPlugin | None = None
        self._chunks: PromptChunks | None = None
        self._plans: dict[tuple[bool, int | None, Tiling], list[AttentionPlan]] = {}

    def prepare(self, batch: StepBatch) -> None:
        """Forget the last step. Must be called once before the first layer of each step."""
        self._plans.clear()
        self._chunks = None
        if self.prefill_plugin is not None:
            self.prefill_plugin.prepare()

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv_layer: Tensor,
        batch: StepBatch,
        *,
        scale: float,
        sliding_window: int | None,
    ) -> Tensor:
        """Write K and V of this step's tokens into their pages, then attend.

        q: [T, Hq, D]; k, v: [T, Hkv, D] (rows may be views of packed QKV); kv_layer: [num_pages, 2, page_size, Hkv,
        D]. Returns [T, Hq, D] in q's dtype. Raises `KernelUnsupported` for head sizes above 256.
        """
        kv_write(k, v, kv_layer, batch.slot_mapping)
        return self.attend(q, kv_layer, batch, scale=scale, sliding_window=sliding_window)

    def attend(
        self,
        q: Tensor,
        kv_layer: Tensor,
        batch: StepBatch,
        *,
        scale: float,
        sliding_window: int | None,
        soft_cap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """`forward` for a caller that has already written K and V (the fused rotary kernel does)."""
        num_tokens, num_heads, head_dim = q.shape
        num_kv_heads = kv_layer.shape[3]
        if head_dim > MAX_HEAD_DIM or head_dim % 8:
            raise KernelUnsupported(f"head size {head_dim}: kernels cover multiples of 8 up to {MAX_HEAD_DIM}")
        if num_heads % num_kv_heads:
            raise KernelUnsupported(f"{num_heads} query heads do not divide among {num_kv_heads} KV heads")
        if q.stride(1) != head_dim or q.stride(2) != 1:
            q = q.contiguous()
        group = num_heads // num_kv_heads
        out = torch.empty(num_tokens, num_heads, head_dim, dtype=q.dtype, device=q.device)
        chip = chip_of(q.device)
        plans: list[AttentionPlan] = []
        if batch.num_decodes:
            tiling = self._tiling(chip, head_dim, group, kv_layer.dtype, decodes=True)
            plans += self._plans_for(True, batch, self._tune(tiling), sliding_window)
        plugin = self.prefill_plugin if soft_cap is None and sinks is None else None
        if batch.num_decodes < batch.num_sequences and plugin is not None:
            if self._chunks is None:
                self._chunks = PromptChunks.of(batch)
            first = batch.num_decodes
            out[first:] = plugin.attend(q[first:], kv_layer, self._chunks, scale=scale, sliding_window=sliding_window)
        elif batch.num_decodes < batch.num_sequences:
            tiling = self._tiling(chip, head_dim, group, kv_layer.dtype, decodes=False)
            plans += self._plans_for(False, batch, self._tune(tiling), sliding_window)
        for plan in plans:
            run_attention(
                plan,
                q,
                kv_layer,
                page_tables=batch.page_tables,
                context_lens=batch.context_lens,
                query_start=batch.query_start,
                scale=scale,
                out=out,
                soft_cap=soft_cap,
                sinks=sinks,
            )
        return out

    def _tiling(self, chip: Chip, head_dim: int, group: int, dtype: torch.dtype, *, decodes: bool) -> Tiling:
        if self._deterministic:
            return invariant_tiling(chip, head_dim=head_dim, group=group, dtype=dtype)
        if decodes:
            return decode_tiling(chip, head_dim=head_dim, group=group, dtype=dtype)
        return prefill_tiling(chip, head_dim=head_dim, group=group, dtype=dtype)

    def _plans_for(self, decodes: bool, batch: StepBatch, tiling: Tiling, window: int | None) -> list[AttentionPlan]:
        key = decodes, window, tiling
        plans = self._plans.get(key)
        if plans is None:
            make = self._plan_decodes if decodes else self._plan_chunks
            plans = self._plans[key] = make(batch, tiling, window)
        return plans

    @staticmethod
    def _plan_decodes(batch: StepBatch, tiling: Tiling, window: int | None) -> list[AttentionPlan]:
        length = batch.max_context_len if window is None else min(batch.max_context_len, window)
        segments = count_segments(length, max_segments=tiling.max_segments, tiling=tiling)
        plan = plan_attention(
            tiling,
            context_lens=batch.context_lens,
            query_start=batch.query_start,
            num_blocks=batch.num_decodes,
            max_items=batch.num_decodes * segments,
            split=tiling.max_segments > 1,
            window=window,
        )
        return [plan]

    @staticmethod
    def _plan_chunks(batch: StepBatch, tiling: Tiling, window: int | None) -> list[AttentionPlan]:
        plans = []
        device = batch.context_lens.device
        for blocks in query_blocks(
            batch.query_lens_host[batch.num_decodes :],
            batch.context_lens_host[batch.num_decodes :],
            first_sequence=batch.num_decodes,
            tiling=tiling,
            window=window,
        ):
            num_blocks = blocks.table.shape[1]
            # Rows of 128 bytes keep every pointer aligned, so that one compiled variant serves all.
            host = torch.zeros(3, -(-num_blocks // 32) * 32, dtype=torch.int32, pin_memory=device.type == "cuda")
            host.numpy()[:, :num_blocks] = blocks.table
            table = host.to(device, non_blocking=True)
            plan = plan_attention(
                tiling,
                context_lens=batch.context_lens,
                query_start=batch.query_start,
                num_blocks=num_blocks,
                max_items=blocks.max_items,
                split=blocks.split,
                window=window,
                block_sequence=table[0],
                block_start=table[1],
                block_max_segments=table[2],
            )
            plans.append(plan)
        return plans
