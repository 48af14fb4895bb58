"""Copies of real files in real anonymous memory."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from neuron.daemon.memory.weight_cache import CopyState, WeightCache, default_budget_bytes, victims

MIB = 2**20


def folder_of(parent: Path, name: str, size: int = MIB) -> Path:
    folder = parent / name
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(os.urandom(size))
    return folder


def cache_of(budget: int, *, free: Callable[[], int] = lambda: 2**40) -> WeightCache:
    return WeightCache(budget, free_bytes=free, headroom_bytes=MIB)


async def visit(cache: WeightCache, path: Path) -> bool:
    """Load and unload; whether it was read from memory."""
    found = await cache.descriptors(path)
    close(found)
    cache.loaded(path, str(path))
    await cache.settled()
    cache.unloaded(path, str(path))
    await cache.settled()
    return bool(found)


def close(descriptors: dict[str, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_a_copy_is_the_files_byte_for_byte_and_cannot_be_changed(tmp_path: Path) -> None:
    path = folder_of(tmp_path, "a", 3 * MIB + 17)
    cache = cache_of(10 * MIB)
    assert await cache.descriptors(path) == {}
    cache.loaded(path, "a")
    await cache.settled()
    content = (path / "model.safetensors").read_bytes()
    found = await cache.descriptors(path)
    (descriptor,) = found.values()
    assert list(found) == ["model.safetensors"]
    assert os.pread(descriptor, 4 * MIB, 0) == content
    with pytest.raises(PermissionError):
        os.pwrite(descriptor, b"x", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(descriptor, 0)
    assert (cache.hits, cache.misses, cache.held_bytes) == (1, 1, len(content))
    cache.close()
    assert os.pread(descriptor, 100, 0) == content[:100]  # whoever reads it goes on
    close(found)


async def test_what_was_used_longest_ago_makes_room_within_the_budget(tmp_path: Path) -> None:
    cache = cache_of(2 * MIB)
    a, b, c = (folder_of(tmp_path, name) for name in "abc")
    for path in (a, b, a, c):
        await visit(cache, path)
    assert {copy.path for copy in cache.held} == {a, c}
    assert cache.held_bytes == 2 * MIB and cache.given_up["budget"] == 1
    assert await visit(cache, a) and not await visit(cache, b)
    cache.close()


async def test_a_loaded_model_is_copied_only_where_that_costs_nobody_anything(tmp_path: Path) -> None:
    cache = cache_of(MIB)
    a, b = folder_of(tmp_path, "a"), folder_of(tmp_path, "b")
    await visit(cache, a)
    cache.loaded(b, "b")
    await cache.settled()
    assert [copy.path for copy in cache.held] == [a]
    cache.unloaded(b, "b")
    await cache.settled()
    assert [copy.path for copy in cache.held] == [b]
    cache.close()


async def test_larger_than_the_budget_is_not_copied_and_no_budget_copies_nothing(tmp_path: Path) -> None:
    large, small = folder_of(tmp_path, "large", 3 * MIB), folder_of(tmp_path, "small")
    cache = cache_of(2 * MIB)
    await visit(cache, small)
    await visit(cache, large)
    assert [copy.path for copy in cache.held] == [small]
    cache.close()
    off = cache_of(0)
    await visit(off, small)
    assert (off.held, off.misses) == ([], 0)


@pytest.mark.parametrize("change", ["time", "content", "replaced", "gone"])
async def test_files_that_have_changed_are_not_read_from_their_copy(tmp_path: Path, change: str) -> None:
    path = folder_of(tmp_path, "a")
    file = path / "model.safetensors"
    cache = cache_of(10 * MIB)
    await visit(cache, path)
    if change == "time":
        os.utime(file, ns=(1, 1))
    elif change == "content":
        file.write_bytes(bytes(2 * MIB))
    elif change == "gone":
        file.unlink()
    else:
        status = file.stat()
        (path / "other").write_bytes(bytes(MIB))
        os.utime(path / "other", ns=(status.st_atime_ns, status.st_mtime_ns))
        (path / "other").replace(file)
    assert await cache.descriptors(path) == {}
    assert cache.given_up["changed"] == 1 and cache.held_bytes == 0
    if change != "gone":
        await visit(cache, path)
        found = await cache.descriptors(path)
        assert os.pread(found["model.safetensors"], 3 * MIB, 0) == file.read_bytes()
        close(found)
    cache.close()


async def test_short_memory_takes_copies_back_and_makes_no_new_ones(tmp_path: Path) -> None:
    free = 100 * MIB
    cache = cache_of(10 * MIB, free=lambda: free)
    a, b, c = (folder_of(tmp_path, name) for name in "abc")
    for path in (a, b, c):
        await visit(cache, path)
    cache.relieve()
    assert len(cache.held) == 3
    free = MIB // 2
    cache.relieve()
    assert {copy.path for copy in cache.held} == {b, c}
    cache.give_up(2 * MIB, keep=b)
    assert cache.held == []
    await visit(cache, a)
    assert cache.held == [] and cache.given_up["memory"] == 3


async def test_memory_that_becomes_short_while_copying_ends_the_copying(tmp_path: Path) -> None:
    answers = iter([100 * MIB])
    cache = cache_of(10 * MIB, free=lambda: next(answers, 0))
    before = open_descriptors()
    await visit(cache, folder_of(tmp_path, "a"))
    assert cache.held == [] and open_descriptors() == before


async def test_nothing_is_left_open(tmp_path: Path) -> None:
    paths = [folder_of(tmp_path, name) for name in "abcd"]
    before = open_descriptors()
    cache = cache_of(2 * MIB)
    for path in (*paths, *paths):
        await visit(cache, path)
    cache.unloaded(paths[0], "a")
    cache.close()
    await cache.settled()
    await asyncio.sleep(0)
    assert open_descriptors() == before


@given(
    st.lists(st.tuples(st.integers(1, 50), st.booleans(), st.integers(0, 9)), max_size=8),
    st.integers(-5, 300),
    st.integers(0, 8),
)
def test_no_more_is_given_up_than_needed_and_in_the_right_order(
    drawn: list[tuple[int, bool, int]], needed: int, kept: int
) -> None:
    copies = [CopyState(Path(str(index)), *fields) for index, fields in enumerate(drawn)]
    keep = Path(str(kept))
    chosen = victims(copies, needed, keep=keep)
    freed = sum(copy.num_bytes for copy in chosen)
    assert freed >= needed or len(chosen) == len(copies)
    assert not chosen or freed - chosen[-1].num_bytes < needed
    spared = [copy for copy in copies if copy not in chosen]
    if any(copy.path == keep for copy in chosen):
        assert not spared
    for gone in chosen:
        for left in spared:
            if left.path != keep:
                assert gone.is_loaded or not left.is_loaded
                assert gone.is_loaded != left.is_loaded or gone.last_used <= left.last_used


def test_the_default_takes_a_share_where_models_live_on_devices() -> None:
    assert default_budget_bytes(64 * MIB, has_devices=True) == 16 * MIB
    assert default_budget_bytes(64 * MIB, has_devices=False) == 0
