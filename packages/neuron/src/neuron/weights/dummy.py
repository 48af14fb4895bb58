"""Random weights from a seed: what a benchmark needs where no checkpoint is at hand."""

from __future__ import annotations

import torch

from neuron.layers.norm import QKNorm, RMSNorm
from neuron.layers.placement import Loadable
from neuron.models.decoder import CausalLM
from neuron.weights.materialise import finish, materialise

_STANDARD_DEVIATION = 0.02


def load_dummy_weights(model: CausalLM, seed: int = 0) -> None:
    """Fill `model` on its device: norms with ones, everything else normally distributed with deviation 0.02.

    The same seed, shapes, dtype and kind of device give the same weights. Raises `ModelError` (`out_of_memory`).
    """
    generator = torch.Generator(device=model.device).manual_seed(seed)
    with torch.inference_mode(False), torch.no_grad():
        for path, parameter in list(model.named_parameters()):
            owner, _, name = path.rpartition(".")
            module = model.get_submodule(owner)
            is_norm = isinstance(module, RMSNorm | QKNorm)
            if not parameter.is_meta or not isinstance(module, Loadable):
                continue
            memory = materialise(model, module, name)
            if is_norm:
                memory.fill_(1.0)
            else:
                memory.normal_(0.0, _STANDARD_DEVIATION, generator=generator)
    finish(model)
