"""How a loaded model computes: settled once, before its first step, by all ranks of a group together."""

from __future__ import annotations

import torch

from neuron.layers.attention import AttentionBackend
from neuron.layers.attention_choice import HeadShape, choose_prefill_plugin
from neuron.layers.determinism import make_deterministic
from neuron.layers.product_choice import choose_products
from neuron.models.decoder import CausalLM
from neuron.parallel.group import ParallelGroup


def settle_compute(
    model: CausalLM,
    attention: AttentionBackend,
    *,
    group: ParallelGroup,
    device: torch.device,
    page_size: int,
    max_model_len: int,
    deterministic: bool,
) -> None:
    """Fix every choice for deterministic models; for others, let measurements decide where there is a device.

    attention: of `make_attention_backend`, for the same mode.
    """
    if deterministic:
        make_deterministic(model, model.rotary, max_positions=max_model_len)
        group.sum_in_order()
        return
    if device.type != "cuda":
        return
    choose_products(model, group, device)
    from neuron.layers.attention_triton import TritonAttention  # imports Triton

    if isinstance(attention, TritonAttention):
        config = model.config
        shape = HeadShape(
            config.num_heads_local,
            config.num_kv_heads_local,
            config.head_dim,
            page_size,
            model.dtype,
            frozenset(config.sliding_windows),
        )
        choose_prefill_plugin(attention, shape, group, device)
