"""Blocks of ggml's types as files have them: random codes with scales that are ordinary numbers."""

from __future__ import annotations

import torch
from neuron.checkpoint.block_types import BLOCK_TYPES
from torch import Tensor

SCALES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip
"""Where float16 numbers lie in a block."""


def random_blocks(kind: str, rows: int, columns: int, seed: int = 0) -> Tensor:
    """[rows, bytes of a row] uint8."""
    generator = torch.Generator().manual_seed(seed)
    block = BLOCK_TYPES[kind]
    raw = torch.randint(
        0, 256, (rows, columns // block.block_elements, block.block_bytes), generator=generator, dtype=torch.uint8
    )
    for at in SCALES[kind]:
        scales = torch.randint(-2000, 2000, raw.shape[:2], generator=generator).mul(2.0**-18).half()
        raw[..., at : at + 2] = scales.unsqueeze(-1).contiguous().view(torch.uint8)
    return raw.reshape(rows, -1)
