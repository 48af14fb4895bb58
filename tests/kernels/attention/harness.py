"""Attention of a case by the kernels, and how exact it has to be."""

from __future__ import annotations

from typing import Any

import torch
from neuron.engine.attention.attention_plugins import PromptChunks
from neuron.engine.attention.attention_triton import TritonAttention
from torch import Tensor

from tests.kernels.cases import AttentionCase

# Rounding of the output dtype, plus that of the softmax weights, which are rounded to it before they meet V.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def attend(case: AttentionCase, window: int | None = None) -> Tensor:
    backend = TritonAttention()
    backend.prepare(case.batch)
    return backend.forward(case.q, case.k, case.v, case.kv, case.batch, scale=case.scale, sliding_window=window)


def check(case: AttentionCase, window: int | None = None) -> None:
    actual = attend(case, window).cpu().double()
    expected = case.expected(window=window)
    assert torch.isfinite(actual).all()
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE[case.dtype] * (1 + expected.abs().max().item()))


def build(device: torch.device, chunks: list[tuple[int, int]], **options: Any) -> AttentionCase:
    return AttentionCase(chunks, device=device, **options)


class PlainTorch:
    """A plug-in of a few lines, as a library would be: it sees chunks only, counted from 0."""

    name = "plain torch"

    def __init__(self, *, factor: float = 1.0, fault: Exception | None = None) -> None:
        self.factor = factor
        self.fault = fault
        self.steps = 0
        self.calls = 0

    def prepare(self) -> None:
        self.steps += 1

    def attend(
        self, q: Tensor, kv_layer: Tensor, given: PromptChunks, *, scale: float, sliding_window: int | None
    ) -> Tensor:
        self.calls += 1
        if self.fault is not None:
            raise self.fault
        group = q.shape[1] // kv_layer.shape[3]
        out = torch.empty_like(q)
        assert given.query_start[0] == 0
        assert max(given.query_start.diff().tolist()) == given.max_query_len
        assert int(given.query_start[-1]) == q.shape[0]
        assert max(given.context_lens.tolist()) == given.max_context_len
        for row, (begin, end) in enumerate(zip(given.query_start[:-1], given.query_start[1:], strict=True)):
            length = int(given.context_lens[row])
            pages = kv_layer[given.page_tables[row].long()]
            keys, values = (pages[:, half].flatten(0, 1)[:length].repeat_interleave(group, 1) for half in (0, 1))
            score = torch.einsum("qhd,khd->hqk", q[begin:end], keys) * scale
            position = torch.arange(length - int(end - begin), length)[:, None]
            hidden = torch.arange(length)[None] > position
            if sliding_window is not None:
                hidden |= torch.arange(length)[None] <= position - sliding_window
            out[begin:end] = torch.einsum("hqk,khd->qhd", score.masked_fill(hidden, float("-inf")).softmax(-1), values)
        return out * self.factor
