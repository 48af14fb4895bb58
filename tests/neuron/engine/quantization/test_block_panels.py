"""Panels of ggml's blocks against the blocks dequantised, and those against what the `gguf` package makes of them."""

from __future__ import annotations

import hashlib

import neuron_cpu
import pytest
import torch
from neuron.checkpoint.gguf.block_types import BLOCK_TYPES
from neuron.engine.quantization.block_panels import FORMATS, BlockPanels, dequantised, pack_blocks, unit_of
from torch import Tensor

from tests.neuron.engine.quantization.blocks import random_blocks

# SHA-256 of what `gguf.dequantize` of gguf 0.19.0 gives for random_blocks(kind, 50, 512), as float32.
DIGESTS: dict[str, str] = {
    "Q4_0": "ec8f29d62dc755cdce47020a2d5d774d4fe9403f6ce8b4cdd31a81ffd6bcf9b2",
    "Q4_1": "c8f28c96b384e8ef5b4f8b7a830e25687d680527bd7ea9f7f4fdcb7e53316124",
    "Q5_0": "e059bd136c4367fd8e71d12b00c11abac34e814eea842aa2937505004c02f2b7",
    "Q5_1": "96e61b07e118a945f5945782565e00f8db59571a5965021dd4709d9087a65ac7",
    "Q8_0": "ab98f2b45526d4f0a1323a9bd7c3caa301f55c647c1709d5e650b39ef5b313f4",
    "Q4_K": "740195718cf4a727e2aa4132212e7853ff54f3f6f3fdfc88e74916bb52fdbda9",
    "Q5_K": "a0b2cfbf5777538800406cd2a9de1b4f0c976a68ecc3be1d58f90c55493443f5",
    "Q6_K": "949a84ac548563589688f6c9b614e84eaf9e2b42a2c2fb91674b8f7fe3c74e3b",
}


def rows_of(panels: BlockPanels, rows: Tensor) -> Tensor:
    out = torch.empty(len(rows), panels.num_in)
    neuron_cpu.gather_rows(
        panels.number, panels.data.data_ptr(), rows.data_ptr(), out.data_ptr(), len(rows), panels.num_in
    )
    return out


@pytest.mark.parametrize("kind", FORMATS)
def test_dequantised_blocks_are_those_of_the_reference(kind: str) -> None:
    found = dequantised(kind, random_blocks(kind, 50, 512))
    assert hashlib.sha256(found.numpy().tobytes()).hexdigest() == DIGESTS[kind]


@pytest.mark.parametrize("kind", FORMATS)
def test_panels_hold_the_weight_to_the_bit_in_the_bytes_of_the_file(kind: str) -> None:
    raw = random_blocks(kind, 70, 768)
    expected, panels = dequantised(kind, raw), pack_blocks(kind, raw)
    assert torch.equal(rows_of(panels, torch.arange(70)), expected)
    assert torch.equal(rows_of(panels, torch.tensor([69, 3, 3, 32])), expected[[69, 3, 3, 32]])
    assert panels.data.shape == (3, 768 // panels.unit * neuron_cpu.unit_bytes(panels.number))
    assert panels.data.numel() / (96 * 768) <= 1.03 * BLOCK_TYPES[kind].bits / 8


@pytest.mark.parametrize("kind", FORMATS)
def test_a_cut_at_any_multiple_of_32_is_exact(kind: str) -> None:
    raw = random_blocks(kind, 40, 768)
    expected = dequantised(kind, raw)
    for first, last in ((0, 32), (32, 352), (128, 768), (256, 512)):
        panels = pack_blocks(kind, raw, columns=(first, last))
        assert torch.equal(rows_of(panels, torch.arange(40)), expected[:, first:last])
    with pytest.raises(ValueError, match="cut a group of 32"):
        unit_of(kind, 16, 64)


@pytest.mark.parametrize("kind", FORMATS)
def test_products_are_those_of_the_dequantised_weight_in_any_batch(kind: str) -> None:
    raw = random_blocks(kind, 128, 512)
    weight, panels = dequantised(kind, raw), pack_blocks(kind, raw)

    def product(x: Tensor, *, is_gated: bool = False) -> Tensor:
        out = torch.empty(x.shape[0], 64 if is_gated else 128)
        neuron_cpu.linear(
            neuron_cpu.FLOAT32, neuron_cpu.BLOCKS, neuron_cpu.FLOAT32, x.data_ptr(), panels.data.data_ptr(), 0,
            out.data_ptr(), x.shape[0], 512, 128, x.stride(0), out.shape[1], is_gated, panels.number,
        )  # fmt: skip
        return out

    x = torch.randn(19, 512, generator=torch.Generator().manual_seed(1))
    result = product(x)
    torch.testing.assert_close(result.double(), x.double() @ weight.double().T, atol=1e-4, rtol=1e-4)
    assert torch.equal(torch.cat([product(row) for row in x.split(1)]), result)
    gate, up = result.chunk(2, dim=-1)
    torch.testing.assert_close(product(x, is_gated=True), torch.nn.functional.silu(gate) * up, atol=1e-4, rtol=1e-4)


def test_a_format_that_does_not_exist_is_refused() -> None:
    for number in (15 + 16 * 32, 0, 16 * 17):
        with pytest.raises(ValueError, match="no format of blocks"):
            neuron_cpu.unit_bytes(number)
