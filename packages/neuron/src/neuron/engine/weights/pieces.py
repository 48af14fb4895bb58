"""A tensor's slice in pieces: where its bytes lie in the file, where its numbers go, and how the one becomes the other.

Blocks of GGUF are read whole: where a slice of columns ends within one, the block is decoded and cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from neuron.checkpoint.block_types import BLOCK_TYPES
from neuron.engine.quantization.gguf_blocks import dequantize
from neuron.engine.weight_slices import Slices, WeightSlice
from neuron.engine.weights.pipeline import Piece
from neuron.engine.weights.safetensors_reader import TensorInfo, bytes_per_element
from neuron.engine.weights.slices import runs_of

# Of a decoded element: float32.
_DECODED_BYTES = 4


@dataclass(frozen=True, slots=True)
class _Extent:
    """A slice within its file: of a tensor of `shape`, whose elements have `item_bytes`, the part `source`. decode: see
    `Piece`, for rows of it."""

    shape: tuple[int, ...]
    source: Slices
    item_bytes: int
    decode: Callable[[Tensor], Tensor] | None = None


def is_in_blocks(dtype: str) -> bool:
    """Whether a tensor's elements share scales with their neighbours."""
    return dtype in BLOCK_TYPES and BLOCK_TYPES[dtype].block_elements > 1


def _extent(info: TensorInfo, weight_slice: WeightSlice) -> _Extent:
    if not is_in_blocks(info.dtype):
        return _Extent(info.shape, weight_slice.source, bytes_per_element(info.dtype))
    block, columns = BLOCK_TYPES[info.dtype], weight_slice.source[-1]
    first, last = columns.start // block.block_elements, -(-columns.stop // block.block_elements)
    shape = (*info.shape[:-1], info.shape[-1] // block.block_elements * block.block_bytes)
    source = (*weight_slice.source[:-1], slice(first * block.block_bytes, last * block.block_bytes))
    if weight_slice.stored is not None:
        return _Extent(shape, source, 1)
    begin = columns.start - first * block.block_elements
    end = begin + columns.stop - columns.start
    return _Extent(shape, source, 1, lambda raw: dequantize(raw, info.dtype)[:, begin:end])


def bytes_read(info: TensorInfo, weight_slice: WeightSlice) -> int:
    """Bytes of the file that a slice takes."""
    extent = _extent(info, weight_slice)
    num_elements: int = math.prod(part.stop - part.start for part in extent.source)
    return num_elements * extent.item_bytes


def pieces_of(
    info: TensorInfo,
    weight_slice: WeightSlice,
    target: Tensor,
    *,
    descriptor: int,
    dtype: torch.dtype,
    block_bytes: int,
) -> Iterator[Piece]:
    """A slice as runs of whole rows of it, each as many as a block of the ring holds.

    target: where it goes in its parameter; dtype: of the file (uint8 for what is in blocks). Rows that lie in pairs go
    to where the model has them, a head at a time.
    """
    extent = _extent(info, weight_slice)
    label, source = f"{info.name} of {info.file.name}", extent.source
    rows_in_unit = 1
    if info.interleaved_heads:
        rows_in_unit = info.shape[0] // info.interleaved_heads
        # [heads, 2, D/2, ...] of the model, in the order of the file.
        target = target.view(-1, 2, rows_in_unit // 2, *target.shape[1:]).transpose(1, 2)
    num_units = target.shape[0] if target.dim() else 1
    unit_bytes = bytes_read(info, weight_slice) // num_units
    if extent.decode is not None:  # on a device the numbers take memory too, until they are in place
        unit_bytes = max(unit_bytes, _DECODED_BYTES * target.numel() // num_units)
    at_once = max(1, block_bytes // unit_bytes)
    for unit in range(0, num_units, at_once):
        end = min(unit + at_once, num_units)
        part = source
        if source:
            begin = source[0].start
            part = (slice(begin + unit * rows_in_unit, begin + end * rows_in_unit), *source[1:])
        runs = tuple(runs_of(extent.shape, part, offset=info.offset, item_bytes=extent.item_bytes))
        place = target[unit:end] if source else target
        if extent.decode is None:
            yield Piece(label, descriptor, runs, dtype, place)
        else:
            yield Piece(label, descriptor, runs, dtype, place, extent.decode)
