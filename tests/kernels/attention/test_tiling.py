"""Tile shapes of the attention kernels: powers of two that hold the rows, on every chip."""

from __future__ import annotations

import pytest
import torch
from neuron.engine.kernels.attention.tiling import (
    Chip,
    Tiling,
    chip_of,
    decode_tiling,
    invariant_tiling,
    power_of_two,
    prefill_tiling,
)

CHIPS = {
    "small": Chip(num_multiprocessors=82, shared_memory=99 * 1024),
    "A100": Chip(num_multiprocessors=108, shared_memory=163 * 1024),
    "H200": Chip(num_multiprocessors=132, shared_memory=227 * 1024),
}
WAYS = {"decode": decode_tiling, "prefill": prefill_tiling, "invariant": invariant_tiling}
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize(("value", "power"), [(0, 1), (1, 1), (2, 2), (3, 4), (64, 64), (65, 128)])
def test_the_smallest_power_that_is_not_less(value: int, power: int) -> None:
    assert power_of_two(value) == power


def rows_fit(tiling: Tiling, group: int) -> bool:
    return tiling.block_q * group <= tiling.block_m and tiling.block_m >= 16


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("group", [1, 3, 8, 16])
def test_tiles_are_powers_of_two_and_hold_all_rows_of_their_tokens(
    chip: str, way: str, dtype: torch.dtype, head_dim: int, group: int
) -> None:
    tiling = WAYS[way](CHIPS[chip], head_dim=head_dim, group=group, dtype=dtype)
    for size in (tiling.block_m, tiling.block_n, tiling.max_segments, tiling.num_warps):
        assert size == power_of_two(size)
    assert rows_fit(tiling, group) and tiling.block_q >= 1
    assert tiling.num_stages == 1 or dtype != torch.float32 or way == "decode"


@pytest.mark.parametrize("chip", CHIPS)
def test_key_tiles_of_a_decode_fit_into_the_chip_however_deep_the_pipeline_is(chip: str) -> None:
    """Each level of the pipeline keeps a tile of keys and one of values for every two of its stages."""
    for head_dim in (64, 128, 256):
        for dtype in DTYPES:
            tiling = decode_tiling(CHIPS[chip], head_dim=head_dim, group=4, dtype=dtype)
            in_flight = (tiling.num_stages + 1) // 2 * 2 * tiling.block_n * head_dim * dtype.itemsize
            assert in_flight <= CHIPS[chip].shared_memory, tiling


def test_tokens_that_are_verified_together_have_rows_of_their_own() -> None:
    one = decode_tiling(CHIPS["H200"], head_dim=128, group=8, dtype=torch.bfloat16)
    five = decode_tiling(CHIPS["H200"], head_dim=128, group=8, dtype=torch.bfloat16, query_tokens=5)
    assert (one.block_q, one.block_m) == (1, 16) and (five.block_q, five.block_m) == (5, 64)


def test_an_invariant_context_is_never_cut() -> None:
    for chip in CHIPS.values():
        tiling = invariant_tiling(chip, head_dim=128, group=4, dtype=torch.bfloat16)
        assert tiling.max_segments == 1 and not tiling.skip_masks
    sizes = {
        (tiling.block_m, tiling.block_n)
        for tiling in (invariant_tiling(chip, head_dim=128, group=4, dtype=torch.bfloat16) for chip in CHIPS.values())
    }
    assert len(sizes) == 1, "nor is the order of additions another on another chip"


def test_without_a_device_there_are_a_few_programs() -> None:
    chip = chip_of(torch.device("cpu"))
    assert 1 < chip.num_multiprocessors < 10 and chip.shared_memory > 200 * 1024
