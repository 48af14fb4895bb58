"""RMSNorm (Zhang and Sennrich 2019), with the residual addition that precedes it in a decoder layer."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor, nn

from neuron.engine.kernels.kernel_dispatch import fused_kernel, native_kernel
from neuron.engine.weight_slices import WeightSlice


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension; statistics in float32.

    x: [..., D]; weight: [D] (or broadcastable to x). Returns a new tensor of x's shape and dtype.
    """
    kernel = fused_kernel("norm", "rms_norm", x.device)
    if kernel is not None:
        result: Tensor = kernel(x, weight, eps)
        return result
    # The normalised value is rounded to x's dtype before it is scaled, as checkpoints were trained.
    scale = math.sqrt(x.shape[-1])
    return _divide_by_length(x.float(), eps).mul_(scale).to(x.dtype).mul_(weight)


def _divide_by_length(x: Tensor, eps: float) -> Tensor:
    """x / (sqrt(D) * sqrt(mean(x²) + eps)). x: [..., D] float32. Returns a new tensor.

    The denominator is hypot(|x|, sqrt(D·eps)), half as many operations as spelling it out; and at the size of a few
    tokens it is their number that counts.
    """
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x.div(length.hypot_(_scalar(math.sqrt(x.shape[-1] * eps))))


def _rms_norm_exact(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` of operations that IEEE 754 defines to the last bit, beside one sum within each row.

    The CPU's `hypot` is not one of them: it may be computed in one way for runs of elements and in another for the
    rest, so that a row's bits would depend on how many there are.
    """
    upcast = x.float()
    mean = (upcast * upcast).sum(dim=-1, keepdim=True).div_(x.shape[-1])
    return upcast.div(mean.add_(eps).sqrt_()).to(x.dtype).mul_(weight)


def _prescaled(weight: Tensor) -> Tensor | None:
    """sqrt(D) * weight, which makes an RMSNorm of `_divide_by_length`; None where kernels do that or float32 lacks."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return None
    return weight.detach() * math.sqrt(weight.shape[-1])


@lru_cache(maxsize=32)
def _scalar(value: float) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=torch.float32, device="cpu")


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`residual + x`, and its RMSNorm. Returns (normalised, sum); the sum overwrites `residual`.

    x, residual: [T, H]; weight: [H].
    """
    kernel = fused_kernel("norm", "add_rms_norm", x.device)
    if kernel is not None:
        fused: tuple[Tensor, Tensor] = kernel(x, residual, weight, eps)
        return fused
    residual.add_(x)
    return rms_norm(residual, weight, eps), residual


class RMSNorm(nn.Module):
    """RMSNorm with a learnt scale per element; replicated on every rank."""

    weight: nn.Parameter

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.eps = eps
        self._prescaled_weight: Tensor | None = None
        # Set before loading: float32, by the native CPU kernels, whose rows are independent.
        self.uses_native_kernels = False
        # A row gets the same bits whatever lies beside it; the kernels of a device do that anyway.
        self.deterministic = False

    def finish_loading(self) -> None:
        self._prescaled_weight = _prescaled(self.weight)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[T, H] -> (normalised sum of x and residual, that sum, in residual's memory). Without a residual, x itself
        is the sum."""
        if self.uses_native_kernels:
            result: tuple[Tensor, Tensor] = native_kernel("add_rms_norm")(x, residual, self.weight, self.eps)
            return result
        if self.deterministic and x.device.type == "cpu":
            total = x if residual is None else residual.add_(x)
            return _rms_norm_exact(total, self.weight, self.eps), total
        if self._prescaled_weight is not None:
            total = x if residual is None else residual.add_(x)
            return _divide_by_length(total, self.eps).mul_(self._prescaled_weight), total
        if residual is None:
            return rms_norm(x, self.weight, self.eps), x
        return add_rms_norm(x, residual, self.weight, self.eps)

    def weight_slices(self, part: str | None) -> list[WeightSlice]:
        everything = (slice(0, self.weight.shape[0]),)
        return [WeightSlice("weight", tuple(self.weight.shape), everything, "weight", everything)]


class QKNorm(nn.Module):
    """RMSNorm of each query and key head, with one scale for all query heads and one for all key heads (Qwen3).

    The checkpoint's parts are `q` and `k`, [head_dim] each. After loading, `joint` holds the scales of all
    `num_heads + num_kv_heads` heads as [Hq + Hkv, D], so that both are normalised in one pass.
    """

    q: nn.Parameter
    k: nn.Parameter

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.eps = eps
        self.q = nn.Parameter(torch.empty(head_dim), requires_grad=False)
        self.k = nn.Parameter(torch.empty(head_dim), requires_grad=False)
        self.joint: Tensor | None = None
        self._prescaled_joint: Tensor | None = None
        self.deterministic = False

    def finish_loading(self) -> None:
        self.joint = torch.cat((self.q.expand(self.num_heads, -1), self.k.expand(self.num_kv_heads, -1)))
        self._prescaled_joint = _prescaled(self.joint)

    def forward(self, qk: Tensor) -> Tensor:
        """[T, Hq + Hkv, D], query heads first; returns a new tensor."""
        if self.joint is None:
            raise RuntimeError("the model is used before its weights were loaded")
        if self.deterministic and qk.device.type == "cpu":
            return _rms_norm_exact(qk, self.joint, self.eps)
        if self._prescaled_joint is not None:
            return _divide_by_length(qk, self.eps).mul_(self._prescaled_joint)
        return rms_norm(qk, self.joint, self.eps)

    def weight_slices(self, part: str | None) -> list[WeightSlice]:
        if part not in ("q", "k"):
            raise ValueError(f"QKNorm has the parts q and k, not {part!r}")
        size = self.q.shape[0]
        return [WeightSlice("weight", (size,), (slice(0, size),), part, (slice(0, size),))]
