# ruff: noqa: E402
"""Layers whose parts are in blocks, each of its own type."""

from __future__ import annotations

from tests.native import import_or_skip

import_or_skip()

import pytest
import torch
from neuron.checkpoint.sharding import Shard
from neuron.engine.gemm.activation import silu_mul
from neuron.engine.layers.linear import MergedColumnParallelLinear
from neuron.engine.parallel.group import ParallelGroup
from neuron.engine.quantization.block_panels import pack_blocks
from neuron.engine.quantization.block_weight import BlockProduct, BlockWeight, gathered, is_held, joined
from neuron.engine.quantization.gguf_blocks import dequantize
from torch import Tensor

from tests.neuron.engine.quantization.blocks import random_blocks


def x(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize("kinds", [("Q4_K", "Q4_K"), ("Q4_K", "Q6_K")])
@pytest.mark.parametrize("bias", [True, False])
def test_a_merged_layer_multiplies_each_part_in_its_type(kinds: tuple[str, str], bias: bool) -> None:
    layer = MergedColumnParallelLinear(512, {"gate": 96, "up": 96}, bias=bias, group=ParallelGroup.single())
    layer.uses_native_kernels = True
    layer.hold_blocks(dict(zip(("gate", "up"), kinds, strict=True)))
    assert isinstance(layer.weight_format, BlockWeight)
    weights = []
    for index, kind in enumerate(kinds):
        raw = random_blocks(kind, 96, 512, seed=index)
        layer.get_parameter(f"blocks_{index}").data.copy_(raw)
        weights.append(dequantize(raw, kind))
    if layer.bias is not None:
        layer.bias.data.copy_(torch.linspace(-1, 1, 192))
    layer.finish_loading()
    assert not hasattr(layer, "blocks_0") and layer.weight is layer.get_parameter("panels_0")
    held = [name for name, _ in layer.named_parameters() if name.startswith("panels")]
    assert len(held) == len(set(kinds)), "neighbours of one type are one matrix"
    for rows in (1, 9):
        expected = torch.nn.functional.linear(x(rows, 512), torch.cat(weights), layer.bias)
        torch.testing.assert_close(layer(x(rows, 512)), expected, atol=2e-3, rtol=1e-3)
        torch.testing.assert_close(layer.forward_gated(x(rows, 512)), silu_mul(expected), atol=2e-3, rtol=1e-3)


def test_what_fills_no_panel_stays_apart() -> None:
    parts = [pack_blocks("Q8_0", random_blocks("Q8_0", rows, 64, seed=rows)) for rows in (32, 40, 32)]
    assert [part.num_out for part in joined(parts)] == [72, 32]
    weight = torch.cat([dequantize(random_blocks("Q8_0", rows, 64, seed=rows), "Q8_0") for rows in (32, 40, 32)])
    weight[72:] = dequantize(random_blocks("Q8_0", 32, 64, seed=32), "Q8_0")
    product = BlockProduct(joined(parts))
    torch.testing.assert_close(product.linear(x(3, 64), parts[0].data, None), x(3, 64) @ weight.T)
    with pytest.raises(ValueError, match="rows of 96 elements, and a weight of 64"):
        product.linear(x(3, 96), parts[0].data, None)


def test_rows_are_the_dequantised_ones() -> None:
    raw = random_blocks("Q6_K", 50, 512)
    rows = torch.tensor([49, 0, 31, 32])
    panels = pack_blocks("Q6_K", raw)
    assert torch.equal(gathered(panels, rows), dequantize(raw, "Q6_K")[rows])
    assert gathered(panels, rows[:0]).shape == (0, 512)
    for wrong in (-1, 50):
        with pytest.raises(IndexError, match="of a matrix of 50"):
            gathered(panels, torch.tensor([3, wrong]))


@pytest.mark.parametrize(
    ("kind", "start", "length", "expected"),
    [("Q4_K", 0, 512, True), ("Q4_K", 32, 96, True), ("Q4_K", 16, 64, False), ("IQ4_XS", 0, 512, False)],
)
def test_what_can_be_held(kind: str, start: int, length: int, expected: bool) -> None:
    assert is_held(kind, Shard(start, length, 512)) == expected
