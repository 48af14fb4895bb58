"""Tile shapes of the attention kernels: constants by head size, dtype and chip class, chosen without measuring.

They are data and not `triton.autotune`: tuning at run time would compile in steady state and would make the order of
additions, and so the bits of a result, depend on the machine's load. `tests/bench/gpu.py` measures them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

# Shared memory per block tells the chip classes apart: 99 KiB (sm_86, sm_89, sm_120), 163 KiB (A100), 227 KiB (Hopper
# and data-centre Blackwell).
_LARGE_SHARED_MEMORY = 160 * 1024
HOPPER_SHARED_MEMORY = 200 * 1024
# K and V tiles hang on a load of page numbers, so Triton's pipeliner needs two stages per level: 5 stages keep two
# tiles of each in flight, 3 keep one.
_DEEP_PIPELINE = 5
_SHALLOW_PIPELINE = 3
# Without a device to ask (interpreter): enough programs to have several, few enough to stay fast.
_INTERPRETER_PROGRAMS = 6


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a launch is cut.

    block_q: query tokens per block; block_m: padded rows, a power of two >= 16 and >= block_q * group; block_n:
    context tokens per tile. A context is cut into segments of at least min_segment_tokens, at most max_segments (a
    power of two) of them. skip_masks: tiles that every row sees whole take a loop without masks. max_programs: size
    of the persistent grid; a large number gives one program per item.
    """

    block_q: int
    block_m: int
    block_n: int
    min_segment_tokens: int
    max_segments: int
    num_warps: int
    num_stages: int
    skip_masks: bool
    max_programs: int


@dataclass(frozen=True, slots=True)
class Chip:
    """What of a device decides tile shapes. shared_memory: bytes one block may opt in to."""

    num_multiprocessors: int
    shared_memory: int


@lru_cache(maxsize=16)
def chip_of(device: torch.device) -> Chip:
    """The chip behind a CUDA device; a small stand-in for the CPU, where kernels run in Triton's interpreter."""
    if device.type != "cuda":
        return Chip(num_multiprocessors=_INTERPRETER_PROGRAMS, shared_memory=228 * 1024)
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", 99 * 1024)
    return Chip(num_multiprocessors=properties.multi_processor_count, shared_memory=shared)


def power_of_two(value: int) -> int:
    """The smallest one that is not less."""
    return 1 << max(value - 1, 0).bit_length()


def decode_tiling(chip: Chip, *, head_dim: int, group: int, dtype: torch.dtype, query_tokens: int = 1) -> Tiling:
    """Tiles for sequences of at most `query_tokens` query tokens: bound by the stream of K and V.

    One program streams one segment for one KV head; a segment of 128 tokens at head size 128 is 64 KiB, large enough
    to keep loads in flight and small enough that one sequence of 640 tokens with 8 KV heads occupies 40 programs.
    """
    roomy = chip.shared_memory >= _LARGE_SHARED_MEMORY
    block_d = power_of_two(head_dim)
    tile_bytes = 64 * block_d * dtype.itemsize
    block_n = 64 if tile_bytes <= 16 * 1024 else (32 if tile_bytes <= 32 * 1024 else 16)
    return Tiling(
        block_q=query_tokens,
        block_m=max(16, power_of_two(query_tokens * group)),
        block_n=block_n,
        min_segment_tokens=128,
        max_segments=32,
        num_warps=4,
        num_stages=_DEEP_PIPELINE if roomy else _SHALLOW_PIPELINE,
        skip_masks=False,
        max_programs=chip.num_multiprocessors * (3 if roomy else 2),
    )


def prefill_tiling(chip: Chip, *, head_dim: int, group: int, dtype: torch.dtype) -> Tiling:
    """Tiles for prompt chunks: bound by the tensor cores, so blocks are tall and full tiles take no masks.

    Blocks are scheduled by the hardware, the longest contexts first (one program per item). A short chunk over a long
    cached prefix is cut along the context too, into at most 16 segments.
    """
    block_d = power_of_two(head_dim)
    if dtype == torch.float32:
        # No tensor cores in IEEE fp32: small tiles keep the accumulators in registers.
        block_m, block_n, num_warps, num_stages = 32, 32 if block_d <= 128 else 16, 4, 1
    elif block_d <= 128:
        block_m, block_n, num_warps, num_stages = 128, 64, 8, _DEEP_PIPELINE
    elif chip.shared_memory >= HOPPER_SHARED_MEMORY:
        block_m, block_n, num_warps, num_stages = 128, 32, 8, _DEEP_PIPELINE
    else:
        block_m, block_n, num_warps, num_stages = 64, 32, 4, _DEEP_PIPELINE
    block_m = max(block_m, power_of_two(group))
    return Tiling(
        block_q=max(block_m // group, 1),
        block_m=block_m,
        block_n=block_n,
        min_segment_tokens=512,
        max_segments=16,
        num_warps=num_warps,
        num_stages=num_stages,
        skip_masks=True,
        max_programs=2**30,
    )


def invariant_tiling(chip: Chip, *, head_dim: int, group: int, dtype: torch.dtype) -> Tiling:
    """Tiles for decodes and prompts alike, without cutting the context: one order of additions for every token.

    Blocks are lower than a prompt would like and higher than a decode needs. A long context of a single sequence
    occupies no more programs than it has KV heads: what is paid for a result that no neighbour and no chunk changes.
    """
    block_d = power_of_two(head_dim)
    block_m, block_n, num_stages = 64, 64 if block_d <= 128 else 32, _DEEP_PIPELINE
    if dtype == torch.float32:
        block_m, block_n, num_stages = 32, 32 if block_d <= 128 else 16, 1
    elif chip.shared_memory < _LARGE_SHARED_MEMORY:
        num_stages = _SHALLOW_PIPELINE
    block_m = max(block_m, power_of_two(group))
    return Tiling(
        block_q=max(block_m // group, 1),
        block_m=block_m,
        block_n=block_n,
        min_segment_tokens=2**30,
        max_segments=1,
        num_warps=4,
        num_stages=num_stages,
        skip_masks=False,
        max_programs=2**30,
    )
