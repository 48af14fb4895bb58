"""Tile shapes of matrix products: by the weight's shape and the chip, chosen without measuring (see `tiling`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neuron.engine.kernels import KernelUnsupported
from neuron.engine.kernels.attention.tiling import HOPPER_SHARED_MEMORY, Chip, power_of_two

# Of a program that streams a weight through registers: 16-byte loads that each thread has under way.
_LOADS_IN_FLIGHT = 8
_THREADS = 128
# Programs per multiprocessor that cover the memory's latency together.
_VECTOR_PROGRAMS = 6
_TILE_PROGRAMS = 2
_MIN_SEGMENT = 512
# The invariant product is cut as if for this many programs, on every chip: its bits do not depend on the chip's size.
_INVARIANT_PROGRAMS = 264


@dataclass(frozen=True, slots=True)
class VectorTiling:
    """block_n rows of the weight per program, block_k elements of each per load, `unroll` loads before a branch."""

    block_n: int
    block_k: int
    unroll: int
    num_warps: int


@dataclass(frozen=True, slots=True)
class TileTiling:
    """block_n rows of the weight against block_m rows of x, in steps of block_k. K is cut into `num_segments` runs of
    segment_k elements, whose sums are added in order."""

    block_m: int
    block_n: int
    block_k: int
    segment_k: int
    num_segments: int
    num_warps: int
    num_stages: int


def check_operands(x: Tensor, weight: Tensor, *, max_rows: int | None, gated: bool) -> int:
    """The number of outputs per row. Raises `KernelUnsupported` for what the kernels do not cover."""
    if max_rows is not None and x.shape[0] > max_rows:
        raise KernelUnsupported(f"{x.shape[0]} rows: this kernel takes at most {max_rows}")
    if x.dim() != 2 or x.shape[1] != weight.shape[1] or x.dtype != weight.dtype:
        raise KernelUnsupported(
            f"x {list(x.shape)} {x.dtype} does not fit the weight {list(weight.shape)} {weight.dtype}"
        )
    if (x.numel() and x.stride(1) != 1) or weight.stride(1) != 1:
        raise KernelUnsupported(f"rows must be contiguous, got strides {x.stride()} and {weight.stride()}")
    if gated and weight.shape[0] % 2:
        raise KernelUnsupported(f"gate and up must be equally long, the weight has {weight.shape[0]} rows")
    return weight.shape[0] // 2 if gated else weight.shape[0]


def vector_tiling(chip: Chip, *, num_out: int, k: int, rows: int, gated: bool, itemsize: int) -> VectorTiling:
    """Of `vector_linear`: as many rows of the weight per program as still leave programs enough for the device.

    Sums take block_n * rows registers per element of a load: for several rows of x there are fewer of the weight.
    """
    per_load = 16 // itemsize
    block_k = min(_THREADS * per_load, max(power_of_two(k), 32 * per_load))
    block_n = max(_LOADS_IN_FLIGHT // rows, 1)
    while block_n > 1 and num_out < block_n * _VECTOR_PROGRAMS * chip.num_multiprocessors:
        block_n //= 2
    unroll = max(min(_LOADS_IN_FLIGHT // block_n, -(-k // block_k)), 1)
    return VectorTiling(block_n, block_k, unroll, num_warps=max(block_k // (32 * per_load), 1))


def _segments(num_tiles: int, k: int, block_k: int, programs: int) -> tuple[int, int]:
    """(elements per segment, number of segments): as many as fill `programs`, none shorter than 512 elements."""
    wanted = max(min(programs // num_tiles, k // _MIN_SEGMENT), 1)
    segment = -(-k // wanted)
    segment = -(-segment // block_k) * block_k
    return segment, -(-k // segment)


def split_tiling(chip: Chip, *, num_out: int, k: int, dtype: torch.dtype) -> TileTiling:
    """Of `split_linear`: narrow tiles of the weight, deep stages, K cut until the device is full once."""
    block_n, block_k, num_warps, num_stages = 64, 128, 4, 4
    if dtype == torch.float32:
        block_n, block_k, num_stages = 32, 64, 3
    elif chip.shared_memory < HOPPER_SHARED_MEMORY:
        num_stages = 3
    block_k = min(block_k, max(power_of_two(k), 16))
    segment, count = _segments(-(-num_out // block_n), k, block_k, _TILE_PROGRAMS * chip.num_multiprocessors)
    return TileTiling(16, block_n, block_k, segment, count, num_warps, num_stages)


def invariant_tiling(*, num_out: int, k: int, dtype: torch.dtype) -> TileTiling:
    """Of `invariant_linear`: one shape for every number of rows and every chip."""
    block_m, block_n, block_k, num_stages = 64, 128, 64, 4
    if dtype == torch.float32:
        block_m, block_n, block_k, num_stages = 32, 32, 32, 3
    block_k = min(block_k, max(power_of_two(k), 16))
    segment, count = _segments(-(-num_out // block_n), k, block_k, _INVARIANT_PROGRAMS)
    return TileTiling(block_m, block_n, block_k, segment, count, 4, num_stages)
