"""Decoder shared by all families: the pre-norm layer, the stack, and the names of its checkpoint tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from neuron.checkpoint.config import ModelConfig
from neuron.checkpoint.layout import rank_sizes
from neuron.checkpoint.tensor_names import LLAMA_NAMES
from neuron.engine.attention.interface import StepContext
from neuron.engine.layers.embedding import LMHead, VocabParallelEmbedding
from neuron.engine.layers.norm import RMSNorm
from neuron.engine.layers.rotary import RotaryEmbedding, StepRotary
from neuron.engine.parallel.group import ParallelGroup
from neuron.engine.weight_slices import Loadable, NeedsFinishing


class Mixer(Protocol):
    """What mixes the tokens of a sequence: attention, or a recurrent state."""

    def __call__(self, hidden: Tensor, rotary: StepRotary, ctx: StepContext, /) -> Tensor:
        """[T, H] -> [T, H]; reads and writes this layer's part of the cache."""
        ...


class FeedForward(Protocol):
    """What works on each token by itself: a gated block, or experts."""

    def __call__(self, hidden: Tensor, /) -> Tensor:
        """[T, H] -> [T, H]."""
        ...


class DecoderLayer(nn.Module):
    """Pre-norm mixer and feed-forward block. The residual stream travels beside the hidden states, so that each
    addition is fused with the norm that follows it."""

    def __init__(self, hidden_size: int, eps: float, attention: Mixer, mlp: FeedForward) -> None:
        super().__init__()
        self.input_norm = RMSNorm(hidden_size, eps)
        self.attention = attention
        self.post_attention_norm = RMSNorm(hidden_size, eps)
        self.mlp = mlp

    def forward(
        self, hidden: Tensor, residual: Tensor | None, rotary: StepRotary, ctx: StepContext
    ) -> tuple[Tensor, Tensor]:
        """hidden: [T, H], the last block's output; residual: [T, H], the sum before it. Returns the same pair."""
        hidden, residual = self.input_norm(hidden, residual)
        hidden = self.attention(hidden, rotary, ctx)
        hidden, residual = self.post_attention_norm(hidden, residual)
        return self.mlp(hidden), residual


class CausalLM(nn.Module):
    """A decoder-only language model over packed tokens.

    A family overrides `build_layer`; what else is its own stands in its entry of `neuron.checkpoint.families`.
    Parameters are created by whoever constructs the model (`registry.build_model`: on the meta device) and filled by
    `neuron.engine.weights`.
    """

    def __init__(self, config: ModelConfig, group: ParallelGroup) -> None:
        super().__init__()
        self.config = config
        self.local = rank_sizes(config, group)
        self.checkpoint_names: Mapping[str, str] = LLAMA_NAMES
        self.group = group
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, group=group)
        self.layers = nn.ModuleList(self.build_layer(index) for index in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = LMHead(self.embed_tokens, tied=config.tie_word_embeddings)
        self.rotary = RotaryEmbedding(config.rope, config.head_dim)

    def build_layer(self, index: int) -> DecoderLayer:
        """Layer `index` of the stack."""
        raise NotImplementedError

    def forward(self, ctx: StepContext) -> Tensor:
        """Hidden states [T, H] of the step's tokens after the last norm; writes their keys and values to the cache."""
        batch = ctx.batch
        hidden: Tensor = self.embed_tokens(batch.token_ids)
        rotary = self.rotary.at(batch.positions, batch.max_context_len, hidden.dtype)
        residual: Tensor | None = None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual, rotary, ctx)
        hidden, _ = self.norm(hidden, residual)
        return hidden

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """[R, H] -> [R, vocab_size] float32."""
        logits: Tensor = self.lm_head(hidden)
        return logits

    def checkpoint_modules(self) -> Iterator[tuple[str, Loadable, str | None]]:
        """(checkpoint module name, our layer, part) of everything a checkpoint of this model must hold."""
        for checkpoint_name, ours in self.checkpoint_names.items():
            path, _, part = ours.partition(":")
            if path == "lm_head.matrix" and self.lm_head.is_tied:
                continue
            for index in range(self.config.num_layers) if "{}" in path else (0,):
                module = self.get_submodule(path.format(index))
                if not isinstance(module, Loadable):
                    raise TypeError(f"{path} holds no weights")
                yield checkpoint_name.format(index), module, part or None

    def reserve_positions(self, num_positions: int) -> None:
        """Make the rotary table long enough now, so that it does not move later (before capturing CUDA graphs)."""
        self.rotary.reserve(num_positions, self.device)

    def finish_loading(self) -> None:
        """Called by the weight loader when every parameter is filled."""
        for module in self.modules():
            if module is not self and isinstance(module, NeedsFinishing):
                module.finish_loading()
        if self.device.type != "cpu":
            self.reserve_positions(self.config.max_position_embeddings)
        self.eval()
