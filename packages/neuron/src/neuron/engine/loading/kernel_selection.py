"""Selection of kernels for a loaded model: settled once, before its first step, by all ranks of a group together."""

from __future__ import annotations

import torch

from neuron.engine import kernels
from neuron.engine.attention.attention_choice import HeadShape, choose_prefill_plugin
from neuron.engine.attention.determinism import make_deterministic
from neuron.engine.attention.interface import AttentionBackend
from neuron.engine.errors import ModelError
from neuron.engine.layers.gemm_autotune import choose_products
from neuron.engine.models.decoder import CausalLM
from neuron.engine.parallel.group import ParallelGroup


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

    attention: of `make_attention_backend`, for the same mode. Raises `ModelError` for a device without our kernels, on
    which nothing would make deterministic.
    """
    if deterministic:
        if device.type == "cuda" and not kernels.is_available(device):
            raise ModelError(
                "unsupported_deterministic",
                "deterministic answers on a GPU need our kernels: Triton, and compute capability 8.0",
            )
        make_deterministic(model, model.rotary, max_positions=max_model_len)
        group.sum_in_order()
        return
    if device.type != "cuda":
        return
    choose_products(model, group, device)
    from neuron.engine.attention.attention_triton import TritonAttention  # imports Triton

    if isinstance(attention, TritonAttention):
        config = model.config
        shape = HeadShape(
            model.local.num_heads,
            model.local.num_kv_heads,
            config.head_dim,
            page_size,
            model.dtype,
            frozenset(config.sliding_windows),
        )
        choose_prefill_plugin(attention, shape, group, device)
    torch.cuda.empty_cache()  # what measuring took is about to be counted as free
