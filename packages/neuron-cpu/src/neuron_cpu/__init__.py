"""Native CPU kernels of the cortex neuron. Addresses and sizes in: whoever calls owns the memory and has checked it.

Nothing here knows torch; `neuron.engine` calls it in `gemm.native`, `kernels.native`, `attention.attention_native` and
`quantization`.
Weights are kept as panels of `PANEL` outputs, each [in, PANEL] in the checkpoint's own element type, and are multiplied
in float32, one output's sum in the order of `in` whatever the number of rows: a row's result has the same bits in any
batch.
"""

from __future__ import annotations

from _neuron_cpu import (
    attention,
    gather_rows,
    instructions,
    linear,
    num_threads,
    pack,
    pack_blocks,
    rms_norm,
    rotate_and_write,
    set_num_threads,
    unit_bytes,
)

__all__ = [
    "BFLOAT16",
    "BLOCKS",
    "FLOAT16",
    "FLOAT32",
    "PANEL",
    "attention",
    "gather_rows",
    "instructions",
    "linear",
    "num_threads",
    "pack",
    "pack_blocks",
    "rms_norm",
    "rotate_and_write",
    "set_num_threads",
    "unit_bytes",
]

FLOAT32, BFLOAT16, FLOAT16, BLOCKS = 0, 1, 2, 3
"""Element types, as the functions take them. Weights of `BLOCKS` have a format beside: its number, plus 16 times the
positions of a unit."""

PANEL = 32
"""Outputs of a panel. A weight has panels for whole ones only; rows beyond its outputs are the caller's padding."""
