"""Matrices as they are, in the model's dtype."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neuron.engine.gemm.gemm import arrange
from neuron.engine.quantization.weight_format import OutputPart, Weights, bias_slices, create_bias
from neuron.engine.weight_slices import WeightSlice


class UnquantizedWeight:
    """`weight` [out, in] and `bias` [out]. What multiplies is the layer's `Product`, decided after loading; it may hold
    the weight in another order."""

    def create(self, layer: Weights, *, bias: bool) -> None:
        weight = torch.empty(layer.out_features, layer.in_shard.length)
        layer.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
        create_bias(layer, torch.empty(layer.out_features) if bias else None)

    def weight_slices(self, layer: Weights, part: OutputPart, row: int) -> list[WeightSlice]:
        rows, columns = part.rows, layer.in_shard
        target = (slice(row, row + rows.length), slice(0, columns.length))
        matrix = WeightSlice("weight", (rows.total, columns.total), (rows.slice, columns.slice), "weight", target)
        return [matrix, *bias_slices(layer, part, row)]

    def finish(self, layer: Weights) -> None:
        weight, layer.product = arrange(layer.get_parameter("weight").data, native=layer.uses_native_kernels)
        layer.weight = nn.Parameter(weight, requires_grad=False)

    def apply(self, layer: Weights, x: Tensor) -> Tensor:
        return layer.product.linear(x, layer.weight, layer.bias)

    def apply_gated(self, layer: Weights, x: Tensor) -> Tensor:
        return layer.product.gated(x, layer.weight, layer.bias)
