"""The cache as tensors: what a page holds, and how many fit."""

from __future__ import annotations

import pytest
import torch
from neuron.engine.errors import ModelError
from neuron.engine.kv_cache.kv_cache import KVLayout, PagedKV
from neuron.protocol import CacheGroup

CPU = torch.device("cpu")
UNIFORM = KVLayout.uniform(3, 2, 8, 4, torch.bfloat16)
MIXED = KVLayout((CacheGroup((0, 2), 2, 8, 2), CacheGroup((1,), 4, 16, 2)), 4, torch.bfloat16)


def test_a_token_takes_keys_and_values_of_every_layer() -> None:
    assert UNIFORM.bytes_per_token == 3 * 2 * 2 * 8 * 2
    assert UNIFORM.bytes_per_page == 4 * UNIFORM.bytes_per_token
    assert MIXED.bytes_per_token == 2 * (2 * 2 * 8 * 2) + 2 * 4 * 16 * 2


def test_layers_keep_their_order_whatever_their_groups() -> None:
    assert [group.num_kv_heads for group in MIXED.layers] == [2, 4, 2]


@pytest.mark.parametrize(("num_tokens", "num_pages"), [(0, 1), (1, 2), (4, 2), (5, 3), (8, 3)])
def test_pages_for_tokens_are_rounded_up_and_page_0_is_nobodys(num_tokens: int, num_pages: int) -> None:
    assert UNIFORM.pages_for_tokens(num_tokens) == num_pages


def test_a_budget_without_one_usable_page_is_refused_with_the_numbers() -> None:
    two = 2 * UNIFORM.bytes_per_page
    assert UNIFORM.pages_for_bytes(two) == 2 and UNIFORM.pages_for_bytes(two + UNIFORM.bytes_per_page - 1) == 2
    with pytest.raises(ModelError) as caught:
        UNIFORM.pages_for_bytes(two - 1)
    assert caught.value.kind == "out_of_memory"
    assert str(two) in caught.value.message and str(two - 1) in caught.value.message


def test_pages_begin_as_zeros_in_one_run_of_memory() -> None:
    kv = PagedKV(MIXED, 5, CPU)
    for layer, (heads, dim) in enumerate([(2, 8), (4, 16), (2, 8)]):
        pages = kv.layer(layer)
        assert pages.shape == (5, 2, 4, heads, dim) and pages.is_contiguous() and pages.dtype == torch.bfloat16
        assert not pages.any()


def test_a_cache_without_a_usable_page_is_none() -> None:
    with pytest.raises(ValueError):
        PagedKV(UNIFORM, 1, CPU)
