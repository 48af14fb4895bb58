"""Building a model: the family's class, imported by its path, without memory."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from neuron.checkpoint.config import read_config
from neuron.checkpoint.families import Family, family_of
from neuron.engine.attention.attention import SelfAttention
from neuron.engine.layers.embedding import VocabularyWeight
from neuron.engine.layers.linear import LinearLayer
from neuron.engine.layers.norm import RMSNorm
from neuron.engine.models.decoder import CausalLM
from neuron.engine.parallel.group import ParallelGroup


def class_of(family: Family) -> type[CausalLM]:
    """The class of a family, imported."""
    module, _, name = family.class_path.partition(":")
    found: type[CausalLM] = getattr(import_module(module), name)
    return found


def _set_dtype(model: CausalLM, dtype: torch.dtype) -> None:
    """Of every float parameter but those that a weight format keeps in its own."""
    for module in model.modules():
        kept: frozenset[str] = getattr(module, "kept_dtypes", frozenset())
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_floating_point() and name not in kept:
                setattr(module, name, nn.Parameter(parameter.to(dtype), requires_grad=False))


def build_model(
    hf_config: Mapping[str, Any],
    *,
    device: torch.device,
    dtype: torch.dtype,
    parallel: ParallelGroup | None = None,
    native: bool = False,
) -> CausalLM:
    """This rank's part of the model that a `config.json` describes, on the meta device: shapes without memory.

    `device` and `dtype` are where and as what `neuron.engine.weights.loader` will fill it; native: its products are
    those of the native CPU kernels. Raises `CheckpointError`: `NotSupported`, `UnsupportedSharding`, or a senseless
    config.
    """
    family = family_of(hf_config)
    config = read_config(hf_config, family)
    with init_empty_weights(include_buffers=False):
        model = class_of(family)(config, parallel or ParallelGroup.single())
    model.checkpoint_names = family.tensor_names
    _set_dtype(model, dtype)
    model.embed_tokens.out_dtype = dtype
    for module in model.modules():
        if isinstance(module, LinearLayer | VocabularyWeight):
            module.uses_native_kernels = native
        elif isinstance(module, RMSNorm | SelfAttention):
            module.uses_native_kernels = native and dtype == torch.float32
    model.rotary.uses_native_kernels = native and dtype == torch.float32
    model.device = device
    model.dtype = dtype
    return model
