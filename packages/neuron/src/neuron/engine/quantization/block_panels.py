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

PANEL = 32


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """How a type's codes and scales are held. number: the native kernels' own; bits: of a code; group: positions with
    one scale; zero: what is taken off a code; has_min: a group has an offset of its own; is_two_level: scales of eight
    bits below one of float16 for each block."""

    number: int
    bits: int
    group: int
    zero: int
    has_min: bool
    is_two_level: bool


FORMATS: Mapping[str, BlockFormat] = {
    "Q4_0": BlockFormat(0, 4, 32, 8, False, False),
    "Q4_1": BlockFormat(1, 4, 32, 0, True, False),
    "Q5_0": BlockFormat(2, 5, 32, 16, False, False),
    "Q5_1": BlockFormat(3, 5, 32, 0, True, False),
    "Q8_0": BlockFormat(4, 8, 32, 0, False, False),
    "Q4_K": BlockFormat(5, 4, 32, 0, True, True),
    "Q5_K": BlockFormat(6, 5, 32, 0, True, True),
    "Q6_K": BlockFormat(7, 6, 16, 32, False, True),
}
"""The types that are multiplied as they are stored."""


@dataclass(frozen=True, slots=True)
class Fields:
    """What blocks hold, apart.

    codes: [rows, K] uint8 (Q8_0: int8). scales, mins: [rows, K / group], of eight bits below an outer one, else
    float16, mins as what is subtracted. outer, outer_min: [rows, K / block] float16.
    """

    codes: Tensor
    scales: Tensor
    mins: Tensor | None = None
    outer: Tensor | None = None
    outer_min: Tensor | None = None


def fields_of(kind: str, raw: Tensor) -> Fields:
    """kind: one of `FORMATS`; raw: [rows, bytes of a row] uint8, whole blocks."""
    rows = raw.shape[0]
    blocks = raw.view(rows, -1, BLOCK_TYPES[kind].block_bytes)
    if kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1"):
        return _legacy(kind, blocks)
    if kind == "Q8_0":
        return Fields(blocks[..., 2:].contiguous().view(torch.int8).reshape(rows, -1), _halves(blocks[..., :2]))
    if kind == "Q6_K":
        return _q6_k(blocks)
    return _q4_k_or_q5_k(kind, blocks)


def _halves(part: Tensor) -> Tensor:
    """[rows, blocks, 2·n] uint8 as [rows, blocks·n] float16."""
    return part.contiguous().view(torch.float16).reshape(part.shape[0], -1)


