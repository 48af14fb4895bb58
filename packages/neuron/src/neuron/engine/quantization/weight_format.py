"""The contract between a linear layer and the format of its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from neuron.checkpoint.sharding import Shard
from neuron.engine.gemm.gemm import Product
from neuron.engine.weight_slices import WeightSlice


@dataclass(frozen=True, slots=True)
class OutputPart:
    """One of the matrices merged into a column-parallel layer: the rows of it that this rank holds."""

    name: str | None
    rows: Shard


class Weights(Protocol):
    """A linear layer, as a format sees it. in_shard: the columns of this rank; out_features: rows of all parts;
    kept_dtypes: names of parameters that do not become the model's dtype, as scales of more bits. weight: where the
    format has one matrix of floats. uses_native_kernels: the native CPU kernels multiply."""

    in_shard: Shard
    parts: tuple[OutputPart, ...]
    out_features: int
    kept_dtypes: frozenset[str]
    weight: nn.Parameter
    bias: nn.Parameter | None
    product: Product
    uses_native_kernels: bool

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None: ...

    def get_parameter(self, target: str) -> nn.Parameter: ...


class WeightFormat(Protocol):
    """How a linear layer's matrix is stored, filled and multiplied. Stateless: tensors live on the layer."""

    def create(self, layer: Weights, *, bias: bool) -> None:
        """Register the parameters of `layer`, for its rows and columns of this rank.

        Raises `UnsupportedSharding` where the format cannot be cut there.
        """
        ...

    def weight_slices(self, layer: Weights, part: OutputPart, row: int) -> list[WeightSlice]:
        """Checkpoint tensors of one part, as many as the format stores for a matrix, whose local rows begin at `row` of
        the merged matrix."""
        ...

    def finish(self, layer: Weights) -> None:
        """Once after loading: rearrange for speed."""
        ...

    def apply(self, layer: Weights, x: Tensor) -> Tensor:
        """[T, in] -> [T, out], with the layer's bias if it has one."""
        ...

    def apply_gated(self, layer: Weights, x: Tensor) -> Tensor:
        """silu(first half) * second half of `apply`: [T, in] -> [T, out / 2]."""
        ...


def create_bias(layer: Weights, bias: Tensor | None) -> None:
    layer.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))


def bias_slices(layer: Weights, part: OutputPart, row: int) -> list[WeightSlice]:
    """Of the bias, which every format stores in the same way; none where the layer has none."""
    if layer.bias is None:
        return []
    rows = part.rows
    return [WeightSlice("bias", (rows.total,), (rows.slice,), "bias", (slice(row, row + rows.length),))]


def blockwise_slice(
    suffix: str, part: OutputPart, columns: Shard, row: int, *, per_row: int, parameter: str, stored: str
) -> WeightSlice:
    """A tensor [rows, columns / per_row] of a part: codes that are packed, or scales of blocks, along a row.

    columns: what this rank holds of a row; whoever calls has seen to it that it begins and ends with a block. stored:
    the dtype that the checkpoint has it in, and that it keeps.
    """
    first, last = columns.start // per_row, (columns.start + columns.length) // per_row
    target = slice(row, row + part.rows.length)
    return WeightSlice(
        suffix,
        (part.rows.total, columns.total // per_row),
        (part.rows.slice, slice(first, last)),
        parameter,
        (target, slice(0, last - first)),
        stored=stored,
    )
