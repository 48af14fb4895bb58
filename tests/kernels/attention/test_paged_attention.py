"""Paged attention against its definition in float64."""

from __future__ import annotations

import pytest
import torch
from neuron.engine.attention.attention_triton import TritonAttention

from tests.kernels.attention.harness import attend, build, check


@pytest.mark.parametrize("context_len", [1, 2, 15, 16, 17, 63, 64, 65, 128, 129, 300])
def test_decode_at_page_and_tile_borders(device: torch.device, context_len: int) -> None:
    check(build(device, [(1, context_len)], num_decodes=1))


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


def test_a_nan_of_one_sequence_stays_there(device: torch.device) -> None:
    case = build(device, [(1, 50), (1, 200), (30, 60)], num_decodes=2)
    page = int(case.batch.page_tables[1, 3])
    case.kv[page, 0, 5] = float("nan")
    actual = attend(case).cpu().double()
    expected = case.expected()
    assert torch.isnan(actual[1]).all()
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(actual[2:], expected[2:], rtol=0, atol=1e-5)


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
