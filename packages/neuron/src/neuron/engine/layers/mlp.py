"""The gated feed-forward block."""

from __future__ import annotations

from torch import Tensor, nn

from neuron.checkpoint.sharding import shard_columns
from neuron.engine.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from neuron.engine.parallel.group import ParallelGroup
from neuron.engine.quantization.weight_format import WeightFormat


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), with gate and up merged into one product."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        bias: bool,
        group: ParallelGroup,
        weight_format: WeightFormat | None = None,
    ) -> None:
        super().__init__()
        inner = shard_columns(intermediate_size, group, what="size of the feed-forward block")
        self.gate_up_proj = MergedColumnParallelLinear(
            hidden_size,
            {"gate": inner, "up": inner},
            bias=bias,
            group=group,
            weight_format=weight_format,
        )
        self.gate_up_proj.is_gated = True
        self.down_proj = RowParallelLinear(inner, hidden_size, bias=bias, group=group, weight_format=weight_format)

    def forward(self, hidden: Tensor) -> Tensor:
        """[T, H] -> [T, H]"""
        projected: Tensor = self.down_proj(self.gate_up_proj.forward_gated(hidden))
        return projected
