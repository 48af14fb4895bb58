"""Paged attention in plain torch: gather a sequence's pages, then `scaled_dot_product_attention`.

It is the CPU's backend and works on any device. A *plan* (which pages, which rows, which masks) is made once per step
and window, by the first layer that needs it; the layers only gather and multiply.

- Decodes run as one batch. Query heads that share a KV head become rows of one small attention problem
  ([S, Hkv, G, D] against [S, Hkv, L, D]): twice as fast as `enable_gqa` and each page is read once. Shorter
  sequences are padded to the longest of their bucket and masked. Without a window, the gathered keys and values are
  kept for the next step (`decode_workspace`).
- A prefill chunk runs by itself. Without a cached prefix it attends to its own keys; behind a prefix it attends to
  gathered pages, in tiles of rows so that masked keys beyond a tile are skipped. The masks of all tiles are views of
  one "staircase" matrix: row i sees the columns up to i + its width, so shifting the columns gives every prefix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from neuron.engine.attention.decode_workspace import DecodeWorkspace

if TYPE_CHECKING:
    from neuron.engine.attention.interface import StepBatch

_TILE_ROWS = 256
# Decodes are split into buckets of similar length when padding would make them gather this much more than they hold.
_MAX_PADDING_RATIO = 1.5


@dataclass(slots=True)
class DecodeBucket:
    """Decodes of similar length. rows: which of the step's rows (None: all decodes, in order).

    pages: [S, n] of each sequence, padded with page 0. length: keys per sequence after padding. mask: [S, 1, 1,
    length] ([S * Hkv, 1, 1, length] in a workspace), added to the scores; None where all are full. workspace: where
    gathered keys and values are kept between steps, None if they are not.
    """

    rows: Tensor | None
    size: int
    pages: npt.NDArray[np.int32]
    length: int
    mask: Tensor | None
    workspace: DecodeWorkspace | None
    _gathered: Tensor | None = None

    def gathered(self, device: torch.device) -> Tensor:
        """The `page_rows` to gather; most steps do not need them."""
        if self._gathered is None:
            pages = self.pages if self.workspace is None else self.workspace.padded_tables()
            self._gathered = page_rows(pages, device)
        return self._gathered


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows [begin, end) of a chunk against keys [key_begin, key_end) of what it gathers; mask [rows, keys] or None."""

    begin: int
    end: int
    key_begin: int
    key_end: int
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Rows [begin, end) of the step. page_rows: what to gather, None if the chunk's own keys are all it sees.

    tiles: None means plain causal attention of the chunk to itself.
    """

    begin: int
    end: int
    page_rows: Tensor | None
    tiles: tuple[Tile, ...] | None


@dataclass(frozen=True, slots=True)
class Plan:
    """Attention of one step: decodes in buckets of similar length, then prefill chunks."""

    decodes: tuple[DecodeBucket, ...]
    chunks: tuple[PrefillChunk, ...]


def decode_buckets(num_pages: list[int]) -> list[list[int]]:
    """Group sequences (by index) so that padding each group to its longest does not gather too much.

    num_pages: pages that each sequence gathers. One group as long as that is cheap, else one per power of two.
    """
    if max(num_pages) * len(num_pages) <= _MAX_PADDING_RATIO * sum(num_pages):
        return [list(range(len(num_pages)))]
    buckets: dict[int, list[int]] = {}
    for index, count in enumerate(num_pages):
        buckets.setdefault((count - 1).bit_length(), []).append(index)
    return list(buckets.values())


class Staircase:
    """Masks of prefill tiles, as views of one matrix [_TILE_ROWS, width + _TILE_ROWS] that grows when needed.

    Entry (i, x) is 0 where key x - width (relative to the tile's first row) is visible to row i, else -inf.
    """

    def __init__(self, window: int | None, dtype: torch.dtype, device: torch.device) -> None:
        self._window = window
        self._dtype = dtype
        self._device = device
        self._width = 0
        self._matrix: Tensor | None = None

    def mask(self, num_rows: int, num_keys_before: int) -> Tensor:
        """[num_rows, num_keys_before + num_rows]: the tile's rows against the keys before it and its own."""
        matrix = self._matrix
        if matrix is None or self._width < num_keys_before:
            self._width = width = max(_TILE_ROWS, 1 << (num_keys_before - 1).bit_length()) if num_keys_before else 0
            row = torch.arange(_TILE_ROWS, device=self._device).unsqueeze(1)
            key = torch.arange(-width, _TILE_ROWS, device=self._device).unsqueeze(0)
            hidden = key > row
            if self._window is not None:
                hidden |= key <= row - self._window
            zeros = torch.zeros(_TILE_ROWS, width + _TILE_ROWS, dtype=self._dtype, device=self._device)
            self._matrix = matrix = zeros.masked_fill_(hidden, float("-inf"))
        begin = self._width - num_keys_before
        return matrix[:num_rows, begin : self._width + num_rows]


class GatherAttention:
    """`AttentionBackend` on gathered pages and SDPA; float32, bfloat16 and float16."""

    def __init__(self) -> None:
        self._plans: dict[int | None, Plan] = {}
        self._staircases: dict[tuple[int | None, torch.dtype], Staircase] = {}
        self._slots: Tensor | None = None
        # By the rows of the bucket they belong to; those of the last step and those of this one.
        self._last_workspaces: dict[tuple[int, ...], DecodeWorkspace] = {}
        self._workspaces: dict[tuple[int, ...], DecodeWorkspace] = {}

    def prepare(self, batch: StepBatch) -> None:
        self._plans.clear()
        self._slots = None
        self._last_workspaces, self._workspaces = self._workspaces, {}

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
        if self._slots is None:
            self._slots = _cache_rows(batch.slot_mapping, kv_layer.shape[2])
        new = torch.cat((k, v)).to(kv_layer.dtype)
        cells = kv_layer.view(-1, *kv_layer.shape[3:])  # [num_pages * 2 * page_size, Hkv, D]
        cells.index_copy_(0, self._slots, new)
        return self._attend(q, new.view(2, *k.shape), kv_layer, batch, scale, sliding_window)

    def attend(
        self, q: Tensor, kv_layer: Tensor, batch: StepBatch, *, scale: float, sliding_window: int | None
    ) -> Tensor:
        return self._attend(q, None, kv_layer, batch, scale, sliding_window)

    def _attend(
        self,
        q: Tensor,
        new: Tensor | None,
        kv_layer: Tensor,
        batch: StepBatch,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """new: this step's keys and values, [2, T, Hkv, D], None if the caller has written them."""
        if window is not None and batch.max_context_len <= window:
            window = None
        plan = self._plans.get(window)
        if plan is None:
            plan = self._plans[window] = self._make_plan(batch, kv_layer, q.dtype, window, keeps_new=new is not None)
        num_kv_heads, head_dim = kv_layer.shape[3:]
        grouped = q.view(q.shape[0], num_kv_heads, -1, head_dim)  # [T, Hkv, G, D]
        if len(plan.decodes) == 1 and not plan.chunks:
            return _decode(plan.decodes[0], grouped, new, kv_layer, scale).view(q.shape)
        out = torch.empty(grouped.shape, dtype=q.dtype, device=q.device)
        for bucket in plan.decodes:
            rows = slice(batch.num_decodes) if bucket.rows is None else bucket.rows
            fresh = None if new is None else new[:, rows]
            out[rows] = _decode(bucket, grouped[rows], fresh, kv_layer, scale)
        for chunk in plan.chunks:
            _prefill(chunk, grouped, new, kv_layer, scale, out)
        return out.view(q.shape[0], -1, head_dim)

    # ------------------------------------------------------------------ plans

    def _make_plan(
        self, batch: StepBatch, kv_layer: Tensor, dtype: torch.dtype, window: int | None, *, keeps_new: bool
    ) -> Plan:
        """keeps_new: this step's keys and values come with the call, so that they need not be read from pages."""
        page_size = kv_layer.shape[2]
        chunks = []
        begin = batch.num_decodes
        for sequence in range(batch.num_decodes, batch.num_sequences):
            end = begin + batch.query_lens_host[sequence]
            chunks.append(self._plan_chunk(batch, sequence, begin, end, page_size, dtype, window, keeps_new))
            begin = end
        decodes: list[DecodeBucket] = []
        if batch.num_decodes:
            tables = batch.page_tables[: batch.num_decodes].cpu().numpy()
            for members in decode_buckets(_num_pages(batch, page_size, window)):
                rows = tables if len(members) == batch.num_decodes else tables[members]
                context_lens = [batch.context_lens_host[i] for i in members]
                workspace = None
                if keeps_new and window is None:
                    workspace = self._workspace(tuple(members), rows, context_lens, kv_layer, dtype)
                decodes.append(_plan_decodes(batch, members, rows, context_lens, page_size, dtype, window, workspace))
        return Plan(tuple(decodes), tuple(chunks))

    def _workspace(
        self,
        members: tuple[int, ...],
        tables: npt.NDArray[np.int32],
        context_lens: list[int],
        kv_layer: Tensor,
        dtype: torch.dtype,
    ) -> DecodeWorkspace | None:
        """The last step's, if this step continues it, or a new one; None if that would take too much memory."""
        page_size, num_kv_heads = kv_layer.shape[2:4]
        # A copy: the batch's tables are overwritten by the next step's.
        tables = tables[:, : -(-max(context_lens) // page_size)].copy()
        workspace = self._last_workspaces.get(members)
        if workspace is None or not workspace.advance(tables, context_lens):
            workspace = DecodeWorkspace(
                tables,
                context_lens,
                page_size=page_size,
                num_kv_heads=num_kv_heads,
                dtype=dtype,
                device=kv_layer.device,
            )
        if not workspace.fits(kv_layer, sum(other.num_slots for other in self._workspaces.values())):
            return None
        self._workspaces[members] = workspace
        return workspace

    def _plan_chunk(
        self,
        batch: StepBatch,
        sequence: int,
        begin: int,
        end: int,
        page_size: int,
        dtype: torch.dtype,
        window: int | None,
        keeps_new: bool,
    ) -> PrefillChunk:
        context_len = batch.context_lens_host[sequence]
        num_rows = end - begin
        prefix_len = context_len - num_rows
        if prefix_len == 0 and keeps_new and (window is None or num_rows <= window):
            return PrefillChunk(begin, end, None, None)

        gathered = None
        first = 0
        if prefix_len or not keeps_new:
            first_page = 0 if window is None else max(0, prefix_len - window + 1) // page_size
            first = first_page * page_size
            pages = batch.page_tables[sequence, first_page : -(-context_len // page_size)].cpu().numpy()
            gathered = page_rows(pages, batch.page_tables.device)

        staircase = self._staircase(window, dtype, batch.page_tables.device)
        tiles = []
        for row in range(0, num_rows, _TILE_ROWS):
            last = min(row + _TILE_ROWS, num_rows)
            position = prefix_len + row
            lowest = 0 if window is None else max(0, position - window + 1)
            # A single row sees exactly the keys from the lowest one to its own.
            mask = None if last - row == 1 else staircase.mask(last - row, position - lowest)
            tiles.append(Tile(row, last, lowest - first, prefix_len + last - first, mask))
        return PrefillChunk(begin, end, gathered, tuple(tiles))

    def _staircase(self, window: int | None, dtype: torch.dtype, device: torch.device) -> Staircase:
        staircase = self._staircases.get((window, dtype))
        if staircase is None:
            staircase = self._staircases[window, dtype] = Staircase(window, dtype, device)
        return staircase


def _cache_rows(slot_mapping: Tensor, page_size: int) -> Tensor:
    """Where keys, then values, of these slots lie in a layer seen as [num_pages * 2 * page_size, …]: [2 * T] int64."""
    # A page holds its keys, then its values, so that everything after page 0 is shifted by whole pages.
    keys = slot_mapping + slot_mapping.div(page_size, rounding_mode="floor").mul_(page_size)
    return torch.cat((keys, keys + page_size))


def page_rows(pages: npt.NDArray[np.int32], device: torch.device) -> Tensor:
    """Where the keys, then the values, of pages [S, n] lie in a layer seen as [num_pages * 2, page_size, …].

    [2 * S * n] int64.
    """
    keys = pages.astype(np.int64).ravel() * 2
    return torch.from_numpy(np.concatenate((keys, keys + 1))).to(device)


def _lowest_position(context_len: int, window: int | None) -> int:
    """The first position that a decode at this context length sees."""
    return 0 if window is None else max(0, context_len - window)


def _num_pages(batch: StepBatch, page_size: int, window: int | None) -> list[int]:
    """Pages that each decode of the step needs."""
    return [
        -(-length // page_size) - _lowest_position(length, window) // page_size
        for length in batch.context_lens_host[: batch.num_decodes]
    ]


def _plan_decodes(
    batch: StepBatch,
    members: list[int],
    tables: npt.NDArray[np.int32],
    context_lens: list[int],
    page_size: int,
    dtype: torch.dtype,
    window: int | None,
    workspace: DecodeWorkspace | None,
) -> DecodeBucket:
    """The bucket of these decodes (rows of the step); tables: [S, …], their page tables."""
    device = batch.page_tables.device
    rows = None if len(members) == batch.num_decodes else torch.tensor(members, dtype=torch.int64, device=device)
    length = max(context_lens)
    if workspace is not None:
        return DecodeBucket(rows, len(members), tables, length, workspace.mask(length), workspace)
    end = np.array(context_lens)
    begin = np.zeros_like(end)
    if window is not None:
        lowest = np.maximum(end - window, 0)
        first_page = lowest // page_size
        begin, end = lowest - first_page * page_size, end - first_page * page_size
        length = int(end.max())
        columns = first_page[:, None] + np.arange(-(-length // page_size))
        tables = np.take_along_axis(tables, columns.clip(max=tables.shape[1] - 1), axis=1)  # too far right: masked
    mask = None
    if begin.any() or end.min() != length:
        key = np.arange(length)
        hidden = torch.from_numpy((key >= end[:, None]) | (key < begin[:, None])).to(device)
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)
        mask = mask[:, None, None]
    return DecodeBucket(rows, len(members), tables[:, : -(-length // page_size)], length, mask, None)


def _gather(kv_layer: Tensor, rows: Tensor, num_sequences: int) -> Tensor:
    """Keys and values of sequences, by their `page_rows`: [2, S, n * page_size, Hkv, D]."""
    page_size, num_kv_heads, head_dim = kv_layer.shape[2:]
    pages = kv_layer.view(-1, page_size * num_kv_heads * head_dim).index_select(0, rows)
    return pages.view(2, num_sequences, -1, num_kv_heads, head_dim)


def _decode(bucket: DecodeBucket, q: Tensor, new: Tensor | None, kv_layer: Tensor, scale: float) -> Tensor:
    """q: [S, Hkv, G, D] and new: [2, S, Hkv, D] of the bucket's rows; returns q's shape, contiguous."""
    workspace = bucket.workspace
    kept = None if workspace is None or new is None else workspace.append(kv_layer, new)
    if kept is None:
        kept = _gather(kv_layer, bucket.gathered(kv_layer.device), bucket.size).transpose(2, 3)
        if workspace is not None:
            kept = workspace.fill(kv_layer, kept)
    # [S, Hkv, G, D] against [S, Hkv, L, D]; in a workspace, [S * Hkv, 1, G, D] against [S * Hkv, 1, L, D], because
    # then the result lies in memory in the order of q's heads.
    keys, values = kept[:, :, :, : bucket.length].to(q.dtype).unbind(0)
    queries = q if workspace is None else q.reshape(-1, 1, *q.shape[2:])
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bucket.mask, scale=scale)
    return out.reshape(q.shape)


def _prefill(chunk: PrefillChunk, q: Tensor, new: Tensor | None, kv_layer: Tensor, scale: float, out: Tensor) -> None:
    """q, out: [T, Hkv, G, D] and new: [2, T, Hkv, D] of the whole step; writes the chunk's rows of `out`."""
    group = q.shape[2]
    queries = q[chunk.begin : chunk.end].permute(1, 2, 0, 3)  # [Hkv, G, n, D]
    result = out[chunk.begin : chunk.end].permute(1, 2, 0, 3)
    if chunk.page_rows is None:
        assert new is not None
        visible = new[:, chunk.begin : chunk.end]  # [2, n, Hkv, D]
    else:
        visible = _gather(kv_layer, chunk.page_rows, 1)[:, 0]  # [2, L, Hkv, D]
    # Query heads of a group see the same keys: a dimension of stride 0 instead of copies.
    keys, values = visible.to(q.dtype).transpose(1, 2).unsqueeze(2).expand(-1, -1, group, -1, -1).unbind(0)
    if chunk.tiles is None:
        result.copy_(F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale))
        return
    for tile in chunk.tiles:
        span = slice(tile.key_begin, tile.key_end)
        result[:, :, tile.begin : tile.end] = F.scaled_dot_product_attention(
            queries[:, :, tile.begin : tile.end],
            keys[:, :, span],
            values[:, :, span],
            attn_mask=tile.mask,
            scale=scale,
        )
