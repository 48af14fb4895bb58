"""The stack that all families share, and the names of its tensors in a checkpoint."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from neuron.checkpoint.errors import UnsupportedSharding
from neuron.checkpoint.families import FAMILIES
from neuron.engine.models.decoder import CausalLM, DecoderLayer
from neuron.engine.models.registry import build_model
from neuron.engine.parallel.group import ParallelGroup
from neuron.engine.weight_slices import Loadable
from torch import Tensor, nn

from tests.neuron.engine.models.harness import CPU, TINY


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_name_map_fills_every_parameter_exactly_once(model_type: str, tied: bool, world_size: int) -> None:
    """On every rank, counted element by element."""
    hf = TINY | {"model_type": model_type, "tie_word_embeddings": tied, "attention_bias": True, "mlp_bias": True}
    for rank in range(world_size):
        model = build_model(hf, device=CPU, dtype=torch.float32, parallel=ParallelGroup(rank, world_size))
        counts = {name: torch.zeros(parameter.shape) for name, parameter in model.named_parameters()}
        paths = {id(module): path for path, module in model.named_modules()}
        for _, module, part in model.checkpoint_modules():
            assert isinstance(module, Loadable)
            for weight_slice in module.weight_slices(part):
                if all(span.stop > span.start for span in weight_slice.source):
                    counts[f"{paths[id(module)]}.{weight_slice.parameter}"][weight_slice.target] += 1
        for name, count in counts.items():
            padding = getattr(model.get_submodule(name.rpartition(".")[0]), "padding_elements", 0)
            assert count.sum() == count.numel() - padding, name
            assert count.max() == 1, name


def test_sizes_of_a_rank() -> None:
    hf = TINY | {"model_type": "qwen3", "head_dim": 8}
    model = build_model(hf, device=CPU, dtype=torch.float32, parallel=ParallelGroup(3, 4))
    assert (model.config.num_heads, model.config.num_kv_heads) == (4, 2)
    assert (model.local.num_heads, model.local.num_kv_heads, model.local.intermediate_size) == (1, 1, 6)
    with pytest.raises(UnsupportedSharding, match="attention heads"):
        build_model(hf, device=CPU, dtype=torch.float32, parallel=ParallelGroup(0, 3))


class Doubling(nn.Module):
    """In place of attention or of a feed-forward block."""

    def forward(self, hidden: Tensor, *_: object) -> Tensor:
        return 2 * hidden


def test_each_block_gets_the_normalised_sum_and_adds_what_it_makes_of_it() -> None:
    layer = DecoderLayer(4, 1e-6, Doubling(), Doubling())
    for parameter in layer.parameters():
        nn.init.ones_(parameter)
    nothing: Any = None
    hidden = torch.tensor([[1.0, 2.0, 3.0, 4.0]])

    def normed(x: Tensor) -> Tensor:
        return x / x.pow(2).mean(-1, keepdim=True).add(1e-6).sqrt()

    after_attention = hidden + 2 * normed(hidden)
    out, residual = layer(hidden, None, nothing, nothing)
    torch.testing.assert_close(residual, after_attention)
    torch.testing.assert_close(out, 2 * normed(after_attention))


def test_a_family_says_what_its_layers_are() -> None:
    class Nothing(CausalLM):
        pass

    with pytest.raises(NotImplementedError):
        Nothing(build_model(TINY | {"model_type": "qwen3"}, device=CPU, dtype=torch.float32).config, ParallelGroup())


def test_a_tied_head_is_not_looked_for_in_the_checkpoint() -> None:
    def names(*, tied: bool) -> set[str]:
        hf = TINY | {"model_type": "qwen3", "tie_word_embeddings": tied}
        model = build_model(hf, device=CPU, dtype=torch.float32)
        return {name for name, _, _ in model.checkpoint_modules()}

    assert names(tied=False) - names(tied=True) == {"lm_head"}


def test_a_name_that_leads_to_what_holds_no_weights_is_a_bug() -> None:
    model = build_model(TINY | {"model_type": "qwen3"}, device=CPU, dtype=torch.float32)
    model.checkpoint_names = {"model.layers.{}": "layers.{}"}
    with pytest.raises(TypeError, match=r"layers\.\{\} holds no weights"):
        list(model.checkpoint_modules())
