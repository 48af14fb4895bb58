"""Element types of GGUF tensors: in blocks of how many elements, of how many bytes, they are stored.

Source: `ggml.h` (`enum ggml_type`) and `ggml-common.h` (the structs of blocks) of ggml 0.25.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BlockType:
    """How the elements of a row are stored. name: the format's own, in capitals; number: `ggml_type` in a file.

    block_elements: neighbours along a row that are stored together, in block_bytes. A row is a whole number of blocks.
    """

    name: str
    number: int
    block_elements: int
    block_bytes: int

    @property
    def bits(self) -> float:
        """Of an element, its share of scales included."""
        return self.block_bytes * 8 / self.block_elements


_TYPES = (
    BlockType("F32", 0, 1, 4),
    BlockType("F16", 1, 1, 2),
    BlockType("BF16", 30, 1, 2),
    BlockType("F64", 28, 1, 8),
    BlockType("Q4_0", 2, 32, 18),
    BlockType("Q4_1", 3, 32, 20),
    BlockType("Q5_0", 6, 32, 22),
    BlockType("Q5_1", 7, 32, 24),
    BlockType("Q8_0", 8, 32, 34),
    BlockType("Q2_K", 10, 256, 84),
    BlockType("Q3_K", 11, 256, 110),
    BlockType("Q4_K", 12, 256, 144),
    BlockType("Q5_K", 13, 256, 176),
    BlockType("Q6_K", 14, 256, 210),
    BlockType("IQ2_XXS", 16, 256, 66),
    BlockType("IQ2_XS", 17, 256, 74),
    BlockType("IQ3_XXS", 18, 256, 98),
    BlockType("IQ1_S", 19, 256, 50),
    BlockType("IQ4_NL", 20, 32, 18),
    BlockType("IQ3_S", 21, 256, 110),
    BlockType("IQ2_S", 22, 256, 82),
    BlockType("IQ4_XS", 23, 256, 136),
    BlockType("IQ1_M", 29, 256, 56),
    BlockType("MXFP4", 39, 32, 17),
    BlockType("NVFP4", 40, 64, 36),
)

BLOCK_TYPES: Mapping[str, BlockType] = {kind.name: kind for kind in _TYPES}
"""By name: the types that are read."""

TYPE_OF_NUMBER: Mapping[int, BlockType] = {kind.number: kind for kind in _TYPES}

NATIVE_BITS: Mapping[str, float] = {
    **{name: BLOCK_TYPES[name].bits for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q6_K")},
    "Q4_K": 4.625,
    "Q5_K": 5.625,
}
"""Types that the native CPU kernels multiply as they are stored, and the bits of an element as it is held: scales of
six bits get eight."""

REFUSED_TYPES: Mapping[int, str] = {
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    9: "Q8_1",
    15: "Q8_K",
    34: "TQ1_0",
    35: "TQ2_0",
    41: "Q1_0",
}
"""Types that files may name and no weight is read from: integers, formats of activations, codes of one or two bits."""
