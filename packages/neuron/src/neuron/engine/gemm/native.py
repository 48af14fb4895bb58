"""Products on the CPU by our native kernels, with weights in panels (`helexa-neuron-cpu`).

A weight [out, in] becomes panels [ceil(out / 32), in, 32], in its own memory where `out` divides: one copy serves every
number of rows. It keeps the dtype that the checkpoint stores it in: bfloat16 becomes float32 on its way into the
registers, exactly, so that a model computed in float32 reads half the bytes. An output's sum runs in the order of `in`
whatever the number of rows, so a row's result has the same bits in any batch.

`unpacked` and `rows_of` are the twin in torch: what the panels mean.
"""

from __future__ import annotations

from collections.abc import Mapping

import neuron_cpu
import torch
import torch.nn.functional as F
from torch import Tensor

from neuron.engine.gemm.activation import silu_mul

PANEL = neuron_cpu.PANEL
ELEMENT_TYPES: Mapping[torch.dtype, int] = {
    torch.float32: neuron_cpu.FLOAT32,
    torch.bfloat16: neuron_cpu.BFLOAT16,
    torch.float16: neuron_cpu.FLOAT16,
}


def pack(weight: Tensor) -> Tensor:
    """A weight [out, in] as panels [ceil(out / 32), in, 32], in its memory where that is enough; zeros beyond `out`."""
    num_rows, num_columns = weight.shape
    padding = -num_rows % PANEL
    rows = F.pad(weight, (0, 0, 0, padding)) if padding else weight.contiguous()
    num_panels = rows.shape[0] // PANEL
    neuron_cpu.pack(ELEMENT_TYPES[rows.dtype], rows.data_ptr(), rows.data_ptr(), num_panels, num_columns)
    return rows.view(num_panels, num_columns, PANEL)


def _places(dtype: torch.dtype) -> Tensor:
    """Where each of a panel's outputs lies among 32 elements: two of bfloat16, 16 apart, share a word of 32 bits."""
    columns = torch.arange(PANEL)
    if dtype != torch.bfloat16:
        return columns
    half = PANEL // 2
    return torch.where(columns < half, 2 * columns, 2 * (columns - half) + 1)


def rows_of(panels: Tensor, rows: Tensor) -> Tensor:
    """Rows of the weight that was packed. rows: [T] int64. Returns [T, in]."""
    places = _places(panels.dtype)[rows % PANEL]
    return panels[rows.div(PANEL, rounding_mode="floor"), :, places]


def unpacked(panels: Tensor, num_rows: int) -> Tensor:
    """The weight [num_rows, in] that was packed."""
    return panels[:, :, _places(panels.dtype)].transpose(1, 2).reshape(-1, panels.shape[1])[:num_rows]


class NativeProduct:
    """Our kernels; `weight` is `pack`'s result. x may have another dtype than the weight."""

    name = "native"

    def __init__(self, out_features: int) -> None:
        self.out_features = out_features

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._multiply(x, weight, bias, self.out_features, is_gated=False)

    def gated(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        half = self.out_features // 2
        if half % PANEL:  # a panel would hold outputs of both halves
            return silu_mul(self.linear(x, weight, bias), row_by_row=True)
        return self._multiply(x, weight, bias, half, is_gated=True)

    def _multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None, width: int, *, is_gated: bool) -> Tensor:
        num_rows, num_columns = x.shape
        if num_columns != weight.shape[1]:
            raise ValueError(f"rows of {num_columns} elements, and a weight of {weight.shape[1]}")
        if x.stride(1) != 1:
            x = x.contiguous()
        if bias is not None and bias.dtype != torch.float32:
            bias = bias.float()
        out = torch.empty(num_rows, width, dtype=x.dtype)
        kind = ELEMENT_TYPES[x.dtype]
        neuron_cpu.linear(
            kind, ELEMENT_TYPES[weight.dtype], kind, x.data_ptr(), weight.data_ptr(),
            0 if bias is None else bias.data_ptr(), out.data_ptr(), num_rows, num_columns, self.out_features,
            x.stride(0), width, is_gated, 0,
        )  # fmt: skip
        return out
