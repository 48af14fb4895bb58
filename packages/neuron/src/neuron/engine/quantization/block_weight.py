"""Matrices in ggml's blocks, held and multiplied as they are stored, by the native CPU kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import neuron_cpu
import torch
from torch import Tensor, nn

from neuron.checkpoint.block_types import BLOCK_TYPES
from neuron.checkpoint.sharding import Shard
from neuron.engine.gemm.activation import silu_mul
from neuron.engine.gemm.native import ELEMENT_TYPES
from neuron.engine.quantization.block_panels import FORMATS, PANEL, BlockPanels, pack_blocks
from neuron.engine.quantization.weight_format import OutputPart, Weights, bias_slices, create_bias
from neuron.engine.weight_slices import WeightSlice


def is_held(kind: str, columns: Shard) -> bool:
    """Whether these columns of a matrix of a type can be held as they are stored."""
    return kind in FORMATS and columns.start % 32 == 0 and columns.length % 32 == 0


class BlockProduct:
    """x @ weightᵀ of one or several matrices side by side, each of its own type. x of 16 or 32 bits."""

    name = "native"

    def __init__(self, parts: Sequence[BlockPanels]) -> None:
        self.parts = tuple(parts)
        self.out_features = sum(part.num_out for part in parts)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """weight is the first of `parts`; the others are known here."""
        out = torch.empty(x.shape[0], self.out_features, dtype=x.dtype)
        begin = 0
        for part in self.parts:
            _multiply(x, part, bias, out, begin, is_gated=False)
            begin += part.num_out
        return out

    def gated(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if len(self.parts) > 1 or self.out_features % (2 * PANEL):
            return silu_mul(self.linear(x, weight, bias), row_by_row=True)
        out = torch.empty(x.shape[0], self.out_features // 2, dtype=x.dtype)
        _multiply(x, self.parts[0], bias, out, 0, is_gated=True)
        return out


def _multiply(x: Tensor, part: BlockPanels, bias: Tensor | None, out: Tensor, begin: int, *, is_gated: bool) -> None:
    """Into columns of `out` from `begin` on."""
    if x.shape[1] != part.num_in:
        raise ValueError(f"rows of {x.shape[1]} elements, and a weight of {part.num_in}")
    if x.stride(1) != 1:
        x = x.contiguous()
    if bias is not None:
        bias = bias.float()
    kind = ELEMENT_TYPES[x.dtype]
    neuron_cpu.linear(
        kind, neuron_cpu.BLOCKS, kind, x.data_ptr(), part.data.data_ptr(),
        0 if bias is None else bias.data_ptr() + begin * 4, out.data_ptr() + begin * out.element_size(),
        x.shape[0], part.num_in, part.num_out, x.stride(0), out.stride(0), is_gated, part.number,
    )  # fmt: skip


def gathered(panels: BlockPanels, rows: Tensor) -> Tensor:
    """Rows of a matrix, dequantised. rows: [T] int64. Returns [T, in] float32. Raises `IndexError` for others."""
    rows = rows.contiguous()
    if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < panels.num_out:
        raise IndexError(f"rows {int(rows.min())} to {int(rows.max())} of a matrix of {panels.num_out}")
    out = torch.empty(rows.shape[0], panels.num_in)
    neuron_cpu.gather_rows(
        panels.number, panels.data.data_ptr(), rows.data_ptr(), out.data_ptr(), rows.shape[0], panels.num_in
    )
    return out


def joined(parts: Sequence[BlockPanels]) -> list[BlockPanels]:
    """Neighbours of one type whose rows fill their panels, as one."""
    result: list[BlockPanels] = []
    for part in parts:
        last = result[-1] if result else None
        if last is not None and (last.kind, last.unit) == (part.kind, part.unit) and last.num_out % PANEL == 0:
            data = torch.cat((last.data, part.data))
            result[-1] = BlockPanels(part.kind, data, last.num_out + part.num_out, part.num_in, part.unit)
        else:
            result.append(part)
    return result


class BlockWeight:
    """`WeightFormat` of parts that are each in blocks. kinds: their types, by the names of the parts.

    While it is read, `blocks_0`, … hold the rows of each part as the file has them; then `panels_0`, … what is
    multiplied, of which `weight` is the first.
    """

    def __init__(self, kinds: Mapping[str | None, str]) -> None:
        self.kinds = dict(kinds)

    def create(self, layer: Weights, *, bias: bool) -> None:
        for index, part in enumerate(layer.parts):
            first, last = self._blocks(layer, part)
            width = (last - first) * BLOCK_TYPES[self.kinds[part.name]].block_bytes
            memory = torch.empty(part.rows.length, width, dtype=torch.uint8)
            layer.register_parameter(f"blocks_{index}", nn.Parameter(memory, requires_grad=False))
        create_bias(layer, torch.empty(layer.out_features) if bias else None)

    def _blocks(self, layer: Weights, part: OutputPart) -> tuple[int, int]:
        """The first and the last + 1 of a row's blocks that hold this rank's columns."""
        elements, columns = BLOCK_TYPES[self.kinds[part.name]].block_elements, layer.in_shard
        return columns.start // elements, -(-(columns.start + columns.length) // elements)

    def weight_slices(self, layer: Weights, part: OutputPart, row: int) -> list[WeightSlice]:
        index = layer.parts.index(part)
        rows, columns = part.rows, layer.in_shard
        matrix = WeightSlice(
            "weight",
            (rows.total, columns.total),
            (rows.slice, columns.slice),
            f"blocks_{index}",
            (slice(0, rows.length), slice(0, layer.get_parameter(f"blocks_{index}").shape[1])),
            stored=self.kinds[part.name],
        )
        return [matrix, *bias_slices(layer, part, row)]

    def finish(self, layer: Weights) -> None:
        parts = []
        for index, part in enumerate(layer.parts):
            kind = self.kinds[part.name]
            first, _ = self._blocks(layer, part)
            begin = layer.in_shard.start - first * BLOCK_TYPES[kind].block_elements
            raw = layer.get_parameter(f"blocks_{index}").data
            parts.append(pack_blocks(kind, raw, columns=(begin, begin + layer.in_shard.length)))
            delattr(layer, f"blocks_{index}")
        parts = joined(parts)
        for index, panels in enumerate(parts):
            layer.register_parameter(f"panels_{index}", nn.Parameter(panels.data, requires_grad=False))
        layer.weight = layer.get_parameter("panels_0")
        layer.product = BlockProduct(parts)

    def apply(self, layer: Weights, x: Tensor) -> Tensor:
        return layer.product.linear(x, layer.weight, layer.bias)

    def apply_gated(self, layer: Weights, x: Tensor) -> Tensor:
        return layer.product.gated(x, layer.weight, layer.bias)
