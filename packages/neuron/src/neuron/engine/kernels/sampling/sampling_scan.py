"""The first launch of sampling: every logit once, over the whole device. See `kernels.sampling.sampling`."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disallow-untyped-calls=False

from __future__ import annotations

import triton
import triton.language as tl

NO_TOKEN = tl.constexpr(2**31 - 1)

# Parameters may be rows of one small tensor: their alignment varies with the number of rows and is worth no variant.
UNALIGNED = [
    "temperatures",
    "top_ks",
    "top_ps",
    "min_ps",
    "keys",
    "entry_starts",
    "entry_tokens",
    "entry_biases",
    "entry_uses",
    "penalties",
    "pending_tokens",
    "mask_rows",
]


@triton.jit
def log_exponential_noise(key, token):
    """log(E), E standard exponential, of int64 keys and integer tokens: `engine.sampling.sampling_noise` in a kernel.

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
def best(score, token):
    """(largest score, its token, the smallest among equals)."""
    best = tl.max(score, axis=0)
    return best, tl.min(tl.where(score == best, token, NO_TOKEN), axis=0)


@triton.jit
def _penalised(logit, bias, uses, more, presence, frequency, repetition):
    """A listed token's logit: `neuron.engine.scheduler.token_bias`, `more` occurrences than were counted."""
    occurrences = (uses >> 1) + more
    factor = tl.where((uses > 0) | (more > 0), repetition, 1.0)
    summand = bias - presence * tl.where(occurrences > 0, 1.0, 0.0)
    summand -= frequency * occurrences.to(tl.float32)
    return tl.where(logit > 0.0, tl.div_rn(logit, factor), logit * factor) + summand


