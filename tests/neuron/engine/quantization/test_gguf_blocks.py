"""Blocks of GGUF as numbers, against what the `gguf` package makes of them.

All 2,000 random blocks of each type, bit for bit, outside of CI:
`uv run --with gguf==0.19.0 python tests/neuron/engine/quantization/test_gguf_blocks.py`.
"""

from __future__ import annotations

import hashlib

import pytest
import torch
from neuron.checkpoint.block_types import BLOCK_TYPES, NATIVE_BITS
from neuron.engine.quantization.gguf_blocks import dequantize
from torch import Tensor

# SHA-256 of what `gguf.dequantize` of gguf 0.19.0 gives for `drawn(kind, 40)`, as float32.
DIGESTS: dict[str, str] = {
    "Q4_0": "266096e42d32554b54535f35b3fba9e762945b50278d16f73fdcbfb94b52e40e",
    "Q4_1": "ef11020c9d89320e1be60360cca47a2c4f33d452354315d3d06c24e8bdbac89b",
    "Q5_0": "cce27b2d8d1312ab499e318d99d2e33024634ca4dd8ff9472e0336888d374c28",
    "Q5_1": "b948f6b9123e49ccbe9682d5e47f33966ad2e65bc5a6782eab3c42c9441f06f5",
    "Q8_0": "1644e9290e1f0dbe7cf69cb283270dbb40f6a7d271dbbcdf62f690fdd9ae9f4e",
    "Q2_K": "61606668ab8669e4600c0719fd3935eac1cd478bba6adc119026e0c09c497262",
    "Q3_K": "3f4fe110d0d4e3aea42f36fccf0cf9edfb1236cea9a21b2ecc25b7661703295b",
    "Q4_K": "37b47102cbe2d0a5c1c84db7dce33636e9a39fc5784257185b4ba5c4ec145074",
    "Q5_K": "43538e8aa04d9355ec9eaaa5dd39a65a188691faa0bd02ee3b6a3a26f3f80fb4",
    "Q6_K": "abfc015125baa698d8677b8b13fd6ed3d3b94fafcf9653bdd4df17c07ecd8170",
    "IQ4_NL": "7341976ab4021e744489a217c098e11ba7c34342e3885e7e5bda86d842cf3ecd",
    "IQ4_XS": "19c0f32ff8f6c909f96b8d721c2992c8d6701bce1ff552f881e0242c149d0765",
    "MXFP4": "37e924663c89056f2c6aac6fd9d64fd5631919bc535d10bd30ba6293cb53927f",
    "NVFP4": "917002ae99bb42edaac0851aad7bcb37ad35c931acf7389597ab3da4e8a17a84",
}


def drawn(kind: str, rows: int, seed: int = 0) -> Tensor:
    """[rows, bytes of a block] uint8; exponents and scales that are no numbers are left out."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (rows, BLOCK_TYPES[kind].block_bytes), generator=generator, dtype=torch.uint8)
    found = dequantize(raw, kind)
    return raw[found.isfinite().all(dim=1)]


@pytest.mark.parametrize("kind", sorted(DIGESTS))
def test_numbers_are_those_of_the_reference_to_the_bit(kind: str) -> None:
    found = dequantize(drawn(kind, 40), kind)
    assert found.shape[0] > 20 and found.shape[1] == BLOCK_TYPES[kind].block_elements
    assert hashlib.sha256(found.numpy().tobytes()).hexdigest() == DIGESTS[kind]


@pytest.mark.parametrize(("kind", "dtype"), [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_floats_are_what_they_are(kind: str, dtype: torch.dtype) -> None:
    values = torch.randn(3, 8).to(dtype)
    assert torch.equal(dequantize(values.view(torch.uint8), kind), values.float())


def test_types_that_are_held_are_those_that_are_counted_so() -> None:
    assert set(NATIVE_BITS) <= set(DIGESTS)
    with pytest.raises(KeyError):
        dequantize(torch.zeros(1, 50, dtype=torch.uint8), "IQ1_S")


if __name__ == "__main__":
    import gguf
    import numpy as np

    for kind in DIGESTS:
        raw = drawn(kind, 2_000, seed=1)
        expected = gguf.dequantize(raw.numpy(), gguf.GGMLQuantizationType[kind]).astype(np.float32)
        same = np.array_equal(expected.view(np.uint32), dequantize(raw, kind).numpy().view(np.uint32))
        print(f"{kind}: {raw.shape[0]} blocks, {'equal to the bit' if same else 'DIFFERENT'}")
        digest = gguf.dequantize(drawn(kind, 40).numpy(), gguf.GGMLQuantizationType[kind]).astype(np.float32)
        assert hashlib.sha256(digest.tobytes()).hexdigest() == DIGESTS[kind]
        assert same
