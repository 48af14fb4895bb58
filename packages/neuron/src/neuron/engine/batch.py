"""One step as tensors: the flat batch that a model runs, and the builder that fills it from a step plan."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

if TYPE_CHECKING:
    from neuron.engine.kv_cache import PagedKV
    from neuron.engine.scheduler import StepPlan
    from neuron.layers.attention import AttentionBackend


@dataclass(slots=True)
class StepBatch:
    """One flat varlen forward pass over T tokens of S sequences, without padding; decodes first, then prefill chunks.

    token_ids, positions: [T] int64. slot_mapping: [T] int64, page * page_size + offset where each token's K and V
    are written. query_start: [S+1] int32, cumulative query lengths. context_lens: [S] int32, KV length after this
    step's tokens are written. page_tables: [S, max_pages] int32, page 0 is padding. logits_indices: [R] int64,
    rows of T whose logits are wanted. The `_host` lists are copies, so that CPU attention needs no sync.
    The tensors are views of the builder's buffers and are valid until its next `build`.
    """

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    query_start: Tensor
    context_lens: Tensor
    page_tables: Tensor
    logits_indices: Tensor
    query_lens_host: list[int]
    context_lens_host: list[int]
    num_decodes: int  # the first num_decodes sequences have exactly one query token
    max_query_len: int
    max_context_len: int

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    @property
    def num_sequences(self) -> int:
        return len(self.query_lens_host)


class PackedBatch(msgspec.Struct, frozen=True, array_like=True):
    """A batch as it lies in its builder's host buffers, for a rank that has an equal builder.

    table_width: columns of the page tables. int64, int32: the filled part of each buffer.
    """

    num_tokens: int
    num_sequences: int
    num_decodes: int
    num_logits: int
    table_width: int
    int64: memoryview
    int32: memoryview


@dataclass(slots=True)
class StepContext:
    """What a model's forward pass needs beyond its weights; passed explicitly, there is no global."""

    batch: StepBatch
    kv: PagedKV
    attention: AttentionBackend


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


