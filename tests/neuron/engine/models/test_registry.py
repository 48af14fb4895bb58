from __future__ import annotations

from typing import Any

import pytest
import torch
from neuron.checkpoint.errors import NotSupported
from neuron.checkpoint.families import FAMILIES, family_of
from neuron.engine.models.llama import LlamaForCausalLM
from neuron.engine.models.mistral import MistralForCausalLM
from neuron.engine.models.qwen2 import Qwen2ForCausalLM
from neuron.engine.models.qwen3 import Qwen3ForCausalLM
from neuron.engine.models.registry import build_model, class_of

from tests.neuron.engine.models.harness import CPU, TINY


@pytest.mark.parametrize(
    ("hf", "family"),
    [
        ({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}, Qwen3ForCausalLM),
        ({"model_type": "qwen2"}, Qwen2ForCausalLM),
        ({"model_type": "llama", "architectures": []}, LlamaForCausalLM),
        ({"model_type": "mistral", "architectures": None}, MistralForCausalLM),
        ({"architectures": ["LlamaForCausalLM"]}, LlamaForCausalLM),
        (
            {
                "model_type": "mistral3",
                "architectures": ["Mistral3ForConditionalGeneration"],
                "text_config": {"model_type": "mistral"},
            },
            MistralForCausalLM,
        ),
    ],
)
def test_the_family_of_a_checkpoint(hf: dict[str, Any], family: type) -> None:
    assert class_of(family_of(hf)) is family


def test_an_unknown_model_type_is_refused_with_the_list_of_known_ones() -> None:
    with pytest.raises(NotSupported) as caught:
        family_of({"model_type": "mamba", "architectures": ["MambaForCausalLM"]})
    assert "model_type 'mamba' is not supported" in caught.value.message
    for name in FAMILIES:
        assert name in caught.value.message
    with pytest.raises(NotSupported, match="OddForCausalLM"):
        family_of({"architectures": ["OddForCausalLM"]})


def test_a_checkpoint_without_a_language_model_head_is_refused() -> None:
    with pytest.raises(NotSupported, match=r"Qwen3ForSequenceClassification.*does not generate text"):
        family_of({"model_type": "qwen3", "architectures": ["Qwen3ForSequenceClassification"]})


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_a_model_is_built_without_memory_in_its_dtype(model_type: str) -> None:
    model = build_model(TINY | {"model_type": model_type}, device=CPU, dtype=torch.bfloat16)
    parameters = list(model.parameters())
    assert parameters
    assert all(parameter.is_meta and parameter.dtype == torch.bfloat16 for parameter in parameters)
    assert not any(parameter.requires_grad for parameter in parameters)
    assert (model.device, model.dtype) == (CPU, torch.bfloat16)
