"""Random weights from a seed: what a benchmark needs where no checkpoint is at hand."""

from __future__ import annotations

import torch

from neuron.engine.errors import ModelError
from neuron.engine.layers.norm import QKNorm, RMSNorm
from neuron.engine.models.decoder import CausalLM
from neuron.engine.weights.materialise import finish, materialise

_STANDARD_DEVIATION = 0.02


def load_dummy_weights(model: CausalLM, seed: int = 0) -> None:
    """Fill `model` on its device: norms with ones, everything else normally distributed with deviation 0.02.

    The same seed, shapes, dtype and kind of device give the same weights, however many ranks share them: each draws a
    checkpoint's tensors whole and keeps its part. Raises `ModelError` (`out_of_memory`).
    """
    generator = torch.Generator(device=model.device).manual_seed(seed)
    with torch.inference_mode(False), torch.no_grad():
        for _, module, part in model.checkpoint_modules():
            for weight_slice in module.weight_slices(part):
                if isinstance(module, RMSNorm | QKNorm):
                    materialise(model, module, weight_slice.parameter)[weight_slice.target].fill_(1.0)
                    continue
                if weight_slice.stored is not None:
                    raise ModelError("dummy_weights_unsupported", "codes and scales are not drawn: give a checkpoint")
                drawn = torch.empty(weight_slice.checkpoint_shape, dtype=model.dtype, device=model.device)
                part_drawn = drawn.normal_(0.0, _STANDARD_DEVIATION, generator=generator)[weight_slice.source]
                if part_drawn.numel():
                    materialise(model, module, weight_slice.parameter)[weight_slice.target] = part_drawn
    finish(model)
