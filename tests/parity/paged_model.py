"""Drives a model with hand-made step batches: sequences, their pages, and nothing of the engine's decisions."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
from neuron.engine.attention.attention import make_attention_backend
from neuron.engine.attention.interface import AttentionBackend, StepBatch, StepContext
from neuron.engine.kv_cache.kv_cache import KVLayout, PagedKV
from neuron.engine.models.decoder import CausalLM
from neuron.engine.models.registry import build_model
from neuron.engine.parallel.group import ParallelGroup
from neuron.engine.weights.loader import load_weights
from torch import Tensor

CPU = torch.device("cpu")


def load(
    path: Path,
    *,
    dtype: torch.dtype = torch.float32,
    parallel: ParallelGroup | None = None,
    native: bool = False,
) -> CausalLM:
    """The checkpoint's model, on the CPU. native: by the native kernels, else by their twins in torch."""
    config = json.loads((path / "config.json").read_text())
    model = build_model(config, device=CPU, dtype=dtype, parallel=parallel or ParallelGroup.single(), native=native)
    load_weights(model, path)
    return model


@dataclass
class PagedSequence:
    """Tokens whose K and V are in the cache, and where."""

    pages: list[int] = field(default_factory=list)
    num_cached: int = 0


class PagedModel:
    """A model over a small paged cache. Pages are handed out in random order and start full of large garbage."""

    def __init__(
        self,
        model: CausalLM,
        *,
        page_size: int = 4,
        num_pages: int = 512,
        seed: int = 0,
        attention: AttentionBackend | None = None,
    ) -> None:
        self.model = model
        self.page_size = page_size
        config = model.config
        layout = KVLayout.uniform(config.num_layers, model.local.num_kv_heads, config.head_dim, page_size, model.dtype)
        self.kv = PagedKV(layout, num_pages, CPU)
        for layer in range(config.num_layers):
            self.kv.layer(layer).fill_(1e4)
        self._free = list(range(1, num_pages))
        random.Random(seed).shuffle(self._free)
        self._attention = attention or make_attention_backend(CPU)

    def fork(self, sequence: PagedSequence, num_tokens: int) -> PagedSequence:
        """A sequence that shares the first `num_tokens` (whole pages) of another one's cache."""
        assert num_tokens % self.page_size == 0 and num_tokens <= sequence.num_cached
        return PagedSequence(sequence.pages[: num_tokens // self.page_size], num_tokens)

    @torch.inference_mode()
    def step(self, work: list[tuple[PagedSequence, list[int]]], *, num_decodes: int = 0) -> list[Tensor]:
        """One forward pass that appends tokens to sequences; logits [n, V] of each one's new tokens."""
        query_lens = [len(tokens) for _, tokens in work]
        context_lens, ids, positions, slots = [], [], [], []
        for sequence, tokens in work:
            length = sequence.num_cached + len(tokens)
            while len(sequence.pages) * self.page_size < length:
                sequence.pages.append(self._free.pop())
            for token, position in zip(tokens, range(sequence.num_cached, length), strict=True):
                ids.append(token)
                positions.append(position)
                page, offset = divmod(position, self.page_size)
                slots.append(sequence.pages[page] * self.page_size + offset)
            sequence.num_cached = length
            context_lens.append(length)
        width = max(-(-length // self.page_size) for length in context_lens)
        tables = torch.zeros(len(work), width, dtype=torch.int32)
        for row, (sequence, _) in enumerate(work):
            used = sequence.pages[:width]
            tables[row, : len(used)] = torch.tensor(used, dtype=torch.int32)
        batch = StepBatch(
            token_ids=torch.tensor(ids),
            positions=torch.tensor(positions),
            slot_mapping=torch.tensor(slots),
            query_start=torch.tensor([0, *torch.tensor(query_lens).cumsum(0).tolist()], dtype=torch.int32),
            context_lens=torch.tensor(context_lens, dtype=torch.int32),
            page_tables=tables,
            logits_indices=torch.arange(len(ids)),
            query_lens_host=query_lens,
            context_lens_host=context_lens,
            num_decodes=num_decodes,
            max_query_len=max(query_lens),
            max_context_len=max(context_lens),
        )
        self._attention.prepare(batch)
        hidden = self.model.forward(StepContext(batch, self.kv, self._attention))
        return list(self.model.compute_logits(hidden).split(query_lens))

    def prefill(self, tokens: list[int], *, chunk: int | None = None) -> tuple[PagedSequence, Tensor]:
        """A new sequence, computed in chunks; its logits [n, V]."""
        sequence = PagedSequence()
        size = chunk or len(tokens)
        parts = [self.step([(sequence, tokens[i : i + size])])[0] for i in range(0, len(tokens), size)]
        return sequence, torch.cat(parts)

    def greedy(self, prompts: list[list[int]], num_new: int) -> list[list[int]]:
        """Greedy continuations of several prompts, decoded together."""
        sequences = [PagedSequence() for _ in prompts]
        logits = self.step(list(zip(sequences, prompts, strict=True)))
        outputs = [[int(rows[-1].argmax())] for rows in logits]
        for _ in range(num_new - 1):
            work = [(sequence, [out[-1]]) for sequence, out in zip(sequences, outputs, strict=True)]
            for out, rows in zip(outputs, self.step(work, num_decodes=len(work)), strict=True):
                out.append(int(rows[-1].argmax()))
        return outputs
