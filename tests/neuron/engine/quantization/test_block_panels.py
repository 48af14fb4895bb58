# ruff: noqa: E402
"""Panels of ggml's blocks against the blocks dequantised."""

from __future__ import annotations

from tests.native import import_or_skip

import_or_skip()

import neuron_cpu
import pytest
import torch
from neuron.checkpoint.block_types import BLOCK_TYPES, NATIVE_BITS
from neuron.engine.quantization.block_panels import FORMATS, BlockPanels, pack_blocks, unit_of
from neuron.engine.quantization.gguf_blocks import dequantize
from torch import Tensor

from tests.neuron.engine.quantization.blocks import random_blocks


def rows_of(panels: BlockPanels, rows: Tensor) -> Tensor:
    out = torch.empty(len(rows), panels.num_in)
    neuron_cpu.gather_rows(
        panels.number, panels.data.data_ptr(), rows.data_ptr(), out.data_ptr(), len(rows), panels.num_in
    )
    return out


@pytest.mark.parametrize("kind", FORMATS)
def test_panels_hold_the_weight_to_the_bit_in_the_bytes_of_the_file(kind: str) -> None:
    raw = random_blocks(kind, 70, 768)
    expected, panels = dequantize(raw, kind), pack_blocks(kind, raw)
    assert torch.equal(rows_of(panels, torch.arange(70)), expected)
    assert torch.equal(rows_of(panels, torch.tensor([69, 3, 3, 32])), expected[[69, 3, 3, 32]])
    assert panels.data.shape == (3, 768 // panels.unit * neuron_cpu.unit_bytes(panels.number))
    assert panels.data.numel() / (96 * 768) <= 1.03 * BLOCK_TYPES[kind].bits / 8


@pytest.mark.parametrize("kind", FORMATS)
def test_a_cut_at_any_multiple_of_32_is_exact(kind: str) -> None:
    raw = random_blocks(kind, 40, 768)
    expected = dequantize(raw, kind)
    for first, last in ((0, 32), (32, 352), (128, 768), (256, 512)):
        panels = pack_blocks(kind, raw, columns=(first, last))
        assert torch.equal(rows_of(panels, torch.arange(40)), expected[:, first:last])
    with pytest.raises(ValueError, match="cut a group of 32"):
        unit_of(kind, 16, 64)


@pytest.mark.parametrize("kind", FORMATS)
def test_products_are_those_of_the_dequantised_weight_in_any_batch(kind: str) -> None:
    raw = random_blocks(kind, 128, 512)
    weight, panels = dequantize(raw, kind), pack_blocks(kind, raw)

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
    assert set(NATIVE_BITS) == set(FORMATS), "those that memory is counted by"
    for number in (15 + 16 * 32, 0, 16 * 17):
        with pytest.raises(ValueError, match="no format of blocks"):
            neuron_cpu.unit_bytes(number)
