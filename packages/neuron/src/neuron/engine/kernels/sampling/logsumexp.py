"""The logarithm of the sum of exponentials of each row of logits. Torch twin: `torch.logsumexp`.

One program per row, in one order: a library divides rows among blocks by how many there are, and the last bit of a
log-probability would depend on that.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disallow-untyped-calls=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from neuron.engine.kernels import KernelUnsupported

_BLOCK = 4096


@triton.jit
def log_total_kernel(out, logits, stride_row, VOCAB_SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    # Each lane keeps a maximum and a sum of its own; they meet once, at the end.
    maximum = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for begin in range(0, VOCAB_SIZE, BLOCK):
        value = tl.load(
            logits + row * stride_row + begin + column, mask=begin + column < VOCAB_SIZE, other=float("-inf")
        ).to(tl.float32)
        larger = tl.maximum(maximum, value)
        # -inf - -inf would be NaN.
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp(maximum - shift) + tl.exp(value - shift)
        maximum = larger
    best = tl.max(maximum, axis=0)
    shift = tl.where(best == float("-inf"), 0.0, best)
    tl.store(out + row, shift + tl.log(tl.sum(total * tl.exp(maximum - shift), axis=0)))


def log_totals(logits: Tensor) -> Tensor:
    """[R, V] fp32, bf16 or fp16, elements of a row contiguous -> [R, 1] fp32. Raises `KernelUnsupported`."""
    num_rows, vocab_size = logits.shape
    if logits.stride(1) != 1:
        raise KernelUnsupported(f"logits must be contiguous in a row, got strides {logits.stride()}")
    out = torch.empty(num_rows, 1, dtype=torch.float32, device=logits.device)
    if num_rows:
        block = min(_BLOCK, triton.next_power_of_2(vocab_size))
        log_total_kernel[(num_rows,)](out, logits, logits.stride(0), VOCAB_SIZE=vocab_size, BLOCK=block, num_warps=8)
    return out
