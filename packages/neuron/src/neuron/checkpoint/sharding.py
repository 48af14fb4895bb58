"""Tensor-parallel sharding of a dimension: the Megatron split (Shoeybi et al. 2019, section 3) as plain arithmetic.

Ranks hold equal parts unless their group has `shares`, relative sizes for devices of different memory; then each
dimension is apportioned in whole units (heads, runs of columns) that come as near to the ratio as they can.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from neuron.checkpoint.errors import UnsupportedSharding

# Columns and rows are apportioned in runs of at most this many (what a matrix product's tiles are wide), and of fewer
# where that would leave a rank with less than _MIN_UNITS of them.
_MAX_UNIT = 128
_MIN_UNITS = 8


class Rank(Protocol):
    """One of the ranks that share a model: `rank` of `world_size`, with the relative sizes of all of them.

    No shares: equal parts. A group of processes is one, and so is `RankOf`.
    """

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    @property
    def shares(self) -> Sequence[int]: ...


@dataclass(frozen=True, slots=True)
class RankOf:
    """A rank as plain data, for whoever reckons with ranks that are not there (yet)."""

    rank: int = 0
    world_size: int = 1
    shares: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Shard:
    """`length` elements of a dimension of `total`, beginning at `start`."""

    start: int
    length: int
    total: int

    @property
    def slice(self) -> slice:
        return slice(self.start, self.start + self.length)

    def scaled(self, factor: int) -> Shard:
        """The same part counted in units `factor` times smaller (heads into rows)."""
        return Shard(self.start * factor, self.length * factor, self.total * factor)


def whole(total: int) -> Shard:
    """Everything: what a replicated dimension reads."""
    return Shard(0, total, total)


def apportion(total: int, shares: Sequence[int], *, what: str) -> list[int]:
    """Whole numbers in the ratio of `shares` that sum to `total`, each at least 1 (method of largest remainders).

    Raises `UnsupportedSharding` where there are fewer than one for each.
    """
    if total < len(shares):
        raise UnsupportedSharding(f"{what} ({total}) cannot be divided among {len(shares)} ranks")
    quotas = [total * share / sum(shares) for share in shares]
    sizes = [max(int(quota), 1) for quota in quotas]
    while (missing := total - sum(sizes)) != 0:
        # Whoever is furthest below its quota gets one; the minimum of 1 may also have given out too many.
        gaps = [(quota - size, -rank) for rank, (quota, size) in enumerate(zip(quotas, sizes, strict=True))]
        if missing > 0:
            sizes[-max(gaps)[1]] += 1
        else:
            sizes[-min(gap for gap in gaps if sizes[-gap[1]] > 1)[1]] -= 1
    return sizes


def _part(sizes: Sequence[int], rank: int) -> Shard:
    return Shard(sum(sizes[:rank]), sizes[rank], sum(sizes))


def shard_evenly(total: int, group: Rank, *, what: str) -> Shard:
    """An equal part for each rank. `what` names the dimension in the error. Raises `UnsupportedSharding`."""
    if total % group.world_size:
        raise UnsupportedSharding(f"{what} ({total}) does not divide by the tensor parallel size {group.world_size}")
    length = total // group.world_size
    return Shard(group.rank * length, length, total)


def shard_heads(num_heads: int, num_kv_heads: int, group: Rank) -> tuple[Shard, Shard]:
    """(query heads, KV heads) of a rank: its query heads are those that attend to the KV heads it holds.

    KV heads are divided with all their query heads while there are enough of them; else neighbouring ranks hold the
    same KV head and divide its query heads. Raises `UnsupportedSharding`.
    """
    if not group.shares:
        query = shard_evenly(num_heads, group, what="number of attention heads")
        return query, shard_kv_heads(num_kv_heads, group)
    heads_per_kv = num_heads // num_kv_heads
    if num_kv_heads >= group.world_size:
        kv = _part(apportion(num_kv_heads, group.shares, what="number of KV heads"), group.rank)
        return kv.scaled(heads_per_kv), kv
    kv = shard_kv_heads(num_kv_heads, group)
    num_replicas = group.world_size // num_kv_heads
    shares = group.shares[kv.start * num_replicas : (kv.start + 1) * num_replicas]
    sizes = apportion(heads_per_kv, shares, what="number of attention heads per KV head")
    own = _part(sizes, group.rank % num_replicas)
    return Shard(kv.start * heads_per_kv + own.start, own.length, num_heads), kv


def shard_kv_heads(num_kv_heads: int, group: Rank) -> Shard:
    """KV heads of a rank: an equal part, or one head held by several ranks when there are fewer heads than ranks.

    Replicas are neighbours, so that a rank's query heads (split evenly) belong to the KV head it holds.
    Raises `UnsupportedSharding` when neither number divides the other.
    """
    if num_kv_heads >= group.world_size:
        return shard_evenly(num_kv_heads, group, what="number of KV heads")
    if group.world_size % num_kv_heads:
        raise UnsupportedSharding(
            f"tensor parallel size {group.world_size} is not a multiple of the number of KV heads ({num_kv_heads})"
        )
    return Shard(group.rank // (group.world_size // num_kv_heads), 1, num_kv_heads)


def shard_columns(total: int, group: Rank, *, what: str) -> Shard:
    """Part of a dimension that may be cut anywhere: equal, or in the ratio of the shares in runs of up to 128.

    Raises `UnsupportedSharding`.
    """
    if not group.shares:
        return shard_evenly(total, group, what=what)
    return _part(_apportion_in_runs(total, group, what=what), group.rank)


def _apportion_in_runs(total: int, group: Rank, *, what: str) -> list[int]:
    unit = _MAX_UNIT
    while unit > 1 and (total % unit or total // unit < _MIN_UNITS * group.world_size):
        unit //= 2
    return [size * unit for size in apportion(total // unit, group.shares, what=what)]


def shard_vocabulary(vocab_size: int, group: Rank) -> tuple[Shard, int]:
    """Rows of the vocabulary that a rank holds, and the number of rows it allocates.

    Vocabularies rarely divide evenly: with equal parts every rank allocates the same number of rows, the last ones
    hold fewer real rows (perhaps none) and pad with zeros, whose logits are cut off after the gather. With shares each
    allocates what it holds, and logits are padded for the gather. Raises `UnsupportedSharding`.
    """
    if group.shares:
        sizes = vocabulary_sizes(vocab_size, group)
        assert sizes is not None
        return _part(sizes, group.rank), sizes[group.rank]
    rows = -(-vocab_size // group.world_size)
    start = min(group.rank * rows, vocab_size)
    return Shard(start, min(rows, vocab_size - start), vocab_size), rows


def vocabulary_sizes(vocab_size: int, group: Rank) -> list[int] | None:
    """Rows of every rank where they differ, None with equal parts. Raises `UnsupportedSharding`."""
    if not group.shares:
        return None
    return _apportion_in_runs(vocab_size, group, what="vocabulary size")


def ranks_of(world_size: int, shares: Sequence[int] = ()) -> list[RankOf]:
    """All ranks of a group. shares: relative sizes; where they do not differ, parts are equal."""
    uneven = tuple(shares) if len(set(shares)) > 1 else ()
    return [RankOf(rank, world_size, uneven) for rank in range(world_size)]


def check_division(
    num_heads: int, num_kv_heads: int, intermediate_size: int, world_size: int, shares: Sequence[int] = ()
) -> None:
    """Whether a decoder of these sizes can be divided among so many ranks. Raises `UnsupportedSharding`."""
    for rank in ranks_of(world_size, shares):
        shard_heads(num_heads, num_kv_heads, rank)
        shard_columns(intermediate_size, rank, what="columns of its feed-forward block")
