from __future__ import annotations

import pytest
from neuron.engine.errors import ModelError
from neuron.parallel.group import ParallelGroup
from neuron.parallel.sharding import UnsupportedSharding, shard_evenly, shard_kv_heads, shard_vocabulary, whole


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
    assert isinstance(caught.value, ModelError)
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
