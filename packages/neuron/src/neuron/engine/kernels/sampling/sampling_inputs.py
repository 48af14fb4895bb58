"""Inputs of sampling besides logits, as tensors of the device: a CUDA graph replays with new values in them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenPenalties:
    """Penalties and logit bias of R rows, as lists of tokens (meaning: `neuron.engine.scheduler.token_bias`).

    starts: [R + 1] int32, the entries of row r are starts[r] up to starts[r + 1]. Per entry, each token once in a row:
    tokens [N] int64, biases [N] fp32, uses [N] int32 (twice the occurrences in the output, plus 1 for a token of the
    prompt). penalties: [R, 3] fp32: presence, frequency, repetition (0, 0, 1: off). pending: [R] int64, an output
    token that the list does not count yet, negative = none: where the next step is launched before the host has seen
    the last one's token, that token is on the device only.
    """

    starts: Tensor
    tokens: Tensor
    biases: Tensor
    uses: Tensor
    penalties: Tensor
    pending: Tensor | None = None


@dataclass(frozen=True, slots=True)
class TokenMasks:
    """Which tokens rows may choose. words: [M, ceil(V / 32)] int32, bit t % 32 of word t // 32 is set where token t is
    allowed. rows: [R] int32, the mask of each row, negative = every token is allowed."""

    words: Tensor
    rows: Tensor
