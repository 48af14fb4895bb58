"""The second launch of sampling: one program per row searches its threshold and picks its token.

See `neuron.engine.kernels.sampling.sampling`.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disallow-untyped-calls=False

from __future__ import annotations

import triton
import triton.language as tl

from neuron.engine.kernels.sampling.sampling_scan import NO_TOKEN, UNALIGNED, best, log_exponential_noise

_LOWEST = tl.constexpr(-(2**31))
_COLLECT = tl.constexpr(0)
_MEASURE = tl.constexpr(1)
_DRAW = tl.constexpr(2)


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
    best_token = NO_TOKEN
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
            chunk_score, chunk_token = best(score, token)
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


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def pick_kernel(
    logits,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    keys,
    entry_starts,
    entry_tokens,
    entry_logits,
    pending_tokens,
    pending_logits,
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
    HAS_PENALTIES: tl.constexpr,
    HAS_PENDING: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride_logits
    group_max += row * stride_groups
    tile = tl.arange(0, TILES_PAD)
    live = tile < NUM_TILES
    floats = tile_floats + (row * 5) * NUM_TILES
    tokens = tile_tokens + (row * 3) * NUM_TILES
    raw_maxima = tl.load(floats + tile, mask=live, other=float("-inf"))
    raw_max = tl.max(raw_maxima, axis=0)
    raw_max = tl.where(raw_max == float("-inf"), 0.0, raw_max)
    total = tl.sum(tl.load(floats + NUM_TILES + tile, mask=live, other=0.0) * tl.exp(raw_maxima - raw_max), axis=0)
    maxima = tl.load(floats + 2 * NUM_TILES + tile, mask=live, other=float("-inf"))
    maximum, best_tile = best(maxima, tile)
    shift = tl.where(maximum == float("-inf"), 0.0, maximum)
    finite = tl.max(tl.load(tokens + 2 * NUM_TILES + tile, mask=live, other=0), axis=0) == 0

    temperature = tl.load(temperatures + row)
    top_k = tl.load(top_ks + row)
    top_p = tl.load(top_ps + row)
    min_p = tl.load(min_ps + row)
    cuts_k = (top_k > 0) & (top_k < VOCAB_SIZE)
    cuts_p = top_p < 1.0
    token = tl.load(tokens + best_tile, mask=best_tile < NUM_TILES, other=0)
    # With every token masked there is nothing to draw from.
    if finite & (temperature > 0.0) & (maximum > float("-inf")):
        if cuts_k | cuts_p | (min_p > 0.0):
            group_list = group_lists + row * GROUPS_PAD
            candidates = candidate_lists + row * CAPACITY
            scaled_max = tl.div_rn(maximum, temperature)
            threshold = tl.zeros([], tl.int32) + (_LOWEST + 1)
            mass = tl.sum(
                tl.load(floats + 3 * NUM_TILES + tile, mask=live, other=0.0) * tl.exp((maxima - shift) / temperature),
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
            _score, best_tile = best(tl.load(floats + 4 * NUM_TILES + tile, mask=live, other=float("-inf")), tile)
            token = tl.load(tokens + NUM_TILES + best_tile, mask=best_tile < NUM_TILES, other=0)
    token = tl.minimum(token, VOCAB_SIZE - 1)
    tl.store(out_tokens + row, token.to(tl.int64))
    logit = tl.load(logits + token).to(tl.float32)
    if HAS_PENALTIES:
        # What it was before the first launch changed it.
        last = tl.load(entry_starts + row + 1)
        is_listed = 0
        listed_logit = 0.0
        for chunk in range(tl.load(entry_starts + row), last, ENTRIES):
            index = chunk + tl.arange(0, ENTRIES)
            own = tl.load(entry_tokens + index, mask=index < last, other=-1) == token
            listed_logit += tl.sum(tl.load(entry_logits + index, mask=own, other=0.0), axis=0)
            is_listed += tl.sum(own.to(tl.int32), axis=0)
        if HAS_PENDING:  # noqa: SIM102 - a compile-time condition
            if (is_listed == 0) & (tl.load(pending_tokens + row) == token):
                is_listed += 1
                listed_logit += tl.load(pending_logits + row)
        logit = tl.where(is_listed > 0, listed_logit, logit)
    tl.store(out_logprobs + row, logit - raw_max - tl.log(total))
    tl.store(out_finite + row, finite)
