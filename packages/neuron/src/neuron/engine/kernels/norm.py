"""RMSNorm, and the residual addition that precedes it. Torch twins of the same names: `neuron.engine.layers.norm`.

One program per row: the row stays in registers between the statistics and the scaling, so that it is read once.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disallow-untyped-calls=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from neuron.engine.kernels import KernelUnsupported

_MAX_SIZE = 32768


@triton.jit
def _rms_norm_kernel(
    out,
    x,
    residual,
    weight,
    eps,
    num_heads,
    stride_token,
    stride_head,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    WEIGHT_PER_HEAD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = row % num_heads
    element = tl.arange(0, BLOCK)
    mask = element < SIZE
    source = x + (row // num_heads) * stride_token + head * stride_head + element
    value = tl.load(source, mask=mask, other=0.0)
    if ADD:
        # The sum is rounded to its dtype before the statistics, as the residual stream carries it.
        place = residual + row * SIZE + element
        value = (value.to(tl.float32) + tl.load(place, mask=mask, other=0.0).to(tl.float32)).to(value.dtype)
        tl.store(place, value, mask=mask)
    upcast = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(upcast * upcast, axis=0) / SIZE + eps)
    # Hugging Face's order: round the normalised value, then multiply in the activations' dtype.
    normalised = (upcast * scale).to(value.dtype).to(tl.float32)
    if WEIGHT_PER_HEAD:
        factor = tl.load(weight + head * SIZE + element, mask=mask, other=0.0)
    else:
        factor = tl.load(weight + element, mask=mask, other=0.0)
    tl.store(out + row * SIZE + element, (normalised * factor.to(tl.float32)).to(value.dtype), mask=mask)


def _num_warps(block: int) -> int:
    return 1 if block <= 256 else 4 if block <= 4096 else 8 if block <= 16384 else 16


def _launch(out: Tensor, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> None:
    size = x.shape[-1]
    if size > _MAX_SIZE:
        raise KernelUnsupported(f"rows of {size} elements: one program holds at most {_MAX_SIZE}")
    num_heads, stride_head = (x.shape[1], x.stride(1)) if x.dim() == 3 else (1, 0)
    num_rows = x.shape[0] * num_heads
    if num_rows == 0:
        return
    block = triton.next_power_of_2(size)
    _rms_norm_kernel[(num_rows,)](
        out,
        x,
        residual,
        weight,
        eps,
        num_heads,
        x.stride(0),
        stride_head,
        SIZE=size,
        BLOCK=block,
        ADD=residual is not None,
        WEIGHT_PER_HEAD=weight.dim() == 2,
        num_warps=_num_warps(block),
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension, statistics in fp32.

    x: [..., H] with weight [H], or [T, heads, D] with weight [heads, D]. Returns a contiguous tensor of x's shape and
    dtype. Raises `KernelUnsupported` for rows of more than 32768 elements.
    """
    if x.dim() not in (2, 3):
        return rms_norm(x.reshape(-1, x.shape[-1]), weight, eps).view(x.shape)
    if x.stride(-1) != 1:
        x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(out, x, None, weight, eps)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`residual + x`, and its RMSNorm. Returns (normalised, sum); the sum overwrites `residual`.

    x: [T, H], elements contiguous; residual: [T, H] contiguous; weight: [H].
    """
    if x.stride(-1) != 1:
        x = x.contiguous()
    if not residual.is_contiguous():
        raise KernelUnsupported(f"the residual must be contiguous, got strides {residual.stride()}")
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(out, x, residual, weight, eps)
    return out, residual
