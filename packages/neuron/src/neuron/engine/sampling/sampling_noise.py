"""Sampling noise as a pure function of (seed, position, token): no generator has a state.

So the output of a request does not depend on its neighbours, on the order of a batch, on preemption or on a restart.
The generator is SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators") used as a
counter-based hash: key(seed, position) starts a stream whose t-th word belongs to token t. A CUDA kernel that follows
the same three lines of integer arithmetic gets the same words.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def _mix(word: int) -> int:
    word = ((word ^ (word >> 30)) * _MIX1) & _MASK
    word = ((word ^ (word >> 27)) * _MIX2) & _MASK
    return word ^ (word >> 31)


def noise_key(seed: int, position: int) -> int:
    """The 64-bit key of output position `position` (0 for the first output token), as a signed integer."""
    stream = _mix((seed + _GOLDEN) & _MASK)
    return _signed(_mix((stream + (position + 1) * _GOLDEN) & _MASK))


def log_exponential_noise(keys: Tensor, token_ids: Tensor) -> Tensor:
    """log(E) for independent standard exponential E, one per (key, token).

    keys: [R] int64 from `noise_key`; token_ids: [R, K] or [K] int64. Returns [R, K] float32. The sampled token is
    argmax(logit - log(E)): the Gumbel-max trick (Gumbel 1954; -log(E) is standard Gumbel), written with E because the
    winner has a small E, where a 32-bit uniform number keeps its relative precision.
    """
    word = token_ids + 1
    word = word * _signed(_GOLDEN) + keys[:, None]
    # `>>` on int64 copies the sign bit; the mask turns it into the logical shift that the algorithm means.
    word ^= (word >> 30) & ((1 << 34) - 1)
    word *= _signed(_MIX1)
    word ^= (word >> 27) & ((1 << 37) - 1)
    word *= _signed(_MIX2)
    # The last step of the mix only concerns the upper half here: (word ^ word >>> 31) >>> 32.
    word ^= (word >> 31) & ((1 << 33) - 1)
    word >>= 32
    word &= (1 << 32) - 1
    # The scale is a little below 2^-32, so that the uniform number never rounds to 1 (E would be infinite).
    uniform = word.to(torch.float32).add_(0.5).mul_(2.0**-32 * (1.0 - 2.0**-24))
    return uniform.neg_().log1p_().neg_().log_()
