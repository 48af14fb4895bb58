"""What the preflight says can be divided among ranks, the engine builds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cortex_core.errors import ApiError
from cortex_core.fleet import ModelSpec
from hypothesis import given, settings
from hypothesis import strategies as st
from neuron.checkpoint.errors import UnsupportedSharding
from neuron.checkpoint.preflight import check_config
from neuron.checkpoint.sharding import check_division
from neuron.engine.models.registry import build_model
from neuron.engine.parallel.group import ParallelGroup


def config_of(num_heads: int, num_kv_heads: int, intermediate_size: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 8,
        "head_dim": 4,
        "num_hidden_layers": 1,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "intermediate_size": intermediate_size,
    }


def can_be_built(config: dict[str, Any], shares: tuple[int, ...], world_size: int) -> bool:
    try:
        for rank in range(world_size):
            group = ParallelGroup(rank, world_size, shares=shares)
            build_model(config, device=torch.device("cpu"), dtype=torch.float32, parallel=group)
    except UnsupportedSharding:
        return False
    return True


@settings(max_examples=150, deadline=None)
@given(
    heads_per_kv=st.integers(1, 6),
    num_kv_heads=st.integers(1, 9),
    intermediate_size=st.integers(1, 48),
    world_size=st.integers(1, 6),
    is_even=st.booleans(),
)
def test_preflight_and_engine_agree(
    heads_per_kv: int, num_kv_heads: int, intermediate_size: int, world_size: int, is_even: bool
) -> None:
    config = config_of(heads_per_kv * num_kv_heads, num_kv_heads, intermediate_size)
    shares = () if is_even else tuple(range(1, world_size + 1))
    try:
        check_division(heads_per_kv * num_kv_heads, num_kv_heads, intermediate_size, world_size, shares)
    except UnsupportedSharding:
        assert not can_be_built(config, shares, world_size)
    else:
        assert can_be_built(config, shares, world_size)


def test_the_refusal_comes_with_the_numbers() -> None:
    spec = ModelSpec("org/model", tensor_parallel=3)
    with pytest.raises(ApiError) as caught:
        check_config(spec, config_of(8, 4, 12))
    assert (caught.value.status, caught.value.code) == (422, "unsupported_parallelism")
    assert "number of attention heads (8) does not divide by the tensor parallel size 3" in caught.value.message
    check_config(ModelSpec("org/model", tensor_parallel=2), config_of(8, 4, 12))
    check_config(ModelSpec("org/model", tensor_split=(3.0, 2.0, 2.0)), config_of(8, 4, 12))


def test_sizes_that_are_missing_are_for_the_inspection_to_name() -> None:
    check_config(ModelSpec("org/model", tensor_parallel=2), {"model_type": "llama", "num_attention_heads": 5})
    with pytest.raises(ApiError, match="number of attention heads"):
        check_config(ModelSpec("org/model", tensor_parallel=2), {"text_config": config_of(5, 5, 10)})
