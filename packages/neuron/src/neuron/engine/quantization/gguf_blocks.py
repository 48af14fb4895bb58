"""GGUF blocks to float32, in torch operations that run alike on a CPU and on a device.

A block is a few bytes of scales beside the codes of 32, 64 or 256 neighbours in a row. The layouts are the structs of
`ggml-common.h`, the arithmetic is that of `dequantize_row_*` of ggml 0.25: products and sums in float32, each rounded
once, so the results are those of `gguf.dequantize` to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor

from neuron.checkpoint.block_types import BLOCK_TYPES

_UNPACKED: Mapping[str, torch.dtype] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
}
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# Twice the values of a float of four bits (e2m1).
_FP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def is_decoded(kind: str) -> bool:
    """Whether there are numbers for blocks of a type: those of the grids of IQ1 to IQ3 are not read yet."""
    return kind in _UNPACKED or kind in _DECODERS


def dequantize(blocks: Tensor, kind: str) -> Tensor:
    """Rows of blocks as numbers. blocks: [rows, bytes of a row] uint8, contiguous; kind: the block type's name.

    Returns [rows, elements of a row] float32 (of F64 float64) on the same device. Raises `KeyError` for a type that no
    weight is read from.
    """
    block_type = BLOCK_TYPES[kind]
    if kind in _UNPACKED:
        return blocks.view(_UNPACKED[kind]).to(torch.float64 if kind == "F64" else torch.float32)
    rows = blocks.shape[0]
    return _DECODERS[kind](blocks.view(-1, block_type.block_bytes)).view(rows, -1)


# ---------------------------------------------------------------- parts of blocks: [blocks, bytes] uint8 each


def _half(block: Tensor, at: int) -> Tensor:
    """A float16: [blocks, 1] float32."""
    return block[:, at : at + 2].contiguous().view(torch.float16).float()


def _word(block: Tensor, at: int, count: int, dtype: torch.dtype) -> Tensor:
    """Integers of several bytes: [blocks, count]."""
    return block[:, at : at + count * dtype.itemsize].contiguous().view(dtype)


def _shifted(codes: Tensor, shifts: tuple[int, ...], mask: int) -> Tensor:
    """Fields of bytes, those of one shift together: [blocks, groups, n] -> [blocks, groups, shifts, n]."""
    return torch.stack([(codes >> shift) & mask for shift in shifts], dim=-2)


def _nibbles(block: Tensor, at: int, half: int = 16, groups: int = 1) -> Tensor:
    """Groups of `half` bytes whose low nibbles come before their high ones: [blocks, groups, 2 * half]."""
    codes = block[:, at : at + groups * half].reshape(-1, groups, half)
    return torch.cat((codes & 15, codes >> 4), dim=-1)


def _fifth_bits(block: Tensor, at: int) -> Tensor:
    """Bit e of 32 for element e, as 0 or 16: [blocks, 32]."""
    bits = _shifted(block[:, at : at + 4].unsqueeze(-1), tuple(range(8)), 1)
    return bits.reshape(-1, 32) << 4


@cache
def _table(values: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


def _looked_up(codes: Tensor, values: tuple[int, ...]) -> Tensor:
    return _table(values, codes.device)[codes.int()]


def _scaled(scale: Tensor, codes: Tensor) -> Tensor:
    """scale: [blocks, groups], float32; codes: [blocks, groups, n]. Returns their products, [blocks, groups, n]."""
    return codes.float().mul_(scale.unsqueeze(-1))


# ---------------------------------------------------------------- blocks of 32


def _q4_0(block: Tensor) -> Tensor:
    return (_nibbles(block, 2)[:, 0].float() - 8).mul_(_half(block, 0))


def _q4_1(block: Tensor) -> Tensor:
    return _nibbles(block, 4)[:, 0].float().mul_(_half(block, 0)).add_(_half(block, 2))


def _q5_0(block: Tensor) -> Tensor:
    codes = _nibbles(block, 6)[:, 0] | _fifth_bits(block, 2)
    return (codes.float() - 16).mul_(_half(block, 0))


def _q5_1(block: Tensor) -> Tensor:
    codes = _nibbles(block, 8)[:, 0] | _fifth_bits(block, 4)
    return codes.float().mul_(_half(block, 0)).add_(_half(block, 2))


def _q8_0(block: Tensor) -> Tensor:
    return block[:, 2:].view(torch.int8).float().mul_(_half(block, 0))


def _iq4_nl(block: Tensor) -> Tensor:
    return _looked_up(_nibbles(block, 2)[:, 0], _IQ4).mul_(_half(block, 0))


def _mxfp4(block: Tensor) -> Tensor:
    """The scale is 2^(e - 128): a half of what the exponent says, as the table holds twice the values."""
    exponent = block[:, :1].int()
    bits = torch.where(exponent < 2, 0x00200000 << exponent.clamp(max=1), (exponent - 1) << 23)
    return _looked_up(_nibbles(block, 1)[:, 0], _FP4).mul_(bits.view(torch.float32))


def _nvfp4(block: Tensor) -> Tensor:
    """Four groups of 16, each with a scale of 8 bits (e4m3 without a sign)."""
    bits = block[:, :4].int() & 0x7F
    exponent, mantissa = bits >> 3, (bits & 7).float()
    normal = (1 + mantissa / 8) * torch.exp2((exponent - 7).float())
    scale = torch.where(exponent == 0, mantissa * 2.0**-9, normal) * 0.5
    scale = torch.where(block[:, :4] == 0x7F, 0.0, scale)
    return _looked_up(_nibbles(block, 4, 8, 4), _FP4).mul_(scale.unsqueeze(-1))


# ---------------------------------------------------------------- blocks of 256


def _q2_k(block: Tensor) -> Tensor:
    codes = _shifted(block[:, 16:80].reshape(-1, 2, 32), (0, 2, 4, 6), 3).view(-1, 16, 16)
    scales = block[:, :16]
    scale = _half(block, 80) * (scales & 15).float()
    least = _half(block, 82) * (scales >> 4).float()
    return _scaled(scale, codes).sub_(least.unsqueeze(-1))


def _q3_k(block: Tensor) -> Tensor:
    low = _shifted(block[:, 32:96].reshape(-1, 2, 32), (0, 2, 4, 6), 3).view(-1, 16, 16)
    high = _shifted(block[:, None, :32], tuple(range(8)), 1).view(-1, 16, 16)
    packed = block[:, 96:108]
    scales = _shifted(packed[:, None, :8], (0, 4), 15).view(-1, 16)
    scales = scales | (_shifted(packed[:, None, 8:], (0, 2, 4, 6), 3).view(-1, 16) << 4)
    scale = _half(block, 108) * (scales.float() - 32)
    # A bit that is not set takes 4 off.
    return _scaled(scale, (low | (high << 2)).float() - 4)


def _scales_and_mins(block: Tensor) -> tuple[Tensor, Tensor]:
    """Of Q4_K and Q5_K: eight scales and eight minima of 6 bits in 12 bytes, times the block's: [blocks, 8] each."""
    first, second, mixed = block[:, 4:8], block[:, 8:12], block[:, 12:16]
    scales = torch.cat((first & 63, (mixed & 15) | ((first >> 2) & 48)), dim=-1)
    mins = torch.cat((second & 63, (mixed >> 4) | ((second >> 2) & 48)), dim=-1)
    return _half(block, 0) * scales.float(), _half(block, 2) * mins.float()