class BatchBuilder:
    """Fills preallocated buffers with the next step's inputs.

    All int64 inputs share one host buffer and all int32 inputs another, so that a CUDA step costs two copies. On the
    CPU the batch views the host buffers directly. Capacity: `max_tokens` per step, `max_sequences`, and page tables
    as wide as `max_pages` per sequence.
    """

    def __init__(
        self, *, max_tokens: int, max_sequences: int, max_pages: int, page_size: int, device: torch.device
    ) -> None:
        self._page_size = page_size
        on_cuda = device.type == "cuda"
        size64 = 3 * _align(max_tokens) + _align(max_sequences)
        size32 = _align(max_sequences + 1) + _align(max_sequences) + max_sequences * max_pages
        self._host64 = torch.zeros(size64, dtype=torch.int64, pin_memory=on_cuda)
        self._host32 = torch.zeros(size32, dtype=torch.int32, pin_memory=on_cuda)
        self._array64: npt.NDArray[np.int64] = self._host64.numpy()
        self._array32: npt.NDArray[np.int32] = self._host32.numpy()
        self._device64 = torch.zeros_like(self._host64, device=device) if on_cuda else self._host64
        self._device32 = torch.zeros_like(self._host32, device=device) if on_cuda else self._host32
        # The copies of the last batch: its buffers may not be overwritten before they are done, and a step that samples
        # nothing ends before the device has begun it.
        self._copied = torch.cuda.Event() if on_cuda else None  # type: ignore[no-untyped-call]

    def build(self, plan: StepPlan) -> StepBatch:
        """The batch of `plan`; its tensors are overwritten by the next call."""
        page_size = self._page_size
        chunks = plan.chunks
        num_sequences = len(chunks)
        num_tokens = plan.num_tokens
        num_decodes = plan.num_decodes
        if self._copied is not None:
            self._copied.synchronize()

        query_lens = [chunk.num_tokens for chunk in chunks]
        context_lens = [chunk.start + chunk.num_tokens for chunk in chunks]
        max_context_len = max(context_lens)
        width = -(-max_context_len // page_size)

        positions_at = _align(num_tokens)
        slots_at = 2 * positions_at
        rows_at = 3 * positions_at
        context_at, tables_at, end32 = _regions32(num_sequences, width)

        ids = self._array64[:num_tokens]
        positions = self._array64[positions_at : positions_at + num_tokens]
        slots = self._array64[slots_at : slots_at + num_tokens]
        start = self._array32[: num_sequences + 1]
        tables = self._array32[tables_at:end32].reshape(num_sequences, width)

        ends = list(accumulate(query_lens))
        start[0] = 0
        start[1:] = ends
        self._array32[context_at : context_at + num_sequences] = context_lens
        tables[:] = 0
        for row, chunk in enumerate(chunks):
            pages = chunk.sequence.pages
            used = min(len(pages), width)
            tables[row, :used] = np.frombuffer(pages, dtype=np.int32, count=used)

        if num_decodes:
            # Plain integers: for one token per sequence numpy's vector arithmetic costs more than it saves.
            decodes = chunks[:num_decodes]
            ids[:num_decodes] = [chunk.sequence.tokens[chunk.start] for chunk in decodes]
            positions[:num_decodes] = [chunk.start for chunk in decodes]
            slots[:num_decodes] = [
                chunk.sequence.pages[chunk.start // page_size] * page_size + chunk.start % page_size
                for chunk in decodes
            ]
        begin = num_decodes
        for row in range(num_decodes, num_sequences):
            chunk = chunks[row]
            end = begin + chunk.num_tokens
            chunk_positions = np.arange(chunk.start, chunk.start + chunk.num_tokens)
            page_index, offset = np.divmod(chunk_positions, page_size)
            ids[begin:end] = chunk.sequence.tokens[chunk.start : chunk.start + chunk.num_tokens]
            positions[begin:end] = chunk_positions
            slots[begin:end] = tables[row][page_index].astype(np.int64) * page_size + offset
            begin = end

        last_rows = [end - 1 for end, chunk in zip(ends, chunks, strict=True) if chunk.samples]
        self._array64[rows_at : rows_at + len(last_rows)] = last_rows
        return self._on_device(num_tokens, num_decodes, len(last_rows), width, query_lens, context_lens)

    def pack(self, batch: StepBatch) -> PackedBatch:
        """The last batch that `build` made, as views of the host buffers (valid until the next call)."""
        num_tokens, num_logits = batch.num_tokens, batch.logits_indices.shape[0]
        num_sequences, width = batch.page_tables.shape
        end32 = _regions32(num_sequences, width)[2]
        return PackedBatch(
            num_tokens,
            num_sequences,
            batch.num_decodes,
            num_logits,
            width,
            self._array64[: 3 * _align(num_tokens) + num_logits].data.cast("B"),
            self._array32[:end32].data.cast("B"),
        )

    def unpack(self, packed: PackedBatch) -> StepBatch:
        """The batch that another rank has built and packed; its tensors are overwritten by the next call.

        Raises `ValueError` for one that does not fit into this builder's buffers.
        """
        num_sequences, width = packed.num_sequences, packed.table_width
        context_at, _, end32 = _regions32(num_sequences, width)
        end64 = 3 * _align(packed.num_tokens) + packed.num_logits
        if self._copied is not None:
            self._copied.synchronize()
        self._array64[:end64] = np.frombuffer(packed.int64, dtype=np.int64)
        self._array32[:end32] = np.frombuffer(packed.int32, dtype=np.int32)
        query_lens = np.diff(self._array32[: num_sequences + 1]).tolist()
        context_lens = self._array32[context_at : context_at + num_sequences].tolist()
        return self._on_device(
            packed.num_tokens, packed.num_decodes, packed.num_logits, width, query_lens, context_lens
        )

    def _on_device(
        self,
        num_tokens: int,
        num_decodes: int,
        num_logits: int,
        width: int,
        query_lens: list[int],
        context_lens: list[int],
    ) -> StepBatch:
        """Copy what the host buffers hold, and the batch as views of it."""
        num_sequences = len(query_lens)
        positions_at = _align(num_tokens)
        slots_at = 2 * positions_at
        rows_at = 3 * positions_at
        end64 = rows_at + num_logits
        context_at, tables_at, end32 = _regions32(num_sequences, width)
        device64, device32 = self._device64, self._device32
        if self._copied is not None:
            device64[:end64].copy_(self._host64[:end64], non_blocking=True)
            device32[:end32].copy_(self._host32[:end32], non_blocking=True)
            self._copied.record()
        return StepBatch(
            token_ids=device64[:num_tokens],
            positions=device64[positions_at : positions_at + num_tokens],
            slot_mapping=device64[slots_at : slots_at + num_tokens],
            query_start=device32[: num_sequences + 1],
            context_lens=device32[context_at : context_at + num_sequences],
            page_tables=device32[tables_at:end32].view(num_sequences, width),
            logits_indices=device64[rows_at:end64],
            query_lens_host=query_lens,
            context_lens_host=context_lens,
            num_decodes=num_decodes,
            max_query_len=max(query_lens),
            max_context_len=max(context_lens),
        )
