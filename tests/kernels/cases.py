"""Paged batches with known keys and values, and attention on them in float64 without pages."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from neuron.engine.attention.interface import StepBatch
from torch import Tensor


@dataclass
class AttentionCase:
    """A mixed step: `chunks` are (query_len, context_len), decodes (query_len 1) counted by `num_decodes` first.

    Every cell that no token owns, page 0 included, holds NaN; pages are a random permutation. `keys`/`values` hold
    each sequence's context; the cells of this step's query tokens are NaN until something writes them.
    """

    chunks: list[tuple[int, int]]
    num_decodes: int = 0
    num_kv_heads: int = 2
    group: int = 2
    head_dim: int = 64
    page_size: int = 16
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    key_scale: float = 1.0
    correlated: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        page_size, heads, dim = self.page_size, self.num_kv_heads, self.head_dim
        needed = [-(-context // page_size) for _, context in self.chunks]
        num_pages = sum(needed) + 4
        pages = torch.randperm(num_pages - 1, generator=generator) + 1
        self.kv = torch.full((num_pages, 2, page_size, heads, dim), float("nan"), dtype=self.dtype)
        tables = torch.zeros(len(self.chunks), max([*needed, 1]), dtype=torch.int32)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        new_keys, new_values, positions, slots = [], [], [], []
        taken = 0
        for row, (query_len, context_len) in enumerate(self.chunks):
            tables[row, : needed[row]] = pages[taken : taken + needed[row]]
            taken += needed[row]
            keys = normal(context_len, heads, dim)
            if self.correlated:  # nearly the same key everywhere: scores differ only in their last bits
                keys = normal(1, heads, dim) + 1e-3 * keys
            keys = (keys * self.key_scale).to(self.dtype)
            values = normal(context_len, heads, dim).to(self.dtype)
            self.keys.append(keys)
            self.values.append(values)
            position = torch.arange(context_len)
            slot = tables[row, position // page_size].long() * page_size + position % page_size
            cached = slot[: context_len - query_len]
            self.kv[cached // page_size, 0, cached % page_size] = keys[: context_len - query_len]
            self.kv[cached // page_size, 1, cached % page_size] = values[: context_len - query_len]
            # A padding sequence of a CUDA graph has one query token and no context: it writes nowhere.
            if context_len >= query_len:
                slots.append(slot[context_len - query_len :])
                positions.append(position[context_len - query_len :])
                new_keys.append(keys[context_len - query_len :])
                new_values.append(values[context_len - query_len :])
            else:
                slots.append(torch.full((query_len,), -1))
                positions.append(torch.zeros(query_len, dtype=torch.int64))
                new_keys.append(torch.zeros(query_len, heads, dim, dtype=self.dtype))
                new_values.append(torch.zeros(query_len, heads, dim, dtype=self.dtype))

        query_lens = [query_len for query_len, _ in self.chunks]
        context_lens = [context_len for _, context_len in self.chunks]
        total = sum(query_lens)
        start = torch.tensor([0, *torch.tensor(query_lens).cumsum(0).tolist()], dtype=torch.int32)
        self.q = normal(total, heads * self.group, dim).to(self.dtype).to(self.device)
        self.k = torch.cat(new_keys).to(self.device)
        self.v = torch.cat(new_values).to(self.device)
        self.kv = self.kv.to(self.device)
        self.scale = dim**-0.5
        self.batch = StepBatch(
            token_ids=torch.zeros(total, dtype=torch.int64, device=self.device),
            positions=torch.cat(positions).to(self.device),
            slot_mapping=torch.cat(slots).to(self.device),
            query_start=start.to(self.device),
            context_lens=torch.tensor(context_lens, dtype=torch.int32).to(self.device),
            page_tables=tables.to(self.device),
            logits_indices=start[1:].long().to(self.device) - 1,
            query_lens_host=query_lens,
            context_lens_host=context_lens,
            num_decodes=self.num_decodes,
            max_query_len=max(query_lens),
            max_context_len=max(context_lens),
        )

    def expected(
        self, *, window: int | None = None, soft_cap: float | None = None, sinks: Tensor | None = None
    ) -> Tensor:
        """[T, Hq, D] float64 on the CPU."""
        outputs = []
        q_all = self.q.cpu().double()
        begin = 0
        for (query_len, context_len), keys, values in zip(self.chunks, self.keys, self.values, strict=True):
            q = q_all[begin : begin + query_len]
            begin += query_len
            if context_len < query_len:
                outputs.append(torch.zeros_like(q))
                continue
            k = keys.double().repeat_interleave(self.group, dim=1)
            v = values.double().repeat_interleave(self.group, dim=1)
            score = torch.einsum("qhd,khd->hqk", q, k) * self.scale
            if soft_cap is not None:
                score = soft_cap * torch.tanh(score / soft_cap)
            position = torch.arange(context_len - query_len, context_len)[:, None]
            column = torch.arange(context_len)[None, :]
            visible = column <= position
            if window is not None:
                visible &= column > position - window
            score = score.masked_fill(~visible, float("-inf"))
            if sinks is not None:
                sink = sinks.cpu().double()[:, None, None].expand(-1, query_len, 1)
                score = torch.cat([score, sink], dim=2)
            weight = torch.softmax(score, dim=2)[:, :, :context_len]
            outputs.append(torch.einsum("hqk,khd->qhd", weight, v))
        return torch.cat(outputs)
