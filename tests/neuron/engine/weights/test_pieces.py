"""Slices of tensors in pieces: bytes of the file, places in the parameter, and blocks between them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from neuron.engine.quantization.gguf_blocks import dequantize
from neuron.engine.weight_slices import WeightSlice
from neuron.engine.weights.pieces import bytes_read, is_in_blocks, pieces_of
from neuron.engine.weights.pipeline import Piece
from neuron.engine.weights.safetensors_reader import TensorInfo
from torch import Tensor

from tests.neuron.engine.quantization.blocks import random_blocks
from tests.neuron.engine.weights.gguf_models import interleaved

ROWS, COLUMNS = 12, 512


def info(dtype: str, num_bytes: int, *, heads: int = 0) -> TensorInfo:
    return TensorInfo("w", dtype, (ROWS, COLUMNS), Path("m.gguf"), 0, num_bytes, heads)


def weight_slice(rows: slice, columns: slice, *, stored: str | None = None) -> WeightSlice:
    return WeightSlice("weight", (ROWS, COLUMNS), (rows, columns), "weight", (), stored=stored)


def filled(pieces: list[Piece], data: bytes) -> None:
    """What the reading threads and a transfer into host memory do."""
    for piece in pieces:
        parts = [
            data[runs.offset + number * runs.pitch :][: runs.run_bytes]
            for runs in piece.runs
            for number in range(runs.num_runs)
        ]
        raw = torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)
        staged = piece.staged(raw)
        piece.target.copy_(staged if piece.decode is None else piece.decode(staged).view(piece.target.shape))


@pytest.mark.parametrize(("rows", "columns"), [(slice(0, 12), slice(0, 512)), (slice(3, 9), slice(70, 300))])
@pytest.mark.parametrize("block_bytes", [1, 1_000, 10**6])
@pytest.mark.parametrize("kind", ["Q4_K", "Q8_0"])
def test_blocks_are_decoded_and_cut(kind: str, rows: slice, columns: slice, block_bytes: int) -> None:
    raw = random_blocks(kind, ROWS, COLUMNS)
    part, target = weight_slice(rows, columns), torch.zeros(rows.stop - rows.start, columns.stop - columns.start)
    tensor = info(kind, raw.numel())
    pieces = list(pieces_of(tensor, part, target, descriptor=0, dtype=torch.uint8, block_bytes=block_bytes))
    assert len(pieces) == (target.shape[0] if block_bytes == 1 else len(pieces))
    assert sum(piece.num_bytes for piece in pieces) == bytes_read(tensor, part) <= raw.numel()
    filled(pieces, raw.numpy().tobytes())
    assert torch.equal(target, dequantize(raw, kind)[rows, columns])


@pytest.mark.parametrize("block_bytes", [1, 10**6])
@pytest.mark.parametrize("kind", ["Q8_0", "F32", "stored"])
def test_rows_in_pairs_go_where_the_model_has_them(kind: str, block_bytes: int) -> None:
    """Of three heads of four rows, the last two."""
    is_stored = kind == "stored"
    kind = "Q8_0" if is_stored else kind
    model: Tensor = random_blocks("Q8_0", ROWS, COLUMNS) if kind == "Q8_0" else torch.randn(ROWS, COLUMNS)
    data = interleaved(model, 3).contiguous().view(torch.uint8).numpy().tobytes()
    part = weight_slice(slice(4, 12), slice(0, COLUMNS), stored="Q8_0" if is_stored else None)
    expected = dequantize(model, "Q8_0") if kind == "Q8_0" and not is_stored else model
    target = torch.zeros(8, expected.shape[1], dtype=expected.dtype)
    dtype = torch.float32 if kind == "F32" else torch.uint8
    pieces = list(
        pieces_of(info(kind, len(data), heads=3), part, target, descriptor=0, dtype=dtype, block_bytes=block_bytes)
    )
    filled(pieces, data)
    assert torch.equal(target, expected[4:])
    assert not any(piece.is_direct for piece in pieces)


def test_what_is_in_blocks() -> None:
    assert [is_in_blocks(dtype) for dtype in ("Q4_K", "F16", "BF16", "F8_E4M3")] == [True, False, False, False]
