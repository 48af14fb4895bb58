"""Which family serves a checkpoint, and building it without memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights

from neuron.engine.models.decoder import CausalLM
from neuron.engine.models.errors import UnsupportedArchitecture
from neuron.engine.models.llama import LlamaForCausalLM
from neuron.engine.models.mistral import MistralForCausalLM
from neuron.engine.models.qwen2 import Qwen2ForCausalLM
from neuron.engine.models.qwen3 import Qwen3ForCausalLM
from neuron.engine.parallel.group import ParallelGroup

# model_type of config.json -> family.
FAMILIES: Mapping[str, type[CausalLM]] = {
    "llama": LlamaForCausalLM,
    "mistral": MistralForCausalLM,
    "qwen2": Qwen2ForCausalLM,
    "qwen3": Qwen3ForCausalLM,
}

# Heads that turn hidden states into the next token; a checkpoint of another kind (classifier, reward model) has none.
_GENERATIVE = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")


def family_of(hf_config: Mapping[str, Any]) -> type[CausalLM]:
    """The family of a checkpoint, by `model_type` (its own or its `text_config`'s), else by `architectures`.

    Raises `UnsupportedArchitecture`, which names the model_type and what is supported.
    """
    listed = hf_config.get("architectures")
    architectures = [str(name) for name in listed] if isinstance(listed, list) else []
    nested = hf_config.get("text_config")
    model_types = [str(hf_config.get("model_type") or "")]
    if isinstance(nested, Mapping):
        model_types.append(str(nested.get("model_type") or ""))
    family = next((FAMILIES[name] for name in model_types if name in FAMILIES), None)
    if family is None:
        family = next((known for known in FAMILIES.values() if known.__name__ in architectures), None)
    supported = ", ".join(sorted(FAMILIES))
    if family is None:
        named = f"model_type {model_types[0]!r}" if model_types[0] else f"architectures {architectures}"
        raise UnsupportedArchitecture(f"{named} is not supported; supported model types: {supported}")
    if architectures and not any(name.endswith(_GENERATIVE) for name in architectures):
        raise UnsupportedArchitecture(
            f"{', '.join(architectures)} (model_type {model_types[0]!r}) does not generate text; "
            f"causal language models of these types are supported: {supported}"
        )
    return family


def build_model(
    hf_config: Mapping[str, Any],
    *,
    device: torch.device,
    dtype: torch.dtype,
    parallel: ParallelGroup | None = None,
) -> CausalLM:
    """This rank's part of the model that a `config.json` describes, on the meta device: shapes without memory.

    `device` and `dtype` are where and as what `neuron.engine.weights.loader` will fill it. Raises
    `UnsupportedArchitecture`, `BadCheckpoint` (senseless config) or `UnsupportedSharding`.
    """
    family = family_of(hf_config)
    config = family.read_config(hf_config)
    with init_empty_weights(include_buffers=False):
        model = family(config, parallel or ParallelGroup.single())
    model.to(dtype)
    model.device = device
    model.dtype = dtype
    return model
