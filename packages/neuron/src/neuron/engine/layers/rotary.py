"""Rotary position embedding (Su et al. 2021, RoFormer) with the scalings that checkpoints use.

Angles are computed in float32 for every position up to the longest one seen so far, in a table that grows. The halves
of a head are rotated against each other ("rotate half", the GPT-NeoX layout of Hugging Face checkpoints).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from neuron.checkpoint.rope import RopeScaling
from neuron.engine.layers.norm import QKNorm

_FIRST_TABLE_LEN = 2048


def inverse_frequencies(scaling: RopeScaling, rotary_dim: int) -> Tensor:
    """Radians per position of each rotated pair: [rotary_dim / 2] float32, on the CPU."""
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64, device="cpu").float() / rotary_dim
    frequencies = scaling.theta**exponents
    inverse = 1.0 / frequencies
    if scaling.rope_type == "divisors":
        return inverse / torch.tensor(scaling.divisors, dtype=torch.float32, device="cpu")
    if scaling.rope_type == "linear":
        return inverse / scaling.factor
    if scaling.rope_type == "llama3":
        return _llama3(inverse, scaling)
    if scaling.rope_type == "yarn":
        return _yarn(inverse, 1.0 / (scaling.factor * frequencies), scaling, rotary_dim)
    return inverse


def _llama3(inverse: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1: short wavelengths stay, long ones are stretched by `factor`, a linear blend between."""
    context = scaling.original_max_positions
    wavelength = 2 * math.pi / inverse
    blend = (context / wavelength - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * inverse / scaling.factor + blend * inverse


def _yarn(inverse: Tensor, stretched: Tensor, scaling: RopeScaling, rotary_dim: int) -> Tensor:
    """YaRN (Peng et al. 2023, section 3.2): by the number of turns a pair makes within the original context."""

    def pair_of(turns: float) -> float:
        context = scaling.original_max_positions
        return rotary_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(scaling.theta))

    low, high = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(rotary_dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0.0, 1.0)
    return stretched * ramp + inverse * (1 - ramp)


@dataclass(frozen=True, slots=True)
class StepRotary:
    """The rotary embedding of one step's tokens, made once and used by every layer.

    positions: [T] int64. cos_sin: [P, R] float32, the table, cosines in the first half of a row and sines in the
    second; R is the rotated part of a head. cos, signed_sin: [T, 1, R] in the activations' dtype, each half written
    twice and the first half of the sines negated; None where kernels read the table. exact: rotate with
    separate products and sums.
    """

    positions: Tensor
    cos_sin: Tensor
    cos: Tensor | None
    signed_sin: Tensor | None
    exact: bool = False


class RotaryEmbedding:
    """The table of angles of one model on one device.

    head_dim: D; R = D * partial_rotary_factor of its elements are rotated. Not thread-safe: one device thread uses it.
    """

    def __init__(self, scaling: RopeScaling, head_dim: int) -> None:
        self.scaling = scaling
        self.rotary_dim = int(head_dim * scaling.partial_rotary_factor)
        # A row gets the same bits whatever lies beside it. The table must then have its length before the first step:
        # where a cosine lies in it, and how long it is, may change the cosine's last bit on the CPU.
        self.deterministic = False
        # Whoever rotates reads the table, as kernels of a device do.
        self.uses_native_kernels = False
        self._table: Tensor | None = None
        self._gathered_form: Tensor | None = None  # [P, 2, 1, R]: the table as `gather_angles` gives it

    def reserve(self, num_positions: int, device: torch.device) -> Tensor:
        """Make the table cover positions 0 … num_positions - 1; returns it, [P, R] float32.

        A table that grows moves in memory: where its address must stay (CUDA graphs), reserve the longest context
        before the first step.
        """
        table = self._table
        if table is None or table.shape[0] < num_positions or table.device != device:
            length = max(_FIRST_TABLE_LEN, 1 << (num_positions - 1).bit_length())
            if device.type != "cpu":
                length = max(_FIRST_TABLE_LEN, num_positions)
            with torch.inference_mode(False):
                positions = torch.arange(length, dtype=torch.float32, device="cpu")
                angles = torch.outer(positions, inverse_frequencies(self.scaling, self.rotary_dim))
                table = torch.cat((angles.cos(), angles.sin()), dim=-1).mul_(self.scaling.attention_factor)
                self._table = table = table.to(device)
            self._gathered_form = None
        return table

    def at(self, positions: Tensor, num_positions: int, dtype: torch.dtype) -> StepRotary:
        """The rotations of one step. positions: [T] int64, all below `num_positions`; dtype of the activations."""
        table = self.reserve(num_positions, positions.device)
        if positions.device.type != "cpu" or self.uses_native_kernels:
            return StepRotary(positions, table, None, None)
        if self._gathered_form is None or self._gathered_form.dtype != dtype:
            everything = torch.arange(table.shape[0])
            self._gathered_form = torch.stack(gather_angles(table, everything, dtype), dim=1)
        cos, signed_sin = self._gathered_form.index_select(0, positions).unbind(1)
        return StepRotary(positions, table, cos, signed_sin, self.deterministic)


def gather_angles(table: Tensor, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(cos, signed_sin) of `StepRotary` for these positions: [T, 1, R] each."""
    cos, sin = table.index_select(0, positions).to(dtype).unsqueeze(1).chunk(2, dim=-1)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor, *, exact: bool = False) -> Tensor:
    """Rotate the first R elements of each head. x: [T, heads, D]; cos, signed_sin: [T, 1, R]. Returns a new tensor.

    exact: products and sums are rounded one by one. `addcmul` fuses them, but perhaps not for every element.
    """
    rotary_dim = cos.shape[-1]
    if rotary_dim == x.shape[-1]:
        # The sign that "rotate half" gives the first of the swapped halves is in the sines.
        swapped = x.view(*x.shape[:-1], 2, rotary_dim // 2).flip(-2).view(x.shape)
        if exact:
            return (x * cos).add_(swapped * signed_sin)
        return torch.addcmul(x * cos, swapped, signed_sin)
    rotated = rotate(x[..., :rotary_dim], cos, signed_sin, exact=exact)
    return torch.cat((rotated, x[..., rotary_dim:]), dim=-1)


def split_and_rotate(
    qkv: Tensor,
    rotary: StepRotary,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    qk_norm: QKNorm | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of packed rows: per-head norm where the family has one, then rotation of q and k.

    qkv: [T, (Hq + 2·Hkv)·D]. Returns q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, D]; rows may be strided. q and k are
    treated as one tensor of Hq + Hkv heads: half as many operations, which is what a small batch costs on the CPU.
    """
    num_tokens = qkv.shape[0]
    heads = qkv.view(num_tokens, num_heads + 2 * num_kv_heads, head_dim)
    qk, v = heads[:, : num_heads + num_kv_heads], heads[:, num_heads + num_kv_heads :]
    if qk_norm is not None:
        qk = qk_norm(qk)
    if rotary.cos is None or rotary.signed_sin is None:
        cos, signed_sin = gather_angles(rotary.cos_sin, rotary.positions, qkv.dtype)
    else:
        cos, signed_sin = rotary.cos, rotary.signed_sin
    qk = rotate(qk, cos, signed_sin, exact=rotary.exact)
    return qk[:, :num_heads], qk[:, num_heads:], v
