"""From logits to one token per row, without a sort and without a trip to the host.

Twin: `neuron.engine.sampling.sampler`.

Two launches. The first reads all logits once, over the whole device, and leaves per tile what the second needs:
maximum, softmax sums, the best token with and without noise, whether all is finite; and the maximum of every group of
128 tokens. The second, one program per row, is done at once for greedy and untruncated rows. Otherwise it searches the
threshold below which top-k, top-p and min-p cut: the k-th largest *group maximum* bounds the k-th largest logit from
below, so only the few groups above it are read again (a few thousand of 150,000 logits); their candidates are held in
registers and the threshold is found by bisection over the bits of a float. Where more candidates remain than registers
hold (a flat distribution), the interval is halved by passes over the active groups until they fit.

Order and meaning are those of the twin: penalties and bias of listed tokens; masks; temperature; top-k; top-p of what
top-k leaves (a token stays if the tokens above it hold less than top_p); min-p; then argmax(logit / temperature -
log E) with E from the counter-based generator of `neuron.engine.sampling.sampling_noise`. One difference: of equal
logits at a border all stay, where a sort keeps some.

Penalties and masks are written into the logits by the first launch, tile by tile, after it has summed up what the
model said: log-probabilities are of that. Every parameter is read from memory, so that a CUDA graph can hold it all.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disallow-untyped-calls=False

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from neuron.engine.kernels import KernelUnsupported
from neuron.engine.kernels.sampling.sampling_inputs import TokenMasks, TokenPenalties
from neuron.engine.kernels.sampling.sampling_pick import pick_kernel
from neuron.engine.kernels.sampling.sampling_scan import scan_kernel

_TILE = 2048
_MAX_GROUPS = 2048
_MIN_GROUP = 128
# Candidates that one program holds in registers.
_CAPACITY = 4096
# Entries of a list of penalties that a program looks at in one go.
_ENTRIES = 256
# top-p without top-k starts from at least this many candidates.
_FIRST_CANDIDATES = 512
_CHUNK = 2048


@dataclass(frozen=True, slots=True)
class SampledRows:
    """tokens: [R] int64. logprobs: [R] fp32, natural, of the distribution the logits give as they are (before
    penalties, masks, temperature and truncation). finite: [R] bool, False where a logit is NaN or infinite."""

    tokens: Tensor
    logprobs: Tensor
    finite: Tensor


def sample(
    logits: Tensor,
    temperatures: Tensor,
    top_ks: Tensor,
    top_ps: Tensor,
    min_ps: Tensor,
    keys: Tensor,
    *,
    penalties: TokenPenalties | None = None,
    masks: TokenMasks | None = None,
) -> SampledRows:
    """One token per row of `logits`, [R, V] fp32 (or bf16/fp16), elements contiguous.

    temperatures: [R] fp32, 0 = greedy (the smallest of equal tokens). top_ks: [R] int32 or int64, <= 0 or >= V = off.
    top_ps: [R] fp32, >= 1 = off. min_ps: [R] fp32, <= 0 = off. keys: [R] int64 of `sampling_noise.noise_key`.
    Logits of listed tokens are replaced by what penalties and bias make of them, those of masked tokens by -inf;
    without either, logits stay as they are. A row with every token masked gets token 0. Everything stays on the device:
    no sync, and nothing depends on other rows. Raises `KernelUnsupported` if elements are not contiguous.
    """
    num_rows, vocab_size = logits.shape
    if logits.stride(1) != 1:
        raise KernelUnsupported(f"logits must be contiguous in a row, got strides {logits.stride()}")
    device = logits.device
    group = max(_MIN_GROUP, triton.next_power_of_2(triton.cdiv(vocab_size, _MAX_GROUPS)))
    num_tiles = triton.cdiv(vocab_size, _TILE)
    num_groups = triton.cdiv(vocab_size, group)
    groups_pad = triton.next_power_of_2(num_tiles * (_TILE // group))
    result = SampledRows(
        torch.empty(num_rows, dtype=torch.int64, device=device),
        torch.empty(num_rows, dtype=torch.float32, device=device),
        torch.empty(num_rows, dtype=torch.bool, device=device),
    )
    if num_rows == 0:
        return result
    group_max = torch.empty(num_rows, groups_pad, dtype=torch.float32, device=device)
    tile_floats = torch.empty(num_rows, 5, num_tiles, dtype=torch.float32, device=device)
    tile_tokens = torch.empty(num_rows, 3, num_tiles, dtype=torch.int32, device=device)
    group_lists = torch.empty(num_rows, groups_pad, dtype=torch.int32, device=device)
    candidates = torch.empty(num_rows, _CAPACITY, dtype=torch.float32, device=device)
    parameters = temperatures, top_ks, top_ps, min_ps, keys
    starts = listed = biases = uses = factors = pending = entry_logits = pending_logits = None
    if penalties is not None:
        starts, listed, biases, uses = penalties.starts, penalties.tokens, penalties.biases, penalties.uses
        factors, pending = penalties.penalties, penalties.pending
        entry_logits = torch.empty(listed.shape[0], dtype=torch.float32, device=device)
        pending_logits = torch.empty(num_rows, dtype=torch.float32, device=device)
    flags = {"HAS_PENALTIES": penalties is not None, "HAS_PENDING": pending is not None, "ENTRIES": _ENTRIES}
    scan_kernel[(num_rows, num_tiles)](
        logits,
        *parameters,
        starts,
        listed,
        biases,
        uses,
        entry_logits,
        factors,
        pending,
        pending_logits,
        None if masks is None else masks.words,
        None if masks is None else masks.rows,
        group_max,
        tile_floats,
        tile_tokens,
        logits.stride(0),
        groups_pad,
        0 if masks is None else masks.words.stride(0),
        VOCAB_SIZE=vocab_size,
        GROUP=group,
        TILE=_TILE,
        NUM_TILES=num_tiles,
        HAS_MASKS=masks is not None,
        **flags,
        num_warps=4,
    )
    pick_kernel[(num_rows,)](
        logits,
        *parameters,
        starts,
        listed,
        entry_logits,
        pending,
        pending_logits,
        group_max,
        tile_floats,
        tile_tokens,
        group_lists,
        candidates,
        result.tokens,
        result.logprobs,
        result.finite,
        logits.stride(0),
        groups_pad,
        VOCAB_SIZE=vocab_size,
        GROUP=group,
        NUM_TILES=num_tiles,
        TILES_PAD=triton.next_power_of_2(num_tiles),
        NUM_GROUPS=num_groups,
        GROUPS_PAD=groups_pad,
        CHUNK=_CHUNK,
        CAPACITY=_CAPACITY,
        FIRST_CANDIDATES=_FIRST_CANDIDATES,
        **flags,
        num_warps=8,
    )
    return result
