"""Page ownership: states, counts, and the order in which pages are handed out."""

from __future__ import annotations

import pytest
from neuron.engine.kv_cache.page_pool import OutOfPages, PagePool


def test_page_zero_is_nobodys_and_the_others_are_blank() -> None:
    pool = PagePool(4)
    assert (pool.num_usable, pool.num_free, pool.num_idle) == (3, 3, 0)
    assert sorted(pool.allocate(3)) == [1, 2, 3]
    with pytest.raises(OutOfPages, match="1 pages wanted, 0 free"):
        pool.allocate(1)
    with pytest.raises(ValueError, match="at least one usable page"):
        PagePool(1)


def test_a_page_is_free_when_its_last_holder_lets_it_go() -> None:
    pool = PagePool(3)
    pages = pool.allocate(1)
    pool.retain(pages)
    pool.release(pages)
    assert pool.count(pages[0]) == 1 and pool.num_free == 1
    pool.release(pages)
    assert pool.count(pages[0]) == 0 and pool.num_free == 2


def test_pages_released_twice_are_an_error() -> None:
    pool = PagePool(3)
    pages = pool.allocate(1)
    pool.release(pages)
    with pytest.raises(ValueError, match="nobody holds it"):
        pool.release(pages)


def test_blank_pages_go_before_idle_ones_and_those_tail_first() -> None:
    pool = PagePool(5)
    pool.is_findable = {2, 3, 4}.__contains__
    reused: list[int] = []
    pool.on_reuse = reused.append
    assert pool.allocate(4) == [1, 2, 3, 4]
    pool.release([2, 3, 4])
    pool.release([1])
    assert (pool.num_free, pool.num_idle) == (4, 3)
    assert pool.allocate(3) == [1, 4, 3] and reused == [4, 3]


def test_a_match_takes_an_idle_page_back() -> None:
    pool = PagePool(3)
    pool.is_findable = lambda page: True
    pages = pool.allocate(1)
    pool.release(pages)
    pool.retain(pages)
    assert (pool.count(pages[0]), pool.num_idle, pool.num_free) == (1, 0, 1)


def test_a_page_that_cannot_be_found_any_more_is_blank() -> None:
    pool = PagePool(3)
    findable = {1}
    pool.is_findable = findable.__contains__
    pool.release(pool.allocate(1))
    findable.clear()
    assert pool.check([]) == ["idle page 1 cannot be found"]
    pool.forget(1)
    assert (pool.num_idle, pool.num_free) == (0, 2) and pool.check([]) == []


def test_tainted_pages_are_free_only_when_they_have_been_zeroed() -> None:
    pool = PagePool(3)
    pool.is_findable = lambda page: True
    pages = pool.allocate(2)
    pool.taint(pages[:1])
    pool.release(pages)
    assert (pool.num_free, pool.num_idle) == (1, 1)
    dirty = pool.take_dirty()
    assert dirty == pages[:1] and pool.take_dirty() == []
    pool.cleaned(dirty)
    assert pool.num_free == 2 and pool.check([]) == []


def test_a_check_names_every_contradiction() -> None:
    pool = PagePool(4)
    first, second = pool.allocate(2)
    assert pool.check([[first], [second]]) == []
    assert pool.check([[first, second], [second]]) == [f"page {second} has count 1, 2 holders"]
    assert pool.check([[first], [0]]) == ["page 0 is held by a sequence", f"page {second} has count 1, 0 holders"]


def test_a_reset_forgets_everything() -> None:
    pool = PagePool(4)
    pool.taint(pool.allocate(2))
    pool.reset()
    assert pool.num_free == 3 and pool.take_dirty() == [] and pool.check([]) == []
