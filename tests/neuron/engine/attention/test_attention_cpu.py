"""Gathered attention against attention written out, over pages in any order, for any mix of decodes and chunks."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from neuron.engine.attention.attention import make_attention_backend
from neuron.engine.attention.attention_cpu import GatherAttention, Staircase, decode_buckets
from neuron.engine.attention.interface import StepBatch
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
    ) -> None:
        self.dtype, self.tolerance = dtype, tolerance
        self.heads, self.kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.kv_layer = torch.full((num_pages, 2, PAGE, num_kv_heads, head_dim), 1e4, dtype=dtype)
        self.free = list(range(1, num_pages))
        random.Random(seed).shuffle(self.free)
        self.backend = GatherAttention()
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
            query_start=torch.zeros(len(work) + 1, dtype=torch.int32),
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


def test_decodes_go_on_for_longer_than_the_workspace_was_made_for() -> None:
    world = World()
    sequences = [world.sequence(length) for length in (3, 5, 1)]
    for _ in range(60):
        world.step([(sequence, 1) for sequence in sequences], num_decodes=3)


def test_the_batch_changes_while_it_decodes() -> None:
    """Sequences leave, join, change places and are replaced by others of the same length."""
    world = World()
    a, b, c, d = (world.sequence(length) for length in (6, 6, 9, 40))
    for members in ([a, b], [a, b], [b, a], [a], [a, b], [a, b, c], [a, c], [d, a, c], [d, a, c], [d, a], [c, d, a]):
        world.step([(sequence, 1) for sequence in members], num_decodes=len(members))


def test_a_sequence_that_inherits_pages_and_length_of_another_is_not_taken_for_it() -> None:
    """The same prompt again, right after the first request ended, on the very pages that it gave back."""
    world = World()
    first = world.sequence(6)
    world.step([(first, 1)], num_decodes=1)
    world.step([(first, 1)], num_decodes=1)
    pages = list(first.pages)
    second = Sequence(pages=pages[:2])
    world.step([(second, 8)])  # as a prefill of its own: one token more than a continuation would have had
    world.step([(second, 1)], num_decodes=1)


def test_a_step_that_is_repeated_after_a_failure_gives_the_same_result() -> None:
    world = World()
    sequences = [world.sequence(length) for length in (6, 11)]
    for _ in range(3):
        world.step([(sequence, 1) for sequence in sequences], num_decodes=2)
    for sequence in sequences:  # the engine forgets the step and plans it again, perhaps with other tokens
        sequence.keys.pop()
        sequence.values.pop()
    world.step([(sequence, 1) for sequence in sequences], num_decodes=2)


def test_a_windowed_layer_that_missed_a_step_of_its_workspace_is_gathered_anew() -> None:
    """A long prompt makes the window matter for one step: the windowed layer leaves the workspace and comes back."""
    world = World()
    full_layer, windowed_layer = world.kv_layer, world.kv_layer.clone()
    decoding = Sequence()
    backend = world.backend
    mirror = World()
    mirror.kv_layer, mirror.free, mirror.backend = windowed_layer, world.free, backend

    def step(work: list[tuple[Sequence, int]], num_decodes: int) -> None:
        # Both layers see the same step: the first through `world`, the second with the same sequences and a window.
        lengths = [len(sequence.keys) for sequence, _ in work]
        generator_state = world.generator.get_state()
        world.step(work, num_decodes=num_decodes)
        for (sequence, _), length in zip(work, lengths, strict=True):
            del sequence.keys[length:], sequence.values[length:]
        mirror.generator.set_state(generator_state)
        prepare, backend.prepare = backend.prepare, lambda batch: None  # type: ignore[method-assign]
        try:
            mirror.step(work, num_decodes=num_decodes, windows=(32,))
        finally:
            backend.prepare = prepare  # type: ignore[method-assign]

    assert full_layer is not windowed_layer
    step([(decoding, 8)], 0)
    step([(decoding, 1)], 1)
    step([(decoding, 1)], 1)
    step([(decoding, 1), (Sequence(), 50)], 1)
    step([(decoding, 1)], 1)
    step([(decoding, 1)], 1)


def test_a_workspace_that_would_double_the_cache_is_not_made() -> None:
    world = World(num_pages=12)
    sequences = [world.sequence(length) for length in (14, 14)]
    for _ in range(3):
        world.step([(sequence, 1) for sequence in sequences], num_decodes=2)
    assert not world.backend._workspaces


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


def test_the_cpu_gets_the_gathering_backend() -> None:
    assert isinstance(make_attention_backend(torch.device("cpu")), GatherAttention)
