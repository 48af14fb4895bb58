"""Small models of each family, and kernels under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# One unit in the last place of values below 8.
ULP = {torch.float32: 4e-6, torch.float16: 2**-8, torch.bfloat16: 2**-5}

COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 199,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
}


FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "head_dim": 16, "sliding_window": 8, "tie_word_embeddings": False},
}


def fused_in_interpreter(module: str, name: str, device: torch.device) -> Callable[..., Any]:
    return getattr(import_module(f"neuron.engine.kernels.{module}"), name)


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=ULP[expected.dtype])
