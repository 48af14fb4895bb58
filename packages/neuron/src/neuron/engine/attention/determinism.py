"""Making a loaded model's outputs independent of what else is in a step.

By default each part takes the fastest way for the step at hand: a library's product chooses by the number of rows,
attention on the CPU pads a batch, elementwise operations treat the ends of a tensor otherwise than its middle. Each
choice can change the last bit of a result, and a token where two are nearly equal. Here every such choice is fixed.
What that takes differs by device: on a GPU only products and the cut of attention depend on the batch, because our
kernels work on rows independently.
"""

from __future__ import annotations

from torch import nn

from neuron.engine.gemm.gemm import deterministic_product
from neuron.engine.layers.embedding import LMHead
from neuron.engine.layers.linear import LinearLayer
from neuron.engine.layers.norm import QKNorm, RMSNorm
from neuron.engine.layers.rotary import RotaryEmbedding


def make_deterministic(model: nn.Module, rotary: RotaryEmbedding, *, max_positions: int) -> None:
    """Fix the way of every layer of a loaded model, once, before its first step.

    max_positions: of the longest sequence that will be served. The attention backend, the sampler and the sums over
    ranks (`ParallelGroup.sum_in_order`) have modes of their own.
    """
    for module in model.modules():
        if isinstance(module, LinearLayer):
            module.product = deterministic_product(module.weight, module.product)
        if isinstance(module, LMHead) and module.weight is not None and module.product is not None:
            module.product = deterministic_product(module.weight, module.product)
        if isinstance(module, RMSNorm | QKNorm):
            module.deterministic = True
    rotary.deterministic = True
    rotary.reserve(max_positions, next(model.parameters()).device)