def _q4_k(block: Tensor) -> Tensor:
    scale, least = _scales_and_mins(block)
    return _scaled(scale, _nibbles(block, 16, 32, 4).view(-1, 8, 32)).sub_(least.unsqueeze(-1))


def _q5_k(block: Tensor) -> Tensor:
    scale, least = _scales_and_mins(block)
    high = _shifted(block[:, None, 16:48], tuple(range(8)), 1).view(-1, 8, 32)
    codes = _nibbles(block, 48, 32, 4).view(-1, 8, 32) | (high << 4)
    return _scaled(scale, codes).sub_(least.unsqueeze(-1))


def _q6_k(block: Tensor) -> Tensor:
    low = block[:, :128].reshape(-1, 2, 64)
    low = torch.cat((low & 15, low >> 4), dim=-1).view(-1, 16, 16)
    high = _shifted(block[:, 128:192].reshape(-1, 2, 32), (0, 2, 4, 6), 3).view(-1, 16, 16)
    scale = _half(block, 208) * block[:, 192:208].contiguous().view(torch.int8).float()
    return _scaled(scale, (low | (high << 4)).float() - 32)


def _iq4_xs(block: Tensor) -> Tensor:
    high = _word(block, 2, 1, torch.int16).int()
    low = block[:, 4:8]
    scales = torch.stack((low & 15, low >> 4), dim=-1).view(-1, 8).int()
    scales = scales | torch.cat([((high >> 2 * index) & 3) << 4 for index in range(8)], dim=-1)
    scale = _half(block, 0) * (scales - 32).float()
    return _looked_up(_nibbles(block, 8, 16, 8), _IQ4).mul_(scale.unsqueeze(-1))


_DECODERS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
    "NVFP4": _nvfp4,
}
