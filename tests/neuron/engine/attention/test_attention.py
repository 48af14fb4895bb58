"""Which attention a device gets, and the layer around it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from neuron.checkpoint.config import read_config
from neuron.engine.attention.attention import SelfAttention, make_attention_backend
from neuron.engine.attention.attention_cpu import GatherAttention
from neuron.engine.attention.attention_fixed import FixedRunAttention
from neuron.engine.attention.interface import StepContext
from neuron.engine.layers.rotary import RotaryEmbedding
from neuron.engine.parallel.group import ParallelGroup
from neuron.engine.weight_slices import NeedsFinishing
from torch import Tensor


def test_the_cpu_gets_the_gathering_backend() -> None:
    assert isinstance(make_attention_backend(torch.device("cpu")), GatherAttention)


def test_a_deterministic_cpu_gets_the_one_that_looks_at_nobody_else() -> None:
    assert isinstance(make_attention_backend(torch.device("cpu"), deterministic=True), FixedRunAttention)


class Recorder:
    """Attention that returns the queries and remembers what it was asked for."""

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, q: Tensor, k: Tensor, v: Tensor, kv_layer: Tensor, batch: Any, **options: Any) -> Tensor:
        self.shapes = [tuple(each.shape) for each in (q, k, v)]
        self.options = options
        return q


class Cache:
    """The layers of a cache, by their numbers."""

    def layer(self, index: int) -> Tensor:
        return torch.full((1,), float(index))


@pytest.mark.parametrize("has_qk_norm", [False, True])
def test_a_layer_attends_with_the_heads_and_the_window_of_its_place(has_qk_norm: bool) -> None:
    hf = {
        **{"model_type": "mistral", "vocab_size": 11, "hidden_size": 16, "intermediate_size": 8, "sliding_window": 5},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6},
    }
    config = read_config(hf)
    layer = SelfAttention(config, 1, group=ParallelGroup(), has_qk_norm=has_qk_norm)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    for module in layer.modules():
        if isinstance(module, NeedsFinishing):
            module.finish_loading()
    recorder: Any = Recorder()
    rotary = RotaryEmbedding(config.rope, config.head_dim).at(torch.arange(3), 3, torch.float32)
    kv: Any = Cache()
    batch: Any = None
    out = layer(torch.randn(3, 16), rotary, StepContext(batch, kv, recorder))
    assert out.shape == (3, 16) and recorder.shapes == [(3, 4, 6), (3, 2, 6), (3, 2, 6)]
    assert recorder.options == {"scale": 6**-0.5, "sliding_window": config.sliding_windows[1]}
    assert config.sliding_windows[1] == 5
