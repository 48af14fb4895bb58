from __future__ import annotations

from typing import Any

import pytest
import torch
from neuron.checkpoint.errors import NotSupported, UnsupportedSharding
from neuron.checkpoint.families import FAMILIES, family_of
from neuron.engine.models.llama import LlamaForCausalLM
from neuron.engine.models.mistral import MistralForCausalLM
from neuron.engine.models.qwen2 import Qwen2ForCausalLM
from neuron.engine.models.qwen3 import Qwen3ForCausalLM
from neuron.engine.models.registry import build_model, class_of
from neuron.engine.parallel.group import ParallelGroup
from neuron.engine.weight_slices import Loadable

CPU = torch.device("cpu")
TINY: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


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


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_name_map_fills_every_parameter_exactly_once(model_type: str, tied: bool, world_size: int) -> None:
    """On every rank, counted element by element."""
    hf = TINY | {"model_type": model_type, "tie_word_embeddings": tied, "attention_bias": True, "mlp_bias": True}
    for rank in range(world_size):
        model = build_model(hf, device=CPU, dtype=torch.float32, parallel=ParallelGroup(rank, world_size))
        counts = {name: torch.zeros(parameter.shape) for name, parameter in model.named_parameters()}
        paths = {id(module): path for path, module in model.named_modules()}
        for _, module, part in model.checkpoint_modules():
            assert isinstance(module, Loadable)
            for weight_slice in module.weight_slices(part):
                if all(span.stop > span.start for span in weight_slice.source):
                    counts[f"{paths[id(module)]}.{weight_slice.parameter}"][weight_slice.target] += 1
        for name, count in counts.items():
            padding = getattr(model.get_submodule(name.rpartition(".")[0]), "padding_elements", 0)
            assert count.sum() == count.numel() - padding, name
            assert count.max() == 1, name


def test_sizes_of_a_rank() -> None:
    hf = TINY | {"model_type": "qwen3", "head_dim": 8}
    model = build_model(hf, device=CPU, dtype=torch.float32, parallel=ParallelGroup(3, 4))
    assert (model.config.num_heads, model.config.num_kv_heads) == (4, 2)
    assert (model.local.num_heads, model.local.num_kv_heads, model.local.intermediate_size) == (1, 1, 6)
    with pytest.raises(UnsupportedSharding, match="attention heads"):
        build_model(hf, device=CPU, dtype=torch.float32, parallel=ParallelGroup(0, 3))
