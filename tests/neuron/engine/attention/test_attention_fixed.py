"""Attention whose result for a token depends on its sequence alone."""

from __future__ import annotations

import pytest
import torch
from neuron.engine.attention.attention_fixed import FixedRunAttention
from neuron.engine.attention.interface import StepBatch
from torch import Tensor

from tests.neuron.engine.attention.harness import PAGE, SCALE, World


@pytest.mark.parametrize("window", [None, 1, 5, 16, 21])
def test_it_is_attention_whatever_the_window_and_however_long(window: int | None) -> None:
    made = World()
    made.backend = FixedRunAttention()  # type: ignore[assignment]
    short, long, new = made.sequence(3), made.sequence(40), made.sequence(0)
    for written in (False, True):
        made.step([(short, 1), (long, 1), (new, 20)], num_decodes=2, windows=(window,), written=written)


LENGTH = 37
Q, K, V = (torch.randn(LENGTH, heads, 8, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 3))
V = V[:, :2].contiguous()


def batch_of(rows: list[tuple[list[int], int, int]]) -> StepBatch:
    """rows: pages of a sequence, and the first and the end of the positions that this step has of it."""
    slots = [pages[at // PAGE] * PAGE + at % PAGE for pages, first, end in rows for at in range(first, end)]
    lens, context = [end - first for _, first, end in rows], [end for _, _, end in rows]
    tables = torch.zeros(len(rows), max(len(pages) for pages, _, _ in rows), dtype=torch.int32)
    for index, (pages, _, _) in enumerate(rows):
        tables[index, : len(pages)] = torch.tensor(pages)
    empty = torch.zeros(0, dtype=torch.int64)
    return StepBatch(
        *(empty, empty, torch.tensor(slots), empty, torch.tensor(context), tables, empty),
        query_lens_host=lens,
        context_lens_host=context,
        num_decodes=0,
        max_query_len=max(lens),
        max_context_len=max(context),
    )


def attended(cuts: tuple[int, ...], *, neighbour_first: bool | None = None, window: int | None = None) -> Tensor:
    """The results of one sequence that comes in chunks, with a neighbour of 5 tokens in every step or without."""
    backend, layer = FixedRunAttention(), torch.full((40, 2, PAGE, 2, 8), 1e4)
    ours, others = list(range(20, 30)), [3, 7]
    results, begin = [], 0
    for length in cuts:
        rows, end = [(ours, begin, begin + length)], begin + length
        q, k, v = Q[begin:end], K[begin:end], V[begin:end]
        at = 0
        if neighbour_first is not None:
            at = 5 if neighbour_first else 0
            rows.insert(0 if neighbour_first else 1, (others, 0, 5))
            parts = ((q, Q), (k, K), (v, V))
            q, k, v = (torch.cat((n[9:14], x) if neighbour_first else (x, n[9:14])) for x, n in parts)
        out = backend.forward(q, k, v, layer, batch_of(rows), scale=SCALE, sliding_window=window)
        results.append(out[at : at + length])
        begin = end
    return torch.cat(results)


CUTS = [(1,) * LENGTH, (16, 16, 5), (15, 2, 20), (3, 30, 4)]


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("window", [None, 9, 20])
def test_a_token_gets_the_same_bits_however_its_prompt_is_cut(cuts: tuple[int, ...], window: int | None) -> None:
    assert torch.equal(attended(cuts, window=window), attended((LENGTH,), window=window))


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("neighbour_first", [True, False])
def test_a_token_gets_the_same_bits_beside_a_neighbour(cuts: tuple[int, ...], neighbour_first: bool) -> None:
    assert torch.equal(attended(cuts, neighbour_first=neighbour_first), attended((LENGTH,)))
