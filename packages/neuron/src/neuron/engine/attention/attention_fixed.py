"""Paged attention in plain torch whose result for a token depends on its sequence alone: the deterministic CPU backend.

A sequence is divided into runs of 16 positions. The queries of a run are one small attention problem: always 16 rows
against the keys from the run's first visible page to its end, however many of the rows and keys this step has. What it
lacks is zero, and what a row must not see is masked, which adds exact zeros. So a token meets the same operands in the
same shape as a decode, in a chunk that begins or ends anywhere, and beside any neighbours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from neuron.engine.attention.attention_cpu import Staircase, page_rows

if TYPE_CHECKING:
    from neuron.engine.attention.interface import StepBatch

_RUN = 16


class FixedRunAttention:
    """`AttentionBackend` by runs of 16 positions; slower than `GatherAttention`, with the same bits in any batch."""

    def __init__(self) -> None:
        self._staircases: dict[tuple[int | None, torch.dtype], Staircase] = {}

    def prepare(self, batch: StepBatch) -> None:
        pass

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
        page_size = kv_layer.shape[2]
        page, offset = batch.slot_mapping // page_size, batch.slot_mapping % page_size
        kv_layer[page, 0, offset] = k.to(kv_layer.dtype)
        kv_layer[page, 1, offset] = v.to(kv_layer.dtype)
        return self.attend(q, kv_layer, batch, scale=scale, sliding_window=sliding_window)

    def attend(
        self, q: Tensor, kv_layer: Tensor, batch: StepBatch, *, scale: float, sliding_window: int | None
    ) -> Tensor:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        begin = 0
        for sequence, query_len in enumerate(batch.query_lens_host):
            rows = slice(begin, begin + query_len)
            first = batch.context_lens_host[sequence] - query_len
            out[rows] = self._attend_sequence(
                q[rows], kv_layer, batch.page_tables[sequence], first, scale, sliding_window
            )
            begin += query_len
        return out

    def _attend_sequence(
        self, q: Tensor, kv_layer: Tensor, pages: Tensor, first: int, scale: float, window: int | None
    ) -> Tensor:
        """q: [n, Hq, D] of the positions from `first` on. Returns [n, Hq, D]."""
        num_queries, num_heads, head_dim = q.shape
        page_size, num_kv_heads = kv_layer.shape[2:4]
        end = first + num_queries
        lowest = 0 if window is None else max(0, first - window + 1)
        first_page = lowest // page_size
        num_pages = -(-end // page_size)
        held = pages[first_page:num_pages].cpu().numpy()[None]
        cells = kv_layer.view(-1, page_size * num_kv_heads * head_dim)
        gathered = cells.index_select(0, page_rows(held, kv_layer.device)).view(2, -1, num_kv_heads, head_dim)
        # Room from the first key that the first run could see up to the end of the last run, zero where nothing is.
        base = self._base(first // _RUN, window)
        keys_values = torch.zeros(
            2, -(-end // _RUN) * _RUN - base, num_kv_heads, head_dim, dtype=q.dtype, device=q.device
        )
        offset = first_page * page_size
        keys_values[:, lowest - base : end - base] = gathered[:, lowest - offset : end - offset].to(q.dtype)

        out = torch.empty_like(q)
        for run in range(first // _RUN, -(-end // _RUN)):
            start = run * _RUN
            low, high = max(first, start), min(end, start + _RUN)
            rows = torch.zeros(_RUN, num_heads, head_dim, dtype=q.dtype, device=q.device)
            rows[low - start : high - start] = q[low - first : high - first]
            begin = self._base(run, window)
            # A copy: the problem has the same strides and alignment wherever its sequence's keys were gathered from.
            visible = keys_values[:, begin - base : start + _RUN - base].transpose(1, 2).contiguous()
            keys, values = visible.unsqueeze(2).expand(-1, -1, num_heads // num_kv_heads, -1, -1).unbind(0)
            queries = rows.view(_RUN, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)  # [Hkv, G, run, D]
            mask = self._mask(start + _RUN - begin, window, q.dtype, q.device)
            attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
            result = attended.permute(2, 0, 1, 3).reshape(_RUN, num_heads, head_dim)
            out[low - first : high - first] = result[low - start : high - start]
        return out

    @staticmethod
    def _base(run: int, window: int | None) -> int:
        """The first key that a run's problem holds: of the run in which its first row's window begins."""
        return 0 if window is None else max(0, run * _RUN - window + 1) // _RUN * _RUN

    def _mask(self, num_keys: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
        """[run, num_keys], added to the scores; the run's rows are the last of the keys."""
        staircase = self._staircases.get((window, dtype))
        if staircase is None:
            staircase = self._staircases[window, dtype] = Staircase(window, dtype, device)
        return staircase.mask(_RUN, num_keys - _RUN).contiguous()
