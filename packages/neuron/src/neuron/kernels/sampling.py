"""From logits to one token per row, without a sort and without a trip to the host. Twin: `neuron.engine.sampler`.

Two launches. The first reads all logits once, over the whole device, and leaves per tile what the second needs:
maximum, softmax sums, the best token with and without noise, whether all is finite; and the maximum of every group of
128 tokens. The second, one program per row, is done at once for greedy and untruncated rows. Otherwise it searches the
threshold below which top-k, top-p and min-p cut: the k-th largest *group maximum* bounds the k-th largest logit from
below, so only the few groups above it are read again (a few thousand of 150,000 logits); their candidates are held in
registers and the threshold is found by bisection over the bits of a float. Where more candidates remain than registers
hold (a flat distribution), the interval is halved by passes over the active groups until they fit.

Order and meaning are those of the twin: temperature; top-k; top-p of what top-k leaves (a token stays if the tokens
above it hold less than top_p); min-p; then argmax(logit / temperature - log E) with E from the counter-based generator
of `neuron.engine.noise`. One difference: of equal logits at a border all stay, where a sort keeps some.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disallow-untyped-calls=False

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from neuron.kernels import KernelUnsupported

_TILE = 2048
_MAX_GROUPS = 2048
_MIN_GROUP = 128
# Candidates that one program holds in registers.
_CAPACITY = 4096
# top-p without top-k starts from at least this many candidates.
_FIRST_CANDIDATES = 512
_CHUNK = 2048

_LOWEST = tl.constexpr(-(2**31))
_COLLECT = tl.constexpr(0)
_MEASURE = tl.constexpr(1)
_DRAW = tl.constexpr(2)
_NO_TOKEN = tl.constexpr(2**31 - 1)


@dataclass(frozen=True, slots=True)
class SampledRows:
    """tokens: [R] int64. logprobs: [R] fp32, natural, of the distribution the logits give as they are (before
    temperature and truncation). finite: [R] bool, False where a row holds NaN or +inf, or nothing above -inf."""

    tokens: Tensor
    logprobs: Tensor
    finite: Tensor


@triton.jit
def log_exponential_noise(key, token):
    """log(E), E standard exponential, of int64 keys and integer tokens: `neuron.engine.noise` in a kernel.

    SplitMix64 (Steele, Lea, Flood 2014) as a counter-based hash; the same integers bit for bit, and the same float
    within a few units in the last place.
    """
    word = (token.to(tl.uint64) + 1) * 0x9E3779B97F4A7C15 + key.to(tl.uint64, bitcast=True)
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB
    word = (word ^ (word >> 31)) >> 32
    # A little below 2^-32, as in the twin: the uniform number never rounds to 1.
    uniform = (word.to(tl.uint32).to(tl.float32) + 0.5) * (2.0**-32 * (1.0 - 2.0**-24))
    # -log(1 - u) of a small u loses its digits in 1 - u, and the winner of a draw has a small one: a series there.
    series = uniform * (
        1.0 + uniform * (0.5 + uniform * (1.0 / 3 + uniform * (0.25 + uniform * (0.2 + uniform * (1.0 / 6)))))
    )
    small = uniform < 1.0 / 64
    return tl.log(tl.where(small, series, -tl.log(1.0 - tl.where(small, 0.5, uniform))))


@triton.jit
def _order(value):
    """Integers in the order of floats."""
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _middle(low, high):
    """Floor of the mean, without overflow."""
    return (low >> 1) + (high >> 1) + (low & high & 1)


@triton.jit
def _best(score, token):
    """(largest score, its token, the smallest among equals)."""
    best = tl.max(score, axis=0)
    return best, tl.min(tl.where(score == best, token, _NO_TOKEN), axis=0)


# Parameters may be rows of one small tensor: their alignment varies with the number of rows and is worth no variant.
_UNALIGNED = ["temperatures", "top_ks", "top_ps", "min_ps", "keys"]


@triton.jit(do_not_specialize_on_alignment=_UNALIGNED)
def _scan_kernel(
    logits,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    keys,
    group_max,
    tile_floats,
    tile_tokens,
    stride_logits,
    stride_groups,
    VOCAB_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    NUM_TILES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    temperature = tl.load(temperatures + row)
    sampled = temperature > 0.0
    divisor = tl.where(sampled, temperature, 1.0)
    group = tl.arange(0, TILE // GROUP)
    token = tile * TILE + group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    live = token < VOCAB_SIZE
    value = tl.load(logits + row * stride_logits + token, mask=live, other=float("-inf")).to(tl.float32)
    maxima = tl.max(value, axis=1)
    tl.store(
        group_max + row * stride_groups + tile * (TILE // GROUP) + group,
        maxima,
    )
    bad = tl.max(((value != value) | (value == float("inf"))).to(tl.int32).reshape(TILE), axis=0)
    value = value.reshape(TILE)
    token = token.reshape(TILE)
    maximum, best_token = _best(value, token)
    shift = tl.where(maximum == float("-inf"), 0.0, maximum)
    total = tl.sum(tl.exp(value - shift), axis=0)
    scaled_total = tl.sum(tl.exp((value - shift) / divisor), axis=0)

    # Per tile: maximum, sum, sum at the temperature, best noisy score; best token, best noisy token, bad.
    floats = tile_floats + (row * 4) * NUM_TILES + tile
    tokens = tile_tokens + (row * 3) * NUM_TILES + tile
    tl.store(floats, maximum)
    tl.store(floats + NUM_TILES, total)
    tl.store(floats + 2 * NUM_TILES, scaled_total)
    tl.store(tokens, best_token)
    tl.store(tokens + 2 * NUM_TILES, bad)
    top_k = tl.load(top_ks + row)
    whole = ((top_k <= 0) | (top_k >= VOCAB_SIZE)) & (tl.load(top_ps + row) >= 1.0) & (tl.load(min_ps + row) <= 0.0)
    if sampled & whole:
        noise = log_exponential_noise(tl.load(keys + row), token)
        score, noisy_token = _best(tl.div_rn(value, divisor) - noise, token)
        tl.store(floats + 3 * NUM_TILES, score)
        tl.store(tokens + NUM_TILES, noisy_token)


@triton.jit
def _sweep(
    logits,
    group_max,
    group_list,
    candidates,
    temperature,
    scaled_max,
    key,
    low,
    high,
    MODE: tl.constexpr,
    VOCAB_SIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUPS_PAD: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """One pass over the logits whose order is in (low, high], reading only groups that can hold one.

    COLLECT writes the first CAPACITY of them to `candidates`; DRAW looks for the best noisy score. Returns (number,
    softmax mass relative to the maximum, token of that score).
    """
    # Other warps may still read what an earlier pass has left in the lists.
    tl.debug_barrier()
    group = tl.arange(0, GROUPS_PAD)
    maxima = tl.load(group_max + group, mask=group < NUM_GROUPS, other=float("-inf"))
    active = ((group < NUM_GROUPS) & (_order(tl.div_rn(maxima, temperature)) > low)).to(tl.int32)
    num_active = tl.sum(active, axis=0)
    tl.store(group_list + tl.cumsum(active, axis=0) - 1, group, mask=active > 0)
    tl.debug_barrier()
    count = 0
    mass = 0.0
    best_score = float("-inf")
    best_token = _NO_TOKEN
    for begin in range(0, num_active * GROUP, CHUNK):
        index = begin + tl.arange(0, CHUNK)
        listed = index // GROUP < num_active
        token = tl.load(group_list + index // GROUP, mask=listed, other=0) * GROUP + index % GROUP
        live = listed & (token < VOCAB_SIZE)
        scaled = tl.div_rn(tl.load(logits + token, mask=live, other=float("-inf")).to(tl.float32), temperature)
        order = _order(scaled)
        wanted = live & (order > low) & (order <= high)
        if MODE == _COLLECT:
            place = count + tl.cumsum(wanted.to(tl.int32), axis=0) - 1
            kept = wanted & (place < CAPACITY)
            tl.store(candidates + place, scaled, mask=kept)
        mass += tl.sum(tl.where(wanted, tl.exp(scaled - scaled_max), 0.0), axis=0)
        if MODE == _DRAW:
            score = tl.where(wanted, scaled - log_exponential_noise(key, token), float("-inf"))
            chunk_score, chunk_token = _best(score, token)
            better = chunk_score > best_score
            best_token = tl.where(better, chunk_token, best_token)
            best_score = tl.where(better, chunk_score, best_score)
        count += tl.sum(wanted.to(tl.int32), axis=0)
    tl.debug_barrier()
    return count, mass, best_token


@triton.jit
def _kth_group(group_max, temperature, rank, NUM_GROUPS: tl.constexpr, GROUPS_PAD: tl.constexpr):
    """The largest threshold that at least `rank` group maxima exceed, in `_order`; _LOWEST if there are fewer groups.

    So at least `rank` logits are above it.
    """
    group = tl.arange(0, GROUPS_PAD)
    live = group < NUM_GROUPS
    maxima = tl.load(group_max + group, mask=live, other=float("-inf"))
    order = _order(tl.div_rn(maxima, temperature))
    low = tl.zeros([], tl.int32) + _LOWEST
    high = tl.max(tl.where(live, order, _LOWEST), axis=0)
    if rank <= NUM_GROUPS:
        for _ in range(32):
            middle = _middle(low, high)
            enough = tl.sum((live & (order > middle)).to(tl.int32), axis=0) >= rank
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle)
    return low


@triton.jit
def _search(
    logits,
    group_max,
    group_list,
    candidates,
    temperature,
    scaled_max,
    target,
    low,
    BY_MASS: tl.constexpr,
    VOCAB_SIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUPS_PAD: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """The smallest threshold (in `_order`) above which less than `target` lies, by number or by softmax mass.

    target > 0. low: a first guess from below; where it proves too high the search starts from the bottom. Between
    `low` and `high`, what lies above `low` reaches the target (or low is the bottom) and what lies above `high`,
    `above` (`count_above` logits), does not.
    """
    high = _order(scaled_max)
    above = 0.0
    count_above = 0
    count, mass, _token = _sweep(
        logits, group_max, group_list, candidates, temperature, scaled_max, 0, low, high,
        _COLLECT, VOCAB_SIZE, NUM_GROUPS, GROUPS_PAD, GROUP, CHUNK, CAPACITY,
    )  # fmt: skip
    reached = mass if BY_MASS else count.to(tl.float32)
    too_high = reached < target
    if too_high | (count > CAPACITY):
        if too_high:
            high = low
            low = tl.zeros([], tl.int32) + _LOWEST
            above = reached
            count_above = count
            count = VOCAB_SIZE - count
        while (count > CAPACITY) & (high.to(tl.int64) - low.to(tl.int64) > 1):
            middle = _middle(low, high)
            measured, mass, _token = _sweep(
                logits, group_max, group_list, candidates, temperature, scaled_max, 0, middle, _order(scaled_max),
                _MEASURE, VOCAB_SIZE, NUM_GROUPS, GROUPS_PAD, GROUP, CHUNK, CAPACITY,
            )  # fmt: skip
            reached = mass if BY_MASS else measured.to(tl.float32)
            enough = reached >= target
            count = tl.where(enough, measured - count_above, count_above + count - measured)
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle)
            above = tl.where(enough, above, reached)
            count_above = tl.where(enough, count_above, measured)
        count, mass, _token = _sweep(
            logits, group_max, group_list, candidates, temperature, scaled_max, 0, low, high,
            _COLLECT, VOCAB_SIZE, NUM_GROUPS, GROUPS_PAD, GROUP, CHUNK, CAPACITY,
        )  # fmt: skip

    index = tl.arange(0, CAPACITY)
    live = index < count
    scaled = tl.load(candidates + index, mask=live, other=float("-inf"))
    order = _order(scaled)
    if BY_MASS:  # noqa: SIM108
        weight = tl.where(live, tl.exp(scaled - scaled_max), 0.0)
    else:
        weight = tl.where(live, 1.0, 0.0)
    for _ in range(32):
        middle = _middle(low, high)
        reached = above + tl.sum(tl.where(order > middle, weight, 0.0), axis=0)
        # An interval of one value needs no look: more equal logits than CAPACITY may sit on it.
        enough = (reached >= target) | (middle == low)
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return high


@triton.jit(do_not_specialize_on_alignment=_UNALIGNED)
def _pick_kernel(
    logits,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    keys,
    group_max,
    tile_floats,
    tile_tokens,
    group_lists,
    candidate_lists,
    out_tokens,
    out_logprobs,
    out_finite,
    stride_logits,
    stride_groups,
    VOCAB_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_TILES: tl.constexpr,
    TILES_PAD: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUPS_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    CAPACITY: tl.constexpr,
    FIRST_CANDIDATES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride_logits
    group_max += row * stride_groups
    tile = tl.arange(0, TILES_PAD)
    live = tile < NUM_TILES
    floats = tile_floats + (row * 4) * NUM_TILES
    tokens = tile_tokens + (row * 3) * NUM_TILES
    maxima = tl.load(floats + tile, mask=live, other=float("-inf"))
    maximum, best_tile = _best(maxima, tile)
    shift = tl.where(maximum == float("-inf"), 0.0, maximum)
    total = tl.sum(tl.load(floats + NUM_TILES + tile, mask=live, other=0.0) * tl.exp(maxima - shift), axis=0)
    bad = tl.max(tl.load(tokens + 2 * NUM_TILES + tile, mask=live, other=0), axis=0) > 0
    finite = (bad == 0) & (maximum > float("-inf"))

    temperature = tl.load(temperatures + row)
    top_k = tl.load(top_ks + row)
    top_p = tl.load(top_ps + row)
    min_p = tl.load(min_ps + row)
    cuts_k = (top_k > 0) & (top_k < VOCAB_SIZE)
    cuts_p = top_p < 1.0
    token = tl.load(tokens + best_tile, mask=best_tile < NUM_TILES, other=0)
    if finite & (temperature > 0.0):
        if cuts_k | cuts_p | (min_p > 0.0):
            group_list = group_lists + row * GROUPS_PAD
            candidates = candidate_lists + row * CAPACITY
            scaled_max = tl.div_rn(maximum, temperature)
            threshold = tl.zeros([], tl.int32) + (_LOWEST + 1)
            mass = tl.sum(
                tl.load(floats + 2 * NUM_TILES + tile, mask=live, other=0.0) * tl.exp((maxima - shift) / temperature),
                axis=0,
            )
            if cuts_k:
                low = _kth_group(group_max, temperature, top_k, NUM_GROUPS, GROUPS_PAD)
                threshold = _search(
                    logits, group_max, group_list, candidates, temperature, scaled_max, top_k.to(tl.float32), low,
                    False, VOCAB_SIZE, NUM_GROUPS, GROUPS_PAD, GROUP, CHUNK, CAPACITY,
                )  # fmt: skip
            if cuts_p:
                if cuts_k:
                    _count, mass, _token = _sweep(
                        logits, group_max, group_list, candidates, temperature, scaled_max, 0, threshold - 1,
                        _order(scaled_max),
                        _MEASURE, VOCAB_SIZE, NUM_GROUPS, GROUPS_PAD, GROUP, CHUNK, CAPACITY,
                    )  # fmt: skip
                    low = threshold - 1
                else:
                    low = _kth_group(group_max, temperature, FIRST_CANDIDATES, NUM_GROUPS, GROUPS_PAD)
                # A target of 0 would cut the best token too.
                threshold_p = _search(
                    logits, group_max, group_list, candidates, temperature, scaled_max,
                    tl.maximum(top_p * mass, 1e-30), low,
                    True, VOCAB_SIZE, NUM_GROUPS, GROUPS_PAD, GROUP, CHUNK, CAPACITY,
                )  # fmt: skip
                threshold = tl.maximum(threshold, threshold_p)
            if min_p > 0.0:
                # min_p above 1 would cut the best token too.
                threshold = tl.maximum(threshold, _order(scaled_max + tl.minimum(tl.log(min_p), 0.0)))
            _count, mass, token = _sweep(
                logits, group_max, group_list, candidates, temperature, scaled_max, tl.load(keys + row), threshold - 1,
                _order(scaled_max),
                _DRAW, VOCAB_SIZE, NUM_GROUPS, GROUPS_PAD, GROUP, CHUNK, CAPACITY,
            )  # fmt: skip
        else:
            _score, best_tile = _best(tl.load(floats + 3 * NUM_TILES + tile, mask=live, other=float("-inf")), tile)
            token = tl.load(tokens + NUM_TILES + best_tile, mask=best_tile < NUM_TILES, other=0)
    token = tl.minimum(token, VOCAB_SIZE - 1)
    tl.store(out_tokens + row, token.to(tl.int64))
    tl.store(out_logprobs + row, tl.load(logits + token).to(tl.float32) - shift - tl.log(total))
    tl.store(out_finite + row, finite)


def sample(
    logits: Tensor,
    temperatures: Tensor,
    top_ks: Tensor,
    top_ps: Tensor,
    min_ps: Tensor,
    keys: Tensor,
) -> SampledRows:
    """One token per row of `logits`, [R, V] fp32 (or bf16/fp16), elements contiguous; not changed.

    temperatures: [R] fp32, 0 = greedy (the smallest of equal tokens). top_ks: [R] int32 or int64, <= 0 or >= V = off.
    top_ps: [R] fp32, >= 1 = off. min_ps: [R] fp32, <= 0 = off. keys: [R] int64 from `neuron.engine.noise.noise_key`.
    Masked tokens are -inf. Everything stays on the device: no sync, and nothing depends on other rows. Raises
    `KernelUnsupported` if elements are not contiguous.
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
    tile_floats = torch.empty(num_rows, 4, num_tiles, dtype=torch.float32, device=device)
    tile_tokens = torch.empty(num_rows, 3, num_tiles, dtype=torch.int32, device=device)
    group_lists = torch.empty(num_rows, groups_pad, dtype=torch.int32, device=device)
    candidates = torch.empty(num_rows, _CAPACITY, dtype=torch.float32, device=device)
    parameters = temperatures, top_ks, top_ps, min_ps, keys
    _scan_kernel[(num_rows, num_tiles)](
        logits,
        *parameters,
        group_max,
        tile_floats,
        tile_tokens,
        logits.stride(0),
        groups_pad,
        VOCAB_SIZE=vocab_size,
        GROUP=group,
        TILE=_TILE,
        NUM_TILES=num_tiles,
        num_warps=4,
    )
    _pick_kernel[(num_rows,)](
        logits,
        *parameters,
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
        num_warps=8,
    )
    return result
