"""Random tiny checkpoints, written by transformers in Hugging Face format, and transformers' logits of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

VOCAB = 199


@dataclass(frozen=True)
class Variant:
    """One checkpoint: a family and what is particular about it."""

    name: str
    config_class: type[PreTrainedConfig]
    overrides: dict[str, Any]
    dtype: torch.dtype = torch.float32

    def config(self) -> PreTrainedConfig:
        sizes: dict[str, Any] = {
            "vocab_size": VOCAB,
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "initializer_range": 0.25,
            "bos_token_id": 0,
            "eos_token_id": None,
            "pad_token_id": None,
        }
        return self.config_class(**(sizes | self.overrides))


def _rope(rope_type: str, **values: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 5000.0, **values}}


LLAMA3_ROPE = _rope(
    "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
YARN_ROPE = _rope("yarn", factor=4.0, original_max_position_embeddings=32)
YARN_ROPE_EXPLICIT = _rope(
    "yarn", factor=2.0, original_max_position_embeddings=48, attention_factor=1.3, beta_fast=16.0, beta_slow=2.0
)

VARIANTS = [
    Variant("qwen3-tied", Qwen3Config, {"head_dim": 12, "tie_word_embeddings": True}),
    Variant("qwen3-wide-heads-mqa", Qwen3Config, {"head_dim": 32, "num_key_value_heads": 1}),
    Variant("qwen3-bias-yarn", Qwen3Config, {"head_dim": 16, "attention_bias": True, **YARN_ROPE}),
    Variant(
        "qwen3-window-by-layer-types",
        Qwen3Config,
        {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    Variant("qwen3-stored-in-bf16", Qwen3Config, {"head_dim": 16}, dtype=torch.bfloat16),
    Variant("qwen2-tied", Qwen2Config, {"tie_word_embeddings": True}),
    Variant("qwen2-mha-untied", Qwen2Config, {"num_key_value_heads": 4}),
    Variant(
        "qwen2-window-from-layer-1",
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    Variant("qwen2-yarn", Qwen2Config, YARN_ROPE_EXPLICIT),
    Variant("llama-mha", LlamaConfig, {"num_key_value_heads": None}),
    Variant("llama3-rope-gqa", LlamaConfig, LLAMA3_ROPE),
    Variant("llama-linear-rope-biases", LlamaConfig, _rope("linear", factor=3.0) | {"attention_bias": True}),
    Variant("llama-mlp-bias-tied", LlamaConfig, {"mlp_bias": True, "tie_word_embeddings": True}),
    Variant("llama-yarn-wide-heads", LlamaConfig, {"head_dim": 20, **YARN_ROPE}),
    Variant("llama-stored-in-fp16", LlamaConfig, {"rms_norm_eps": 1e-5}, dtype=torch.float16),
    Variant("mistral-window", MistralConfig, {"sliding_window": 9}),
    Variant("mistral-no-window", MistralConfig, {"sliding_window": None, "head_dim": 16}),
]


def save_checkpoint(variant: Variant, path: Path, **options: Any) -> Path:
    """Write the variant with random weights (norms and biases too) to `path`. options: of `save_pretrained`."""
    torch.manual_seed(sum(variant.name.encode()))
    model = AutoModelForCausalLM.from_config(variant.config())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
    model.to(variant.dtype).save_pretrained(path, **options)
    return path


class Oracle:
    """transformers on a checkpoint, in float32 unless told otherwise, with its plainest attention."""

    def __init__(self, path: Path, dtype: torch.dtype = torch.float32) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> Tensor:
        """[n, V] of one sequence from scratch."""
        logits: Tensor = self.model(torch.tensor([tokens]), use_cache=False).logits[0]
        return logits

    @torch.inference_mode()
    def generate(self, tokens: list[int], num_new: int) -> list[int]:
        """The greedy continuation."""
        ids = torch.tensor([tokens])
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=num_new, pad_token_id=0
        )
        return [int(token) for token in out[0, len(tokens) :]]
