"""The Qwen3 architecture in its training form, with parameter names as in Hugging Face checkpoints.

Shapes: N tokens of a flat batch, B rows, L row length, E hidden size, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SHORT = 128  # tokens in a row


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model; the defaults give 3.8 million parameters, 7.6 MB in bfloat16."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 640
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 32
    rope_theta: float = 100_000.0
    rms_norm_eps: float = 1e-6


class RMSNorm(nn.Module):
    """Root mean square normalisation in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight.float()).to(x.dtype)


class Attention(nn.Module):
    """Projections of grouped-query attention with normalised queries and keys."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, heads * size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * size, bias=False)
        self.o_proj = nn.Linear(heads * size, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(size, config.rms_norm_eps)
        self.k_norm = RMSNorm(size, config.rms_norm_eps)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return down


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions (Su et al. 2021) to x [N, heads, D] with cos and sin [N, 1, D]."""
    left, right = x.chunk(2, dim=-1)
    return (x.float() * cos + torch.cat((-right, left), dim=-1).float() * sin).to(x.dtype)


def short_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of [B, H, L, D] with all scores at hand; trains faster than the fused kernel on short rows."""
    length = q.shape[2]
    scores = (q @ k.mT).float() * q.shape[-1] ** -0.5
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -1e9).softmax(-1).to(v.dtype) @ v


class Layer(nn.Module):
    """One decoder layer, cut at the attention so that both halves work on flat batches of fixed size."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head_dim = config.head_dim

    def before_attention(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries [N, H, D], keys and values [N, K, D] of x [N, E]."""
        attention, normed = self.self_attn, self.input_layernorm(x)
        q = attention.q_norm(attention.q_proj(normed).unflatten(-1, (-1, self.head_dim)))
        k = attention.k_norm(attention.k_proj(normed).unflatten(-1, (-1, self.head_dim)))
        v = attention.v_proj(normed).unflatten(-1, (-1, self.head_dim))
        return rotated(q, cos, sin), rotated(k, cos, sin), v

    def after_attention(self, x: Tensor, attended: Tensor) -> Tensor:
        """Return the layer's output [N, E] from its input and the attended values [N, H * D]."""
        x = x + self.self_attn.o_proj(attended)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class DemoModel(nn.Module):
    """The causal language model with tied embeddings."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                scale = 0.02 if "embed" in name else parameter.shape[1] ** -0.5
                is_output = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=scale * (0.1 if is_output else 1.0))
            elif name.endswith(("q_norm.weight", "k_norm.weight")):
                nn.init.constant_(parameter, 2.0)  # with 1.0, attention cannot become sharp before these have grown
        self.short_attention = short_attention
        self.halves = [(layer.before_attention, layer.after_attention) for layer in self.model.layers]

    def compile_halves(self) -> None:
        """Compile the layers' halves; all batches must then have the same number of tokens."""
        torch._dynamo.config.recompile_limit = 64  # noqa: SLF001 - it has no public name
        self.short_attention = torch.compile(short_attention, dynamic=False)
        self.halves = [
            (torch.compile(before, dynamic=False), torch.compile(after, dynamic=False)) for before, after in self.halves
        ]

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin [N, 1, D] of positions [N]."""
        size = self.config.head_dim
        frequencies = self.config.rope_theta ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
        angles = torch.cat([positions.float()[:, None] * frequencies] * 2, dim=-1)
        return angles.cos()[:, None], angles.sin()[:, None]

    def hidden(self, ids: Tensor) -> Tensor:
        """Return final hidden states [B * L, E] of right-padded ids [B, L]."""
        rows, length = ids.shape
        cos, sin = self.rope(torch.arange(length).repeat(rows))
        x = self.model.embed_tokens(ids.flatten())
        for before, after in self.halves:
            q, k, v = (
                part.view(rows, length, -1, self.config.head_dim).transpose(1, 2) for part in before(x, cos, sin)
            )
            groups = self.config.num_attention_heads // self.config.num_key_value_heads
            k, v = (part.repeat_interleave(groups, dim=1) for part in (k, v))
            if length <= SHORT and self.training:
                attended = self.short_attention(q, k, v)
            else:
                attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = after(x, attended.transpose(1, 2).reshape(rows * length, -1))
        normed: Tensor = self.model.norm(x)
        return normed

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], stop_ids: set[int], max_new_tokens: int) -> list[list[int]]:
        """Return the greedy continuations of a batch of prompts, without the stop token."""
        rows, longest = len(prompts), max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        padding = torch.tensor([longest - len(prompt) for prompt in prompts])
        caches: list[tuple[Tensor, Tensor]] = []
        results: list[list[int]] = [[] for _ in prompts]
        running = [True] * rows
        groups = self.config.num_attention_heads // self.config.num_key_value_heads
        for step in range(max_new_tokens):
            length = ids.shape[1]
            total = longest + step
            positions = torch.arange(total - length, total)
            mask = torch.arange(total)[None, None, :] >= padding[:, None, None]
            mask = (mask & (torch.arange(total)[None, None, :] <= positions[None, :, None])) | (
                torch.arange(total)[None, None, :] == positions[None, :, None]
            )
            cos, sin = self.rope((positions[None] - padding[:, None]).flatten())
            x = self.model.embed_tokens(ids.flatten())
            for index, layer in enumerate(self.model.layers):
                q, k, v = (
                    part.view(rows, length, -1, self.config.head_dim).transpose(1, 2)
                    for part in layer.before_attention(x, cos, sin)
                )
                if step:
                    k, v = (torch.cat(pair, dim=2) for pair in zip(caches[index], (k, v), strict=True))
                    caches[index] = (k, v)
                else:
                    caches.append((k, v))
                k, v = (part.repeat_interleave(groups, dim=1) for part in (k, v))
                attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])
                x = layer.after_attention(x, attended.transpose(1, 2).reshape(rows * length, -1))
            last = self.model.norm(x.view(rows, length, -1)[:, -1])
            ids = F.linear(last, self.model.embed_tokens.weight).argmax(-1, keepdim=True)
            for row, id_ in enumerate(ids[:, 0].tolist()):
                running[row] = running[row] and id_ not in stop_ids
                if running[row]:
                    results[row].append(id_)
            if not any(running):
                break
        return results


def save_checkpoint(model: DemoModel, folder: Path, eos_ids: list[int], pad_id: int, max_positions: int) -> None:
    """Write `model.safetensors` in bfloat16, `config.json` and `generation_config.json` in the Hugging Face layout."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().to(torch.bfloat16).contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    config: dict[str, Any] = {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": eos_ids[0],
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": max_positions,
        "model_type": "qwen3",
        "pad_token_id": pad_id,
        "rope_scaling": None,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        **dataclasses.asdict(model.config),
    }
    (folder / "model.safetensors").chmod(0o644)
    generation = {"do_sample": False, "eos_token_id": eos_ids, "pad_token_id": pad_id}
    for name, value in (("config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_checkpoint(folder: Path, dtype: torch.dtype) -> DemoModel:
    """Load a checkpoint in the Hugging Face layout and compute in `dtype`."""
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = ModelConfig(**{field.name: written[field.name] for field in dataclasses.fields(ModelConfig)})
    model = DemoModel(config)
    model.load_state_dict(load_file(str(folder / "model.safetensors")))
    return model.to(dtype)
