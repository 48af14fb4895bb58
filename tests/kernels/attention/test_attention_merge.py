"""Segments of long contexts, merged into one result."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.attention.harness import TOLERANCE, attend, build, check


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_decode_of_contexts_of_very_different_length(device: torch.device, dtype: torch.dtype) -> None:
    check(build(device, [(1, 1), (1, 700), (1, 16), (1, 130)], num_decodes=4, dtype=dtype))


def test_nearly_equal_keys(device: torch.device) -> None:
    check(build(device, [(1, 400), (33, 70)], num_decodes=1, correlated=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_scores_do_not_overflow(device: torch.device, dtype: torch.dtype) -> None:
    case = build(device, [(1, 200), (20, 60)], num_decodes=1, key_scale=1e4, dtype=dtype)
    actual = attend(case).cpu().double()
    # Scores of 1e4 and more make the softmax pick single values: compare where the choice is not a tie.
    torch.testing.assert_close(actual, case.expected(), rtol=0, atol=TOLERANCE[dtype] * 20)