@triton.jit
def _penalise_tile(
    logits,
    entry_starts,
    entry_tokens,
    entry_biases,
    entry_uses,
    entry_logits,
    penalties,
    pending_tokens,
    pending_logits,
    row,
    begin,
    end,
    HAS_PENDING: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Rewrite the logits of listed tokens in [begin, end), and keep what they were in `entry_logits`.

    logits: of the row. Returns whether there was any.
    """
    first = tl.load(entry_starts + row)
    last = tl.load(entry_starts + row + 1)
    presence = tl.load(penalties + row * 3)
    frequency = tl.load(penalties + row * 3 + 1)
    repetition = tl.load(penalties + row * 3 + 2)
    if HAS_PENDING:  # noqa: SIM108
        pending = tl.load(pending_tokens + row)
    else:
        pending = tl.full([], -1, tl.int64)
    is_here = (pending >= begin) & (pending < end)
    changed = is_here.to(tl.int32)
    is_listed = 0
    for chunk in range(first, last, ENTRIES):
        index = chunk + tl.arange(0, ENTRIES)
        token = tl.load(entry_tokens + index, mask=index < last, other=-1)
        mine = (token >= begin) & (token < end)
        logit = tl.load(logits + token, mask=mine, other=0.0)
        bias = tl.load(entry_biases + index, mask=mine, other=0.0)
        uses = tl.load(entry_uses + index, mask=mine, other=0)
        is_pending = mine & (token == pending)
        value = _penalised(logit.to(tl.float32), bias, uses, is_pending.to(tl.int32), presence, frequency, repetition)
        tl.store(entry_logits + index, logit.to(tl.float32), mask=mine)
        tl.store(logits + token, value.to(logits.dtype.element_ty), mask=mine)
        is_listed += tl.sum(is_pending.to(tl.int32), axis=0)
        changed += tl.sum(mine.to(tl.int32), axis=0)
    if is_here & (is_listed == 0):
        logit = tl.load(logits + pending)
        none = tl.zeros([], tl.int32)
        value = _penalised(logit.to(tl.float32), 0.0, none, none + 1, presence, frequency, repetition)
        tl.store(pending_logits + row, logit.to(tl.float32))
        # All threads have read before one of them writes.
        tl.debug_barrier()
        tl.store(logits + pending, value.to(logits.dtype.element_ty))
    return changed > 0


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def scan_kernel(
    logits,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    keys,
    entry_starts,
    entry_tokens,
    entry_biases,
    entry_uses,
    entry_logits,
    penalties,
    pending_tokens,
    pending_logits,
    mask_words,
    mask_rows,
    group_max,
    tile_floats,
    tile_tokens,
    stride_logits,
    stride_groups,
    stride_masks,
    VOCAB_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    NUM_TILES: tl.constexpr,
    HAS_PENALTIES: tl.constexpr,
    HAS_PENDING: tl.constexpr,
    HAS_MASKS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    temperature = tl.load(temperatures + row)
    sampled = temperature > 0.0
    divisor = tl.where(sampled, temperature, 1.0)
    group = tl.arange(0, TILE // GROUP)
    token = tile * TILE + group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    live = token < VOCAB_SIZE
    logits += row * stride_logits
    value = tl.load(logits + token, mask=live, other=float("-inf")).to(tl.float32)
    bad = tl.max(
        (live & ((value != value) | (tl.abs(value) == float("inf")))).to(tl.int32).reshape(TILE),
        axis=0,
    )
    raw_max = tl.max(value.reshape(TILE), axis=0)
    total = tl.sum(tl.exp(value - tl.where(raw_max == float("-inf"), 0.0, raw_max)).reshape(TILE), axis=0)

    if HAS_PENALTIES:
        # Every thread has its part of the tile before another one changes it.
        tl.debug_barrier()
        changed = _penalise_tile(
            logits, entry_starts, entry_tokens, entry_biases, entry_uses, entry_logits, penalties, pending_tokens,
            pending_logits, row, tile * TILE, tl.minimum(tile * TILE + TILE, VOCAB_SIZE), HAS_PENDING, ENTRIES,
        )  # fmt: skip
        if changed:
            tl.debug_barrier()
            value = tl.load(logits + token, mask=live, other=float("-inf"), volatile=True).to(tl.float32)
    if HAS_MASKS:
        mask_row = tl.load(mask_rows + row).to(tl.int64)
        if mask_row >= 0:
            word = tl.load(mask_words + mask_row * stride_masks + token // 32, mask=live, other=0)
            refused = live & ((word >> (token % 32)) & 1 == 0)
            held = value
            value = tl.where(refused, float("-inf"), value)
            # NaN stays where it is: whoever asks what was wrong with the row finds it.
            tl.store(logits + token, value.to(logits.dtype.element_ty), mask=refused & (held == held))

    tl.store(group_max + row * stride_groups + tile * (TILE // GROUP) + group, tl.max(value, axis=1))
    value = value.reshape(TILE)
    token = token.reshape(TILE)
    maximum, best_token = best(value, token)
    scaled_total = tl.sum(tl.exp((value - tl.where(maximum == float("-inf"), 0.0, maximum)) / divisor), axis=0)

    # Per tile: maximum and sum as the model said; maximum, sum at the temperature, best noisy score of what is sampled
    # from; best token, best noisy token, bad.
    floats = tile_floats + (row * 5) * NUM_TILES + tile
    tokens = tile_tokens + (row * 3) * NUM_TILES + tile
    tl.store(floats, raw_max)
    tl.store(floats + NUM_TILES, total)
    tl.store(floats + 2 * NUM_TILES, maximum)
    tl.store(floats + 3 * NUM_TILES, scaled_total)
    tl.store(tokens, best_token)
    tl.store(tokens + 2 * NUM_TILES, bad)
    top_k = tl.load(top_ks + row)
    whole = ((top_k <= 0) | (top_k >= VOCAB_SIZE)) & (tl.load(top_ps + row) >= 1.0) & (tl.load(min_ps + row) <= 0.0)
    if sampled & whole:
        noise = log_exponential_noise(tl.load(keys + row), token)
        score, noisy_token = best(tl.div_rn(value, divisor) - noise, token)
        tl.store(floats + 4 * NUM_TILES, score)
        tl.store(tokens + NUM_TILES, noisy_token)
