# ruff: noqa: E402
"""The native kernels' attention against attention written out, for any mix of decodes and chunks over pages."""

from __future__ import annotations

from tests.native import import_or_skip

import_or_skip()

from collections.abc import Iterator

import neuron_cpu
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from neuron.engine.attention.attention_native import NativeAttention

from tests.neuron.engine.attention.harness import World


@pytest.fixture(scope="module", autouse=True)
def two_threads() -> Iterator[None]:
    before = neuron_cpu.num_threads()
    neuron_cpu.set_num_threads(2)
    yield
    neuron_cpu.set_num_threads(before)


@settings(max_examples=25, deadline=None)
@given(
    decode_lens=st.lists(st.integers(0, 90), max_size=6),
    chunks=st.lists(st.tuples(st.integers(0, 70), st.integers(1, 40)), max_size=3),
    window=st.sampled_from([None, 1, 3, 4, 8, 21, 33]),
    heads=st.sampled_from([(4, 2), (4, 4), (6, 1), (9, 3)]),
    head_dim=st.sampled_from([8, 32, 40, 64]),
    num_steps=st.integers(1, 3),
    written=st.booleans(),
)
def test_any_mix_of_decodes_and_chunks(
    decode_lens: list[int],
    chunks: list[tuple[int, int]],
    window: int | None,
    heads: tuple[int, int],
    head_dim: int,
    num_steps: int,
    written: bool,
) -> None:
    if not decode_lens and not chunks:
        return
    world = World(num_heads=heads[0], num_kv_heads=heads[1], head_dim=head_dim, backend=NativeAttention())
    decodes = [world.sequence(length) for length in decode_lens]
    prefills = [(world.sequence(prefix), length) for prefix, length in chunks]
    for _ in range(num_steps):
        work = [(sequence, 1) for sequence in decodes] + prefills
        world.step(work, num_decodes=len(decodes), windows=(window, None), written=written)


@pytest.mark.parametrize("window", [None, 100, 300])
def test_chunks_longer_than_a_task_and_long_contexts(window: int | None) -> None:
    world = World(num_heads=2, num_kv_heads=1, head_dim=32, backend=NativeAttention())
    sequence = world.sequence(0)
    for length in (270, 300, 1, 200, 1):
        world.step([(sequence, length)], num_decodes=int(length == 1), windows=(window,))


def test_large_scores_neither_overflow_nor_hide_what_is_no_number() -> None:
    world = World(num_heads=2, num_kv_heads=1, head_dim=8, backend=NativeAttention(), tolerance=1e-4)
    sequence = world.sequence(40)
    # The first keys win by far, then a later one: the running maximum moves by hundreds.
    world.kv_layer[:, 0] = world.kv_layer[:, 0].clamp(-10, 10) * 30
    sequence.keys = [key.clamp(-10, 10) * 30 for key in sequence.keys]
    world.step([(sequence, 1)], num_decodes=1)
    world.kv_layer[sequence.pages[1], 0, 2, 0, 3] = torch.nan
    sequence.keys[6] = sequence.keys[6].clone()
    sequence.keys[6][0, 3] = torch.nan
    with pytest.raises(AssertionError, match="nan"):
        world.step([(sequence, 1)], num_decodes=1)
