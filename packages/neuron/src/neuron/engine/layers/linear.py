"""Linear layers in Megatron's parallel form (Shoeybi et al. 2019, section 3), with the weight format as a strategy.

A column-parallel layer splits its outputs among the ranks and needs no communication; a row-parallel layer splits
its inputs and sums the ranks' products. A layer knows which slices of which checkpoint tensors it holds; how they
are stored and multiplied is its `WeightFormat`'s business (`engine/quantization`), so a quantised format is one new
class.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from neuron.checkpoint.block_types import NATIVE_BITS
from neuron.checkpoint.sharding import Shard, shard_evenly, shard_heads, whole
from neuron.engine.gemm.gemm import Product
from neuron.engine.parallel.group import ParallelGroup
from neuron.engine.quantization.unquantized import UnquantizedWeight
from neuron.engine.quantization.weight_format import OutputPart, WeightFormat
from neuron.engine.weight_slices import WeightSlice


class LinearLayer(nn.Module):
    """What all linear layers share: input slice, output parts, weight format. [T, in] -> [T, out], both local.

    is_gated: whoever uses the layer calls `forward_gated`. uses_native_kernels: set before loading where the CPU's
    multiply; a float weight then keeps the dtype that it is stored in.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    product: Product
    is_gated = False
    uses_native_kernels = False
    kept_dtypes: frozenset[str] = frozenset()

    def __init__(
        self,
        in_shard: Shard,
        parts: tuple[OutputPart, ...],
        *,
        bias: bool,
        group: ParallelGroup,
        weight_format: WeightFormat | None,
    ) -> None:
        super().__init__()
        self.in_shard = in_shard
        self.parts = parts
        self.out_features = sum(part.rows.length for part in parts)
        self.group = group
        self.weight_format: WeightFormat = weight_format or UnquantizedWeight()
        self.weight_format.create(self, bias=bias)

    def weight_slices(self, part: str | None) -> list[WeightSlice]:
        row = 0
        for candidate in self.parts:
            if candidate.name == part:
                return self.weight_format.weight_slices(self, candidate, row)
            row += candidate.rows.length
        raise ValueError(f"this layer has the parts {[candidate.name for candidate in self.parts]}, not {part!r}")

    def can_hold(self, kind: str) -> bool:
        """Whether a matrix in blocks of a type of GGUF can be held as it is stored."""
        if kind not in NATIVE_BITS:
            return False
        from neuron.engine.quantization.block_weight import is_held  # a distribution that may be absent

        return is_held(kind, self.in_shard)

    def hold_blocks(self, kinds: Mapping[str | None, str]) -> None:
        """Become a layer of parts in blocks, before anything is read. kinds: their types."""
        from neuron.engine.quantization.block_weight import BlockWeight

        device = self.weight.device
        del self.weight
        self.weight_format = BlockWeight(kinds)
        with torch.device(device):
            self.weight_format.create(self, bias=self.bias is not None)

    def finish_loading(self) -> None:
        self.weight_format.finish(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight_format.apply(self, x)

    def forward_gated(self, x: Tensor) -> Tensor:
        """silu(gate) * up of a layer whose parts are gate and up: [T, in] -> [T, out / 2]."""
        return self.weight_format.apply_gated(self, x)


class ColumnParallelLinear(LinearLayer):
    """Outputs split among the ranks; each returns its own part, [T, in] -> [T, out / world_size]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        group: ParallelGroup,
        weight_format: WeightFormat | None = None,
    ) -> None:
        part = OutputPart(None, shard_evenly(out_features, group, what="output size"))
        super().__init__(whole(in_features), (part,), bias=bias, group=group, weight_format=weight_format)


class MergedColumnParallelLinear(LinearLayer):
    """Several matrices with the same input as one product; the output is the parts' local rows side by side.

    out_features: of each matrix, to be split evenly, or which part of it this rank holds.
    """

    def __init__(
        self,
        in_features: int,
        out_features: Mapping[str, int | Shard],
        *,
        bias: bool,
        group: ParallelGroup,
        weight_format: WeightFormat | None = None,
    ) -> None:
        parts = tuple(
            OutputPart(name, size if isinstance(size, Shard) else shard_evenly(size, group, what=f"size of {name}"))
            for name, size in out_features.items()
        )
        super().__init__(whole(in_features), parts, bias=bias, group=group, weight_format=weight_format)


class QKVParallelLinear(LinearLayer):
    """Query, key and value projections as one product: [T, H] -> [T, (Hq + 2·Hkv)·D], heads of this rank.

    Heads are split among the ranks; KV heads are replicated when there are fewer of them than ranks.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        bias: bool,
        group: ParallelGroup,
        weight_format: WeightFormat | None = None,
    ) -> None:
        query, kv = shard_heads(num_heads, num_kv_heads, group)
        self.query_heads = query
        self.num_heads = query.length
        self.num_kv_heads = kv.length
        parts = (
            OutputPart("q", query.scaled(head_dim)),
            OutputPart("k", kv.scaled(head_dim)),
            OutputPart("v", kv.scaled(head_dim)),
        )
        super().__init__(whole(hidden_size), parts, bias=bias, group=group, weight_format=weight_format)


class RowParallelLinear(LinearLayer):
    """Inputs split among the ranks, products summed: [T, in of this rank] -> [T, out] on every rank.

    in_features: to be split evenly, or which part of them this rank holds. Only rank 0 holds the bias, so that the sum
    contains it once.
    """

    def __init__(
        self,
        in_features: int | Shard,
        out_features: int,
        *,
        bias: bool,
        group: ParallelGroup,
        weight_format: WeightFormat | None = None,
    ) -> None:
        self._has_bias = bias
        super().__init__(
            in_features if isinstance(in_features, Shard) else shard_evenly(in_features, group, what="input size"),
            (OutputPart(None, whole(out_features)),),
            bias=bias and group.rank == 0,
            group=group,
            weight_format=weight_format,
        )

    def weight_slices(self, part: str | None) -> list[WeightSlice]:
        weight_slices = super().weight_slices(part)
        if self._has_bias and self.bias is None:
            # Known to this layer, but not read by this rank: an empty slice.
            total = self.parts[0].rows.total
            weight_slices.append(WeightSlice("bias", (total,), (slice(0, 0),), "bias", (slice(0, 0),)))
        return weight_slices

    def forward(self, x: Tensor) -> Tensor:
        return self.group.all_reduce(self.weight_format.apply(self, x))
