"""Model families: the one table of what is served, by `model_type`. A family is an entry here and a class.

The daemon reads the entry and never imports the class; the engine imports it by its path.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from neuron.checkpoint.errors import CheckpointError, NotSupported
from neuron.checkpoint.hyperparameters import FILE, language_model
from neuron.checkpoint.tensor_names import LLAMA_NAMES

_MODELS = "neuron.engine.models"

# Heads that turn hidden states into the next token; a checkpoint of another kind (classifier, reward model) has none.
_GENERATIVE = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")

Windows = Callable[[Mapping[str, Any], int], tuple[int | None, ...]]


def full_attention(values: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    """Every layer sees all positions, whatever the config says."""
    return (None,) * num_layers


def windows_by_layer_type(values: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    """The Qwen families: `layer_types`, or every layer from `max_window_layers` on.

    Nothing slides unless `use_sliding_window` is set. values: of a language model, passed by `check_values`. Raises
    `CheckpointError`, `NotSupported`.
    """
    width = values.get("sliding_window")
    if not values.get("use_sliding_window", False) or width is None:
        return (None,) * num_layers
    layer_types = values.get("layer_types")
    if layer_types is None:
        first = values.get("max_window_layers")
        first = num_layers if first is None else first
        return tuple(width if layer >= first else None for layer in range(num_layers))
    if len(layer_types) != num_layers:
        raise CheckpointError(
            f"{FILE}: layer_types names {len(layer_types)} layers, the model has {num_layers}", file=FILE
        )
    unknown = sorted(set(layer_types) - {"sliding_attention", "full_attention"})
    if unknown:
        raise NotSupported(f"{FILE}: attention of the type {', '.join(unknown)[:200]} is not supported", file=FILE)
    return tuple(width if kind == "sliding_attention" else None for kind in layer_types)


def window_of_all_layers(values: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    """The Mistral family: one `sliding_window` for every layer, or null."""
    return (values.get("sliding_window"),) * num_layers


@dataclass(frozen=True, slots=True)
class Family:
    """What is known of a family without importing it.

    class_path: `module:Class` of its `CausalLM`; checkpoints may name it in `architectures`. default_head_dim: elements
    of a head where a config does not say, None where the heads share the hidden size. windows: of a language model's
    config and its number of layers, the sliding window of each layer. tensor_names: the modules of its checkpoints and
    ours (`tensor_names`). modalities: what its prompts may hold.
    """

    class_path: str
    default_head_dim: int | None = None
    windows: Windows = full_attention
    tensor_names: Mapping[str, str] = field(default_factory=lambda: LLAMA_NAMES)
    modalities: tuple[str, ...] = ("text",)

    @property
    def class_name(self) -> str:
        return self.class_path.rpartition(":")[2]


FAMILIES: dict[str, Family] = {
    "llama": Family(f"{_MODELS}.llama:LlamaForCausalLM"),
    "mistral": Family(f"{_MODELS}.mistral:MistralForCausalLM", windows=window_of_all_layers),
    "qwen2": Family(f"{_MODELS}.qwen2:Qwen2ForCausalLM", windows=windows_by_layer_type),
    "qwen3": Family(
        f"{_MODELS}.qwen3:Qwen3ForCausalLM",
        default_head_dim=128,
        windows=windows_by_layer_type,
        tensor_names={
            **LLAMA_NAMES,
            "model.layers.{}.self_attn.q_norm": "layers.{}.attention.qk_norm:q",
            "model.layers.{}.self_attn.k_norm": "layers.{}.attention.qk_norm:k",
        },
    ),
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a checkpoint, by `model_type` (its own or its language model's), else by `architectures`.

    config: a `config.json` that `check_values` has passed. Raises `NotSupported`, which names the model type and what
    is supported.
    """
    architectures = [str(name) for name in config.get("architectures") or ()]
    own = config.get("model_type")
    family = next(
        (FAMILIES[name] for name in (own, language_model(config).get("model_type")) if name in FAMILIES), None
    )
    if family is None:
        family = next((known for known in FAMILIES.values() if known.class_name in architectures), None)
    generates = not architectures or any(name.endswith(_GENERATIVE) for name in architectures)
    if family is not None and generates:
        return family
    named = f"model_type {own!r}" if own else f"architectures {architectures}"
    why = f"{named} is not supported"
    if not generates:
        why = f"{', '.join(architectures)} (model_type {own!r}) does not generate text"
    raise NotSupported(
        f"{FILE}: {why}; supported are causal language models of the types {', '.join(sorted(FAMILIES))}",
        file=FILE,
        facts={"model_type": own, "architectures": architectures, "supported": sorted(FAMILIES)},
    )
