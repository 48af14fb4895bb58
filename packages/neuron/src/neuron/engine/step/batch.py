"""One step as tensors: the flat batch that a model runs, and the builder that fills it from a step plan."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from neuron.engine.attention.interface import StepBatch
from neuron.engine.device_stream import Fence, ImmediateStream, Stream
from neuron.engine.parallel.messages import PackedBatch
from neuron.engine.scheduler.scheduler import Chunk, StepPlan

# Every region of a packed buffer starts at a multiple of this many elements (at least 128 bytes), so that a Triton
# kernel always sees 16-byte aligned pointers and never compiles a second variant for unaligned ones.
_ALIGNMENT = 32


def _align(num_elements: int) -> int:
    return -(-num_elements // _ALIGNMENT) * _ALIGNMENT


def _regions32(num_sequences: int, width: int) -> tuple[int, int, int]:
    """Where context lengths and page tables begin in the int32 buffer, and where the tables end."""
    context_at = _align(num_sequences + 1)
    tables_at = context_at + _align(num_sequences)
    return context_at, tables_at, tables_at + num_sequences * width


# Tokens, logits, sequences and the width of page tables of a step.
_Extents = tuple[int, int, int, int]
# The tensors of a `StepBatch`: ids, positions, slots, query starts, context lengths, rows of logits, page tables.
_Views = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _batch_of(views: _Views, num_decodes: int, query_lens: list[int], context_lens: list[int]) -> StepBatch:
    ids, positions, slots, query_start, lengths, rows, tables = views
    return StepBatch(
        token_ids=ids,
        positions=positions,
        slot_mapping=slots,
        query_start=query_start,
        context_lens=lengths,
        page_tables=tables,
        logits_indices=rows,
        query_lens_host=query_lens,
        context_lens_host=context_lens,
        num_decodes=num_decodes,
        max_query_len=max(query_lens),
        max_context_len=max(context_lens),
    )


def _rows_sampled(chunks: list[Chunk], num_tokens: int, num_padding: int) -> list[int]:
    """Rows of the step whose logits are wanted: the last ones of each chunk, and all of the padding."""
    rows: list[int] = []
    end = 0
    for chunk in chunks:
        end += chunk.num_tokens
        rows += range(end - chunk.num_sampled, end)
    rows += range(num_tokens, num_tokens + num_padding)
    return rows


@dataclass(slots=True)
class _HostBuffers:
    """One set of host buffers. copied: when the device has read them. table_rows: what fills the page tables."""

    tensor64: Tensor
    tensor32: Tensor
    array64: npt.NDArray[np.int64]
    array32: npt.NDArray[np.int32]
    copied: Fence | None = None
    table_rows: list[tuple[array[int], int] | None] | None = None
    table_width: int = 0

    @classmethod
    def make(cls, size64: int, size32: int, *, pinned: bool) -> _HostBuffers:
        tensor64 = torch.zeros(size64, dtype=torch.int64, pin_memory=pinned)
        tensor32 = torch.zeros(size32, dtype=torch.int32, pin_memory=pinned)
        return cls(tensor64, tensor32, tensor64.numpy(), tensor32.numpy())


class BatchBuilder:
    """Fills preallocated buffers with the next step's inputs.

    All int64 inputs share one host buffer and all int32 inputs another, so that a CUDA step costs two copies. There are
    two sets of them, because a step is built while the copies of the one before may wait for the device. On the CPU the
    batch views the one set of host buffers directly. Capacity: `max_tokens` per step, `max_sequences`, and page tables
    as wide as `max_pages` per sequence.
    """

    def __init__(
        self,
        *,
        max_tokens: int,
        max_sequences: int,
        max_pages: int,
        page_size: int,
        device: torch.device,
        stream: Stream | None = None,
    ) -> None:
        self._page_size = page_size
        self._max_sequences = max_sequences
        self._max_pages = max_pages
        self._stream = stream or ImmediateStream()
        self._is_staged = self._stream.is_deferred
        self._numbers = np.arange(max(max_tokens, max_sequences) + 1, dtype=np.int64)
        size64 = 3 * _align(max_tokens) + _align(max_sequences)
        size32 = _align(max_sequences + 1) + _align(max_sequences) + max_sequences * max_pages
        pinned = device.type == "cuda"
        self._sets = [_HostBuffers.make(size64, size32, pinned=pinned) for _ in range(2 if self._is_staged else 1)]
        self._host = self._sets[0]
        self._device64, self._device32 = self._host.tensor64, self._host.tensor32
        if self._is_staged:
            self._device64 = torch.zeros_like(self._device64, device=device)
            self._device32 = torch.zeros_like(self._device32, device=device)
        # The last step's views and what they were made for. The buffers are the builder's for good, so views of the
        # same extents are the same; a decode step mostly has those of the one before.
        self._extents: _Extents | None = None
        self._views: _Views | None = None
        # The page tables that CUDA graphs read: rows of one width, whatever the step.
        self._graph_tables: Tensor | None = None

    def build(self, plan: StepPlan, *, graph_rows: int = 0) -> StepBatch:
        """The batch of `plan`; its tensors are overwritten by the next call.

        graph_rows: for a step of decodes only, the rows of the CUDA graph that shall run it: further ones see nothing
        and write to page 0. A plan without chunks gives only such rows.
        """
        page_size = self._page_size
        chunks = plan.chunks
        num_decodes = plan.num_decodes
        num_tokens = plan.num_tokens
        starts = [chunk.start for chunk in chunks]
        is_decode = num_decodes == len(chunks)
        if is_decode:
            query_lens = [1] * num_decodes
            context_lens = [start + 1 for start in starts]
        else:
            query_lens = [chunk.num_tokens for chunk in chunks]
            context_lens = [start + length for start, length in zip(starts, query_lens, strict=True)]
        num_padding = max(graph_rows - num_tokens, 0)
        if num_padding:
            num_tokens += num_padding
            num_decodes += num_padding
            query_lens += [1] * num_padding
            context_lens += [0] * num_padding
        num_sequences = len(query_lens)
        width = max(-(-max(context_lens) // page_size), 1)

        host = self._next_set()
        positions_at = _align(num_tokens)
        slots_at = 2 * positions_at
        rows_at = 3 * positions_at
        context_at, tables_at, end32 = _regions32(num_sequences, width)

        ids = host.array64[:num_tokens]
        positions = host.array64[positions_at : positions_at + num_tokens]
        slots = host.array64[slots_at : slots_at + num_tokens]
        tables = host.array32[tables_at:end32].reshape(num_sequences, width)

        # Of one token each, padding included, what ends where is known beforehand.
        if is_decode:
            host.array32[: num_sequences + 1] = self._numbers[: num_sequences + 1]
        else:
            host.array32[: num_sequences + 1] = list(accumulate(query_lens, initial=0))
        host.array32[context_at : context_at + num_sequences] = context_lens
        self._fill_tables(host, tables, plan)

        decodes = chunks[: plan.num_decodes]
        begin = len(decodes)
        if decodes:
            # Plain integers: for one token per sequence numpy's vector arithmetic costs more than it saves.
            if plan.is_chained:
                ids[:begin] = [
                    chunk.sequence.tokens[chunk.start] if chunk.carry_row < 0 else -1 - chunk.carry_row
                    for chunk in decodes
                ]
            else:
                ids[:begin] = [chunk.sequence.tokens[chunk.start] for chunk in decodes]
            positions[:begin] = starts[:begin]
            slots[:begin] = [
                chunk.sequence.pages[start // page_size] * page_size + start % page_size
                for chunk, start in zip(decodes, starts[:begin], strict=True)
            ]
        for row in range(begin, len(chunks)):
            chunk = chunks[row]
            end = begin + chunk.num_tokens
            chunk_positions = np.arange(chunk.start, chunk.start + chunk.num_tokens)
            page_index, offset = np.divmod(chunk_positions, page_size)
            ids[begin:end] = chunk.sequence.tokens[chunk.start : chunk.start + chunk.num_tokens]
            positions[begin:end] = chunk_positions
            slots[begin:end] = tables[row][page_index].astype(np.int64) * page_size + offset
            begin = end
        if num_padding:
            ids[begin:] = 0
            positions[begin:] = 0
            slots[begin:] = 0

        num_logits = num_tokens
        if is_decode and [chunk.num_sampled for chunk in chunks].count(1) == len(chunks):
            host.array64[rows_at : rows_at + num_logits] = self._numbers[:num_logits]
        else:
            last_rows = _rows_sampled(chunks, num_tokens - num_padding, num_padding)
            num_logits = len(last_rows)
            host.array64[rows_at : rows_at + num_logits] = last_rows
        return self._on_device(
            host, num_tokens, num_decodes, num_logits, width, query_lens, context_lens, is_graph=graph_rows > 0
        )

    def pack(self, batch: StepBatch) -> PackedBatch:
        """The last batch that `build` made, as views of the host buffers (valid until the next call)."""
        num_tokens, num_logits = batch.num_tokens, batch.logits_indices.shape[0]
        num_sequences = batch.num_sequences
        width = self._host.table_width
        end32 = _regions32(num_sequences, width)[2]
        return PackedBatch(
            num_tokens,
            num_sequences,
            batch.num_decodes,
            num_logits,
            width,
            self._host.array64[: 3 * _align(num_tokens) + num_logits].data.cast("B"),
            self._host.array32[:end32].data.cast("B"),
        )

    def unpack(self, packed: PackedBatch, *, is_graph: bool = False) -> StepBatch:
        """The batch that another rank has built and packed; its tensors are overwritten by the next call.

        is_graph: it was built for the rows of a CUDA graph. Raises `ValueError` for one that does not fit into this
        builder's buffers.
        """
        num_sequences, width = packed.num_sequences, packed.table_width
        context_at, _, end32 = _regions32(num_sequences, width)
        end64 = 3 * _align(packed.num_tokens) + packed.num_logits
        host = self._next_set()
        host.table_rows = None
        host.array64[:end64] = np.frombuffer(packed.int64, dtype=np.int64)
        host.array32[:end32] = np.frombuffer(packed.int32, dtype=np.int32)
        query_lens = np.diff(host.array32[: num_sequences + 1]).tolist()
        context_lens = host.array32[context_at : context_at + num_sequences].tolist()
        return self._on_device(
            host,
            packed.num_tokens,
            packed.num_decodes,
            packed.num_logits,
            width,
            query_lens,
            context_lens,
            is_graph=is_graph,
        )

    def graph_batch(self, num_rows: int, max_context_len: int) -> StepBatch:
        """The batch that a CUDA graph of `num_rows` decodes reads: where `build` puts the inputs of such steps.

        Every number in it that a kernel may see on the host follows from the two arguments.
        """
        if self._graph_tables is None:
            with torch.inference_mode(False):
                self._graph_tables = torch.zeros(
                    self._max_sequences, self._max_pages, dtype=torch.int32, device=self._device32.device
                )
        views = self._make_views(num_rows, num_rows, num_rows, self._graph_tables[:num_rows])
        return _batch_of(views, num_rows, [1] * num_rows, [max_context_len] * num_rows)

    def _next_set(self) -> _HostBuffers:
        """Host buffers that the device has read."""
        if self._is_staged:
            self._sets.reverse()
            self._host = self._sets[0]
            if self._host.copied is not None:
                self._host.copied.wait()
        return self._host

    @staticmethod
    def _fill_tables(host: _HostBuffers, tables: npt.NDArray[np.int32], plan: StepPlan) -> None:
        """Page tables of the plan's sequences. From step to step most rows stay as they are."""
        num_sequences, width = tables.shape
        rows = host.table_rows
        if rows is None or host.table_width != width or len(rows) != num_sequences:
            tables[:] = 0
            rows = host.table_rows = [None] * num_sequences
            host.table_width = width
        for row, (chunk, filled) in enumerate(zip(plan.chunks, rows, strict=False)):
            pages = chunk.sequence.pages
            used = len(pages)
            # A sequence that loses its pages gets a new list of them, so the same list only ever grows.
            if filled is not None and filled[0] is pages and filled[1] == used:
                continue
            number = min(used, width)
            tables[row, :number] = np.frombuffer(pages, dtype=np.int32, count=number)
            tables[row, number:] = 0
            rows[row] = pages, used
        for row in range(len(plan.chunks), num_sequences):
            if rows[row] is not None:
                tables[row] = 0
                rows[row] = None

    def _on_device(
        self,
        host: _HostBuffers,
        num_tokens: int,
        num_decodes: int,
        num_logits: int,
        width: int,
        query_lens: list[int],
        context_lens: list[int],
        *,
        is_graph: bool,
    ) -> StepBatch:
        """Copy what the host buffers hold, and the batch as views of it."""
        num_sequences = len(query_lens)
        host.table_width = width
        extents = num_tokens, num_logits, num_sequences, width
        if self._views is None or self._extents != extents:
            tables_at, end32 = _regions32(num_sequences, width)[1:]
            tables = self._device32[tables_at:end32].view(num_sequences, width)
            self._views = self._make_views(num_tokens, num_logits, num_sequences, tables)
            self._extents = extents
        views = self._views
        tables = views[-1]
        graph_tables = self._graph_tables if is_graph else None
        if self._is_staged:
            end64, end32 = 3 * _align(num_tokens) + num_logits, _regions32(num_sequences, width)[2]
            device64, device32 = self._device64, self._device32

            def copy() -> None:
                device64[:end64].copy_(host.tensor64[:end64], non_blocking=True)
                device32[:end32].copy_(host.tensor32[:end32], non_blocking=True)
                if graph_tables is not None:
                    # What lies beyond in these rows is of earlier steps: pages that exist, and that nobody looks at.
                    graph_tables[:num_sequences, :width].copy_(tables)

            self._stream.submit(copy)
            host.copied = self._stream.record()
        elif graph_tables is not None:
            graph_tables[:num_sequences, :width].copy_(tables)
        return _batch_of(views, num_decodes, query_lens, context_lens)

    def _make_views(self, num_tokens: int, num_logits: int, num_sequences: int, tables: Tensor) -> _Views:
        positions_at = _align(num_tokens)
        slots_at = 2 * positions_at
        rows_at = 3 * positions_at
        context_at = _align(num_sequences + 1)
        device64, device32 = self._device64, self._device32
        return (
            device64[:num_tokens],
            device64[positions_at : positions_at + num_tokens],
            device64[slots_at : slots_at + num_tokens],
            device32[: num_sequences + 1],
            device32[context_at : context_at + num_sequences],
            device64[rows_at : rows_at + num_logits],
            tables,
        )
