"""Weights in ggml's blocks as the native CPU kernels hold them: panels of 32 outputs, codes and scales as in the file.

A row of a file is a run of blocks, each with its scales and codes. Here 32 rows lie side by side, in *units* of
positions: the scales of a unit's groups first, then its codes, low four bits and higher bits apart (`csrc/kernels.h`,
`Blocks`). No bit is added to a code, so a panel takes what 32 rows of the file take (Q4_K and Q5_K 2.8 % more: their
scales of six bits get eight). A weight is scale * code - offset in float32, which is bit for bit what the file's
dequantisation gives.

A unit is a super-block of 256 positions, or a part of one where a rank's slice ends within it: a scale belongs to a
group of 16 or 32, so a cut at any multiple of 32 is exact.

Layouts of the blocks: `ggml-common.h` of ggml 0.25.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import neuron_cpu
import torch
from torch import Tensor

from neuron.checkpoint.block_types import BLOCK_TYPES

PANEL = neuron_cpu.PANEL


FORMATS: Mapping[str, int] = {
    kind: number for number, kind in enumerate(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"))
}
"""The types that are multiplied as they are stored, and the native kernels' numbers of them."""


@dataclass(frozen=True, slots=True)
class BlockPanels:
    """A weight [out, in] in panels. data: [panels, bytes of a panel] uint8; unit: positions of a unit."""

    kind: str
    data: Tensor
    num_out: int
    num_in: int
    unit: int

    @property
    def number(self) -> int:
        """What the native kernels take for the format."""
        return FORMATS[self.kind] + 16 * self.unit


def unit_of(kind: str, first: int, last: int) -> int:
    """Positions of a unit for columns first … last - 1 of a row: a block, or as much of one as such a slice allows.

    Raises `ValueError` where it would cut a group.
    """
    unit = math.gcd(BLOCK_TYPES[kind].block_elements, first, last)
    if unit % 32:
        raise ValueError(f"columns {first} to {last} cut a group of 32 of {kind}")
    return unit


def pack_blocks(kind: str, raw: Tensor, *, columns: tuple[int, int] | None = None) -> BlockPanels:
    """Rows of a file as panels. raw: [rows, bytes of a row] uint8; columns: the first and the last + 1 to keep,
    multiples of 32 (all without it). Raises `ValueError` for other ones."""
    first, last = columns or (0, _num_columns(kind, raw))
    unit = unit_of(kind, first, last)
    number = FORMATS[kind] + 16 * unit
    panel_bytes = (last - first) // unit * neuron_cpu.unit_bytes(number)
    data = torch.empty(-(-raw.shape[0] // PANEL), panel_bytes, dtype=torch.uint8)
    raw = raw.contiguous()
    neuron_cpu.pack_blocks(number, raw.data_ptr(), data.data_ptr(), raw.shape[0], raw.shape[1], first, last - first)
    return BlockPanels(kind, data, raw.shape[0], last - first, unit)


def _num_columns(kind: str, raw: Tensor) -> int:
    block = BLOCK_TYPES[kind]
    return raw.shape[1] // block.block_bytes * block.block_elements
