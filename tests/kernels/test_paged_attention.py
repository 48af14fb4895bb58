"""Paged attention against float64 attention without pages, on inputs meant to break it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from neuron.engine.attention.attention_triton import TritonAttention
from neuron.engine.kernels import KernelUnsupported
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


@pytest.mark.parametrize("context_len", [1, 2, 15, 16, 17, 63, 64, 65, 128, 129, 300])
def test_decode_at_page_and_tile_borders(device: torch.device, context_len: int) -> None:
    check(build(device, [(1, context_len)], num_decodes=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_decode_of_contexts_of_very_different_length(device: torch.device, dtype: torch.dtype) -> None:
    check(build(device, [(1, 1), (1, 700), (1, 16), (1, 130)], num_decodes=4, dtype=dtype))


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8])
def test_grouped_query_ratios(device: torch.device, group: int) -> None:
    check(build(device, [(1, 40), (1, 150), (9, 37)], num_decodes=2, group=group))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_sizes(device: torch.device, head_dim: int, dtype: torch.dtype) -> None:
    check(build(device, [(1, 33), (20, 50)], num_decodes=1, head_dim=head_dim, num_kv_heads=1, dtype=dtype))


@pytest.mark.parametrize("page_size", [8, 32, 64])
def test_page_sizes(device: torch.device, page_size: int) -> None:
    check(build(device, [(1, page_size), (1, 2 * page_size + 1), (9, 70)], num_decodes=2, page_size=page_size))


@pytest.mark.parametrize(
    "chunk",
    [(1, 1), (2, 2), (16, 16), (17, 17), (130, 130), (1, 90), (5, 90), (64, 200), (70, 133), (3, 1100)],
    ids=str,
)
def test_prefill_whole_chunked_and_behind_a_prefix(device: torch.device, chunk: tuple[int, int]) -> None:
    check(build(device, [chunk]))


def test_mixed_step_of_decodes_whole_prompts_and_chunks(device: torch.device) -> None:
    chunks = [(1, 70), (1, 1), (40, 40), (1, 33), (7, 600), (90, 140)]
    check(build(device, chunks, num_decodes=2, dtype=torch.bfloat16))


@pytest.mark.parametrize("window", [1, 2, 16, 17, 64, 100, 5000])
def test_sliding_window_edges(device: torch.device, window: int) -> None:
    check(build(device, [(1, 300), (1, 17), (1, 100), (90, 210)], num_decodes=3), window=window)


def test_cells_before_the_window_are_never_read(device: torch.device) -> None:
    """A cache may free pages that fell out of the window: their table entries point to page 0, which holds NaN."""
    window = 20
    case = build(device, [(1, 300), (40, 200)], num_decodes=1)
    expected = case.expected(window=window)
    case.batch.page_tables[0, : (300 - window) // 16] = 0
    case.batch.page_tables[1, : (160 - window + 1) // 16] = 0
    actual = attend(case, window).cpu().double()
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_nearly_equal_keys(device: torch.device) -> None:
    check(build(device, [(1, 400), (33, 70)], num_decodes=1, correlated=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_scores_do_not_overflow(device: torch.device, dtype: torch.dtype) -> None:
    case = build(device, [(1, 200), (20, 60)], num_decodes=1, key_scale=1e4, dtype=dtype)
    actual = attend(case).cpu().double()
    # Scores of 1e4 and more make the softmax pick single values: compare where the choice is not a tie.
    torch.testing.assert_close(actual, case.expected(), rtol=0, atol=TOLERANCE[dtype] * 20)


def test_padding_sequence_without_context_gives_zeros(device: torch.device) -> None:
    case = build(device, [(1, 20), (1, 0), (1, 0)], num_decodes=3)
    actual = attend(case)
    assert torch.equal(actual[1:], torch.zeros_like(actual[1:]))
    check(build(device, [(1, 20), (1, 0), (1, 0)], num_decodes=3))


def test_many_sequences_need_several_planner_chunks(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from neuron.engine.kernels.attention import attention_plan

    monkeypatch.setattr(attention_plan, "_PLAN_CHUNK", 16)
    chunks = [(1, 1 + 37 * index % 290) for index in range(37)]
    check(build(device, chunks, num_decodes=37, num_kv_heads=1, group=1, head_dim=64))


def test_a_nan_of_one_sequence_stays_there(device: torch.device) -> None:
    case = build(device, [(1, 50), (1, 200), (30, 60)], num_decodes=2)
    page = int(case.batch.page_tables[1, 3])
    case.kv[page, 0, 5] = float("nan")
    actual = attend(case).cpu().double()
    expected = case.expected()
    assert torch.isnan(actual[1]).all()
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(actual[2:], expected[2:], rtol=0, atol=1e-5)


def test_a_request_gets_the_same_bits_in_any_batch(device: torch.device) -> None:
    """Decodes and chunks: neighbours change the batch, the longest context and the launch, never the result."""
    alone = build(device, [(1, 500)], num_decodes=1, dtype=torch.bfloat16)
    crowd = build(device, [(1, 500), (1, 900), (1, 3)], num_decodes=3, dtype=torch.bfloat16)
    crowd.q[0], crowd.k[0], crowd.v[0] = alone.q[0], alone.k[0], alone.v[0]
    for page in range(32):
        crowd.kv[crowd.batch.page_tables[0, page]] = alone.kv[alone.batch.page_tables[0, page]]
    assert torch.equal(attend(alone)[0], attend(crowd)[0])

    alone = build(device, [(20, 600)], dtype=torch.bfloat16)
    crowd = build(device, [(20, 600), (150, 150)], dtype=torch.bfloat16)
    crowd.q[:20], crowd.k[:20], crowd.v[:20] = alone.q, alone.k, alone.v
    for page in range(38):
        crowd.kv[crowd.batch.page_tables[0, page]] = alone.kv[alone.batch.page_tables[0, page]]
    assert torch.equal(attend(alone), attend(crowd)[:20])


def test_plans_are_made_once_per_step_and_window(device: torch.device) -> None:
    case = build(device, [(1, 30), (20, 20)], num_decodes=1)
    backend = TritonAttention()
    backend.prepare(case.batch)

    def run(window: int | None) -> Tensor:
        return backend.forward(case.q, case.k, case.v, case.kv, case.batch, scale=case.scale, sliding_window=window)

    first = run(None)
    plans = dict(backend._plans)
    assert torch.equal(run(None), first)
    assert backend._plans == plans
    torch.testing.assert_close(run(8).cpu().double(), case.expected(window=8), rtol=0, atol=1e-5)
    assert len(backend._plans) == 2 * len(plans)
    backend.prepare(case.batch)
    assert not backend._plans


@pytest.mark.parametrize("split", [False, True])
def test_soft_cap_and_sinks(device: torch.device, split: bool) -> None:
    context = 700 if split else 60
    case = build(device, [(1, context), (10, context)], num_decodes=1, key_scale=3.0)
    sinks = torch.linspace(-2, 4, case.num_kv_heads * case.group, device=device)
    attend(case)  # writes K and V
    backend = TritonAttention()
    backend.prepare(case.batch)
    for options in ({"soft_cap": 5.0}, {"sinks": sinks}, {"soft_cap": 5.0, "sinks": sinks}):
        actual = backend.attend(case.q, case.kv, case.batch, scale=case.scale, sliding_window=None, **options)
        torch.testing.assert_close(actual.cpu().double(), case.expected(**options), rtol=0, atol=1e-5)


def test_query_rows_may_be_views_of_packed_qkv(device: torch.device) -> None:
    case = build(device, [(1, 70), (30, 45)], num_decodes=1)
    expected = case.expected()
    total, heads, dim = case.q.shape
    packed = torch.cat([case.q.flatten(1), case.k.flatten(1), case.v.flatten(1)], dim=1)
    q, k, v = packed.split([heads * dim, case.num_kv_heads * dim, case.num_kv_heads * dim], dim=1)
    case.q = q.view(total, heads, dim)
    case.k = k.view(total, case.num_kv_heads, dim)
    case.v = v.view(total, case.num_kv_heads, dim)
    torch.testing.assert_close(attend(case).cpu().double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("head_dim", [260, 512, 20])
def test_unsupported_head_sizes_are_refused_by_number(device: torch.device, head_dim: int) -> None:
    case = build(device, [(1, 3)], num_decodes=1, head_dim=head_dim)
    with pytest.raises(KernelUnsupported, match=str(head_dim)):
        attend(case)
