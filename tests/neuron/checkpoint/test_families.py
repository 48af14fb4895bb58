"""The table of families: which one a checkpoint is of, and the windows of its layers."""

from __future__ import annotations

from typing import Any

import pytest
from neuron.checkpoint.errors import CheckpointError, NotSupported
from neuron.checkpoint.families import FAMILIES, family_of, window_of_all_layers, windows_by_layer_type


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "qwen3"}, "qwen3"),
        ({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, "qwen2"),
        ({"model_type": "something", "text_config": {"model_type": "llama"}}, "llama"),
        ({"architectures": ["MistralForCausalLM"]}, "mistral"),
    ],
)
def test_a_family_is_found_by_type_or_architecture(config: dict[str, Any], expected: str) -> None:
    assert family_of(config) is FAMILIES[expected]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported"),
        ({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}, "does not generate text"),
    ],
)
def test_others_are_refused_with_what_is_served(config: dict[str, Any], message: str) -> None:
    with pytest.raises(NotSupported, match=message):
        family_of(config)


def test_windows_of_the_qwen_families() -> None:
    window = {"sliding_window": 16, "use_sliding_window": True}
    assert windows_by_layer_type({"sliding_window": 16}, 4) == (None,) * 4
    assert windows_by_layer_type(window | {"max_window_layers": 3}, 4) == (None, None, None, 16)
    kinds = ["full_attention", "sliding_attention"] * 2
    assert windows_by_layer_type(window | {"layer_types": kinds, "max_window_layers": 0}, 4) == (None, 16, None, 16)
    with pytest.raises(NotSupported, match="linear_attention"):
        windows_by_layer_type(window | {"layer_types": ["linear_attention", *kinds[1:]]}, 4)
    with pytest.raises(CheckpointError, match="names 4 layers, the model has 5"):
        windows_by_layer_type(window | {"layer_types": kinds}, 5)


def test_windows_of_mistral() -> None:
    assert window_of_all_layers({"sliding_window": 4096}, 2) == (4096, 4096)
    assert window_of_all_layers({"sliding_window": None}, 2) == (None, None)
    assert window_of_all_layers({}, 2) == (None, None)