def _bits_of(words: Tensor, count: int) -> Tensor:
    """The bits of bytes [..., n] in order: [..., 8·n] uint8; count = 8·n."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return ((words.unsqueeze(-1) >> shifts) & 1).reshape(*words.shape[:-1], count)


def _legacy(kind: str, blocks: Tensor) -> Fields:
    """Blocks of 32: scale, perhaps a minimum, perhaps 32 fifth bits, then 16 bytes, whose low halves come first."""
    rows = blocks.shape[0]
    has_min, has_fifth = kind.endswith("1"), kind.startswith("Q5")
    at = 4 if has_min else 2
    # What a file adds is subtracted here.
    mins = _halves(blocks[..., 2:4]).neg() if has_min else None
    nibbles = blocks[..., at + 4 if has_fifth else at :]
    codes = torch.cat((nibbles & 15, nibbles >> 4), dim=-1)
    if has_fifth:
        codes = codes | _bits_of(blocks[..., at : at + 4], 32) << 4
    return Fields(codes.reshape(rows, -1), _halves(blocks[..., :2]), mins)


def _q4_k_or_q5_k(kind: str, blocks: Tensor) -> Fields:
    rows, num_blocks = blocks.shape[:2]
    packed = blocks[..., 4:16]  # eight scales and eight minima of six bits
    low, middle, high = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    scales = torch.cat((low & 63, (high & 15) | (low >> 6) << 4), dim=-1)
    mins = torch.cat((middle & 63, (high >> 4) | (middle >> 6) << 4), dim=-1)
    nibbles = blocks[..., -128:].reshape(rows, num_blocks, 4, 32)  # 32 bytes hold 64 elements, low halves first
    codes = torch.stack((nibbles & 15, nibbles >> 4), dim=-2).reshape(rows, num_blocks, 8, 32)
    if kind == "Q5_K":
        shifts = torch.arange(8, dtype=torch.uint8).view(8, 1)
        codes = codes | ((blocks[..., 16:48].unsqueeze(-2) >> shifts) & 1) << 4
    return Fields(
        codes.reshape(rows, -1),
        scales.reshape(rows, -1),
        mins.reshape(rows, -1),
        _halves(blocks[..., 0:2]),
        _halves(blocks[..., 2:4]),
    )


def _q6_k(blocks: Tensor) -> Fields:
    rows, num_blocks = blocks.shape[:2]
    low = blocks[..., :128].reshape(rows, num_blocks, 2, 2, 32)  # half, run, element
    high = blocks[..., 128:192].reshape(rows, num_blocks, 2, 1, 32)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8).view(4, 1)
    nibbles = torch.cat((low & 15, low >> 4), dim=-2)  # runs 0, 1 low, then 0, 1 high: elements + 0, 32, 64, 96
    codes = nibbles | ((high >> shifts) & 3) << 4
    scales = blocks[..., 192:208].reshape(rows, -1)
    return Fields(codes.reshape(rows, num_blocks * 256), scales, outer=_halves(blocks[..., 208:210]))


# ------------------------------------------------------------------ panels


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
        return FORMATS[self.kind].number + 16 * self.unit


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
    number = FORMATS[kind].number + 16 * unit
    panel_bytes = (last - first) // unit * neuron_cpu.unit_bytes(number)
    data = torch.empty(-(-raw.shape[0] // PANEL), panel_bytes, dtype=torch.uint8)
    raw = raw.contiguous()
    neuron_cpu.pack_blocks(number, raw.data_ptr(), data.data_ptr(), raw.shape[0], raw.shape[1], first, last - first)
    return BlockPanels(kind, data, raw.shape[0], last - first, unit)


def _num_columns(kind: str, raw: Tensor) -> int:
    block = BLOCK_TYPES[kind]
    return raw.shape[1] // block.block_bytes * block.block_elements


def panels_in_torch(kind: str, raw: Tensor, *, columns: tuple[int, int] | None = None) -> Tensor:
    """The twin of `pack_blocks`: its data. Rows that are wanting are zeros."""
    first, last = columns or (0, _num_columns(kind, raw))
    unit = unit_of(kind, first, last)
    missing = -raw.shape[0] % PANEL
    if missing:
        raw = torch.cat((raw, raw.new_zeros(missing, raw.shape[1])))
    form, fields, block = FORMATS[kind], fields_of(kind, raw), BLOCK_TYPES[kind].block_elements
    num_panels, num_units = raw.shape[0] // PANEL, (last - first) // unit

    def side_by_side(values: Tensor, per_unit: int) -> Tensor:
        """[rows, values of a row] as [panels, units, values of a unit, 32]."""
        return values.view(num_panels, PANEL, num_units, per_unit).permute(0, 2, 3, 1)

    def as_bytes(values: Tensor) -> Tensor:
        return values.contiguous().view(torch.uint8).reshape(num_panels, num_units, -1)

    parts: list[Tensor] = []
    # One outer scale for each block of the file: for each unit here, be it a part of a block.
    unit_blocks = torch.arange(first, last, unit) // block
    outers = [outer for outer in (fields.outer, fields.outer_min) if outer is not None]
    parts.extend(as_bytes(side_by_side(outer[:, unit_blocks], 1)) for outer in outers)
    groups = slice(first // form.group, last // form.group)
    inner = [scales for scales in (fields.scales, fields.mins) if scales is not None]
    parts.extend(as_bytes(side_by_side(scales[:, groups].contiguous(), unit // form.group)) for scales in inner)
    codes = side_by_side(fields.codes[:, first:last].contiguous(), unit)
    if form.bits == 8:
        parts.append(as_bytes(codes))
    else:
        low = codes & 15
        parts.append(as_bytes(low[..., : PANEL // 2] | low[..., PANEL // 2 :] << 4))
        if form.bits > 4:
            # [.., 32] outputs as [.., i, j]: their higher bits share byte j.
            width = form.bits - 4
            high = (codes >> 4).reshape(*codes.shape[:-1], 8 // width, PANEL // 8 * width)
            shifts = torch.arange(0, 8, width, dtype=torch.uint8).view(-1, 1)
            parts.append(as_bytes((high << shifts).sum(-2, dtype=torch.uint8)))
    return torch.cat(parts, dim=-1).reshape(num_panels, -1)
