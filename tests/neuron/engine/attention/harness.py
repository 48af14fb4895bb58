"""Sequences that decode over pages, and what they should get."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field

import torch
from neuron.engine.attention.attention_cpu import GatherAttention
from neuron.engine.attention.interface import AttentionBackend, StepBatch
from torch import Tensor

PAGE = 4
SCALE = 0.37


@dataclass
class Sequence:
    pages: list[int] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)  # [Hkv, D] per token: what the cache must hold
    values: list[Tensor] = field(default_factory=list)


class World:
    """One layer's pages, sequences in them, and the reference that keeps every key and value in a list."""

    def __init__(
        self,
        *,
        num_heads: int = 4,
        num_kv_heads: int = 2,
        head_dim: int = 8,
        num_pages: int = 400,
        dtype: torch.dtype = torch.float32,
        tolerance: float = 2e-5,
        seed: int = 0,
        backend: AttentionBackend | None = None,
    ) -> None:
        self.dtype, self.tolerance = dtype, tolerance
        self.heads, self.kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.kv_layer = torch.full((num_pages, 2, PAGE, num_kv_heads, head_dim), 1e4, dtype=dtype)
        self.free = list(range(1, num_pages))
        random.Random(seed).shuffle(self.free)
        self.backend = backend or GatherAttention()
        self.generator = torch.Generator().manual_seed(seed)

    def step(
        self,
        work: list[tuple[Sequence, int]],
        *,
        num_decodes: int = 0,
        windows: tuple[int | None, ...] = (None,),
        written: bool = False,
    ) -> None:
        """Append that many tokens to each sequence and check what attention returns, once per window."""
        num_tokens = sum(length for _, length in work)
        q = torch.randn(num_tokens, self.heads, self.head_dim, generator=self.generator)
        k = torch.randn(num_tokens, self.kv_heads, self.head_dim, generator=self.generator)
        v = torch.randn(num_tokens, self.kv_heads, self.head_dim, generator=self.generator)
        slots, context_lens, row = [], [], 0
        for sequence, length in work:
            for _ in range(length):
                position = len(sequence.keys)
                if position // PAGE == len(sequence.pages):
                    sequence.pages.append(self.free.pop())
                slots.append(sequence.pages[position // PAGE] * PAGE + position % PAGE)
                sequence.keys.append(k[row])
                sequence.values.append(v[row])
                row += 1
            context_lens.append(len(sequence.keys))
        width = max(len(sequence.pages) for sequence, _ in work)
        tables = torch.zeros(len(work), width, dtype=torch.int32)
        for index, (sequence, _) in enumerate(work):
            tables[index, : len(sequence.pages)] = torch.tensor(sequence.pages, dtype=torch.int32)
        query_lens = [length for _, length in work]
        batch = StepBatch(
            token_ids=torch.zeros(num_tokens, dtype=torch.int64),
            positions=torch.zeros(num_tokens, dtype=torch.int64),
            slot_mapping=torch.tensor(slots),
            query_start=torch.tensor([0, *itertools.accumulate(query_lens)], dtype=torch.int32),
            context_lens=torch.tensor(context_lens, dtype=torch.int32),
            page_tables=tables,
            logits_indices=torch.zeros(0, dtype=torch.int64),
            query_lens_host=query_lens,
            context_lens_host=context_lens,
            num_decodes=num_decodes,
            max_query_len=max(query_lens),
            max_context_len=max(context_lens),
        )
        self.backend.prepare(batch)
        for window in windows:
            if written:
                for token, slot in enumerate(slots):
                    self.kv_layer[slot // PAGE, 0, slot % PAGE] = k[token]
                    self.kv_layer[slot // PAGE, 1, slot % PAGE] = v[token]
                out = self.backend.attend(q.to(self.dtype), self.kv_layer, batch, scale=SCALE, sliding_window=window)
            else:
                new = (x.to(self.dtype) for x in (q, k, v))
                out = self.backend.forward(*new, self.kv_layer, batch, scale=SCALE, sliding_window=window)
            assert out.dtype == self.dtype and out.shape == q.shape and out.is_contiguous()
            expected = self.reference(q, work, window)
            torch.testing.assert_close(out.float(), expected, atol=self.tolerance, rtol=5 * self.tolerance)

    def reference(self, q: Tensor, work: list[tuple[Sequence, int]], window: int | None) -> Tensor:
        out, row = torch.empty_like(q), 0
        group = self.heads // self.kv_heads
        for sequence, length in work:
            keys, values = torch.stack(sequence.keys), torch.stack(sequence.values)
            for position in range(len(sequence.keys) - length, len(sequence.keys)):
                first = 0 if window is None else max(0, position - window + 1)
                for head in range(self.heads):
                    visible = slice(first, position + 1)
                    scores = keys[visible, head // group] @ q[row, head] * SCALE
                    out[row, head] = scores.softmax(0) @ values[visible, head // group]
                row += 1
        return out

    def sequence(self, length: int) -> Sequence:
        sequence = Sequence()
        if length:
            self.step([(sequence, length)])
        return sequence
