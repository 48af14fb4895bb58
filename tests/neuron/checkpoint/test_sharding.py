from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from neuron.checkpoint.sharding import (
    UnsupportedSharding,
    apportion,
    shard_columns,
    shard_evenly,
    shard_heads,
    shard_kv_heads,
    shard_vocabulary,
    vocabulary_sizes,
    whole,
)
from neuron.engine.parallel.group import ParallelGroup


def groups(world_size: int) -> list[ParallelGroup]:
    return [ParallelGroup(rank, world_size) for rank in range(world_size)]


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_even_shards_tile_the_dimension(world_size: int) -> None:
    shards = [shard_evenly(24, group, what="heads") for group in groups(world_size)]
    covered = [element for shard in shards for element in range(shard.slice.start, shard.slice.stop)]
    assert covered == list(range(24))
    assert {shard.total for shard in shards} == {24}


def test_a_size_that_does_not_divide_is_refused_with_the_numbers() -> None:
    with pytest.raises(UnsupportedSharding, match=r"number of heads \(6\).*tensor parallel size 4") as caught:
        shard_evenly(6, ParallelGroup(0, 4), what="number of heads")
    assert caught.value.kind == "unsupported_parallelism"


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "world_size"), [(8, 2, 4), (8, 1, 8), (16, 8, 4), (4, 4, 2)])
def test_each_rank_holds_the_kv_head_of_its_query_heads(num_heads: int, num_kv_heads: int, world_size: int) -> None:
    for group in groups(world_size):
        query = shard_evenly(num_heads, group, what="heads")
        kv = shard_kv_heads(num_kv_heads, group)
        needed = {head * num_kv_heads // num_heads for head in range(query.start, query.start + query.length)}
        assert needed == set(range(kv.start, kv.start + kv.length))


def test_kv_heads_that_cannot_be_replicated_evenly_are_refused() -> None:
    with pytest.raises(UnsupportedSharding, match=r"4 is not a multiple of the number of KV heads \(3\)"):
        shard_kv_heads(3, ParallelGroup(0, 4))
    with pytest.raises(UnsupportedSharding, match=r"KV heads \(6\)"):
        shard_kv_heads(6, ParallelGroup(0, 4))


@pytest.mark.parametrize(("vocab_size", "world_size"), [(199, 1), (199, 2), (199, 4), (5, 4), (8, 4), (3, 4)])
def test_vocabulary_shards_cover_every_row_once(vocab_size: int, world_size: int) -> None:
    covered: list[int] = []
    for group in groups(world_size):
        shard, rows = shard_vocabulary(vocab_size, group)
        assert 0 <= shard.length <= rows
        assert rows * world_size >= vocab_size
        # Gathered logits are cut at vocab_size, so a real row must never sit behind another rank's padding.
        assert shard.length == 0 or shard.start == group.rank * rows
        covered += range(shard.start, shard.start + shard.length)
    assert covered == list(range(vocab_size))


def test_scaling_counts_the_same_part_in_smaller_units() -> None:
    shard = shard_evenly(8, ParallelGroup(1, 4), what="heads").scaled(16)
    assert (shard.slice, shard.total) == (slice(32, 64), 128)
    assert whole(5).slice == slice(0, 5)


def unequal(*shares: int) -> list[ParallelGroup]:
    return [ParallelGroup(rank, len(shares), shares=shares) for rank in range(len(shares))]


@given(st.integers(1, 5000), st.lists(st.integers(1, 1000), min_size=1, max_size=8))
def test_apportioned_parts_sum_up_and_are_within_one_of_the_ratio(total: int, shares: list[int]) -> None:
    if total < len(shares):
        with pytest.raises(UnsupportedSharding):
            apportion(total, shares, what="heads")
        return
    sizes = apportion(total, shares, what="heads")
    assert sum(sizes) == total and min(sizes) >= 1
    quotas = [total * share / sum(shares) for share in shares]
    if min(quotas) >= 1:
        assert all(abs(size - quota) < 1 + 1e-9 for size, quota in zip(sizes, quotas, strict=True))


def test_equal_shares_are_no_shares() -> None:
    assert ParallelGroup(0, 3, shares=(7, 7, 7)).shares == ()


@pytest.mark.parametrize("shares", [(1,), (1, 0), (1, 2, 3)])
def test_shares_that_do_not_fit_the_group_are_refused(shares: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="as many shares"):
        ParallelGroup(0, 2, shares=shares)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "shares", "queries"),
    [
        (32, 8, (3, 1), [24, 8]),
        (32, 8, (2, 1), [20, 12]),  # 5 and 3 KV heads with their 4 query heads each
        (28, 4, (3, 2, 2), [14, 7, 7]),
        (8, 1, (3, 1), [6, 2]),  # one KV head, held twice
        (16, 2, (3, 1, 1, 1), [6, 2, 4, 4]),  # each KV head held by two ranks, which divide its query heads
        (4, 2, (9, 1), [2, 2]),  # as near as whole heads come
    ],
)
def test_unequal_heads_keep_queries_with_their_keys(
    num_heads: int, num_kv_heads: int, shares: tuple[int, ...], queries: list[int]
) -> None:
    covered: list[int] = []
    held: set[int] = set()
    for group, expected in zip(unequal(*shares), queries, strict=True):
        query, kv = shard_heads(num_heads, num_kv_heads, group)
        assert query.length == expected
        needed = {head * num_kv_heads // num_heads for head in range(query.start, query.start + query.length)}
        assert needed == set(range(kv.start, kv.start + kv.length))
        # Attention pairs query head i with KV head i // (queries per KV head of this rank).
        assert query.length % kv.length == 0
        covered += range(query.start, query.start + query.length)
        held |= needed
    assert covered == list(range(num_heads)) and held == set(range(num_kv_heads))


def test_unequal_heads_that_are_too_few_are_refused_with_the_numbers() -> None:
    with pytest.raises(UnsupportedSharding, match=r"attention heads per KV head \(1\) cannot be divided among 2"):
        shard_heads(2, 2, ParallelGroup(0, 4, shares=(1, 1, 1, 2)))
    with pytest.raises(UnsupportedSharding, match=r"3 is not a multiple of the number of KV heads \(2\)"):
        shard_heads(8, 2, ParallelGroup(0, 3, shares=(1, 1, 2)))


@pytest.mark.parametrize(
    ("total", "shares", "unit"), [(11008, (2, 1), 128), (80, (3, 1), 4), (17, (1, 2), 1), (151_936, (24, 16, 12), 128)]
)
def test_unequal_columns_come_in_runs(total: int, shares: tuple[int, ...], unit: int) -> None:
    shards = [shard_columns(total, group, what="columns") for group in unequal(*shares)]
    assert all(shard.start % unit == 0 and shard.length % unit == 0 for shard in shards)
    assert [element for shard in shards for element in (shard.start, shard.start + shard.length)][1:-1] == [
        edge for shard in shards[1:] for edge in (shard.start, shard.start)
    ]
    assert sum(shard.length for shard in shards) == total
    for shard, share in zip(shards, shares, strict=True):
        assert abs(shard.length - total * share / sum(shares)) <= unit


def test_an_unequal_vocabulary_allocates_what_it_holds() -> None:
    groups_of_two = unequal(3, 1)
    assert vocabulary_sizes(199, groups_of_two[0]) == [149, 50]
    shards = [shard_vocabulary(199, group) for group in groups_of_two]
    assert [(shard.start, shard.length, rows) for shard, rows in shards] == [(0, 149, 149), (149, 50, 50)]
    assert vocabulary_sizes(199, ParallelGroup(0, 2)) is None
