"""Gathered attention against attention written out, over pages in any order, for any mix of decodes and chunks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from neuron.engine.attention.attention_cpu import Staircase, decode_buckets

from tests.neuron.engine.attention.harness import Sequence, World


@settings(max_examples=30, deadline=None)
@given(
    decode_lens=st.lists(st.integers(0, 90), max_size=6),
    chunks=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 30)), max_size=3),
    window=st.sampled_from([None, 1, 3, 4, 8, 21]),
    heads=st.sampled_from([(4, 2), (4, 4), (6, 1)]),
    num_steps=st.integers(1, 3),
    written=st.booleans(),
)
def test_any_mix_of_decodes_and_chunks(
    decode_lens: list[int],
    chunks: list[tuple[int, int]],
    window: int | None,
    heads: tuple[int, int],
    num_steps: int,
    written: bool,
) -> None:
    if not decode_lens and not chunks:
        return
    world = World(num_heads=heads[0], num_kv_heads=heads[1])
    decodes = [world.sequence(length) for length in decode_lens]
    prefills = [(world.sequence(prefix), length) for prefix, length in chunks]
    for _ in range(num_steps):
        work = [(sequence, 1) for sequence in decodes] + prefills
        world.step(work, num_decodes=len(decodes), windows=(window, None), written=written)


@pytest.mark.parametrize("window", [None, 100, 300])
def test_chunks_longer_than_a_tile(window: int | None) -> None:
    world = World(num_heads=2, num_kv_heads=1)
    sequence = world.sequence(0)
    for length in (270, 300, 1):
        world.step([(sequence, length)], windows=(window,))


@given(num_pages=st.lists(st.integers(1, 4000), min_size=1, max_size=40))
def test_buckets_hold_every_decode_once_and_padding_is_bounded(num_pages: list[int]) -> None:
    buckets = decode_buckets(num_pages)
    assert sorted(index for bucket in buckets for index in bucket) == list(range(len(num_pages)))
    padded = sum(max(num_pages[index] for index in bucket) * len(bucket) for bucket in buckets)
    assert padded <= 2 * sum(num_pages)


@pytest.mark.parametrize("window", [None, 5])
def test_staircase_masks_are_views_that_agree_with_their_definition(window: int | None) -> None:
    staircase = Staircase(window, torch.float32, torch.device("cpu"))
    for num_rows, before in ((3, 0), (256, 4), (7, 300), (2, 1)):
        if window is not None and before >= window:
            continue
        mask = staircase.mask(num_rows, before)
        assert mask.shape == (num_rows, before + num_rows)
        distance = torch.arange(num_rows).unsqueeze(1) + before - torch.arange(before + num_rows)
        visible = (distance >= 0) & (distance < (window or before + num_rows + 1))
        assert torch.equal(mask == 0, visible)
        assert torch.equal(mask == -torch.inf, ~visible)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 5e-3)])
def test_half_precision(dtype: torch.dtype, tolerance: float) -> None:
    world = World(dtype=dtype, tolerance=tolerance)
    sequence = Sequence()
    world.step([(sequence, 9)])
    world.step([(sequence, 1)], num_decodes=1)
    world.step([(sequence, 1)], num_decodes=1)
    world.step([(sequence, 6)])
