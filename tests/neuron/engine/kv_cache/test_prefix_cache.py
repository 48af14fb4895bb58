"""Prefixes found by hash: what tells pages apart, what is found, and what is forgotten."""

from __future__ import annotations

import pytest
from neuron.engine.kv_cache.page_pool import OutOfPages, PagePool
from neuron.engine.kv_cache.prefix_cache import PageHashes, PrefixCache
from neuron.protocol import ContentDigest

PAGE = 4


def filled(num_pages: int, tokens: list[int]) -> tuple[PagePool, PrefixCache, list[int]]:
    """A pool whose first pages hold all full pages of `tokens`, and are held."""
    pool = PagePool(num_pages)
    cache = PrefixCache(pool, PAGE, root="m:0")
    hashes = PageHashes()
    cache.extend_hashes(hashes, tokens, len(tokens) // PAGE)
    pages = pool.allocate(len(hashes))
    for page, page_hash in zip(pages, hashes, strict=True):
        cache.register(page, page_hash)
    return pool, cache, pages


def hashes_of(tokens: list[int], num_pages: int, salt: str = "", *contents: ContentDigest) -> PageHashes:
    hashes = PageHashes(salt, contents)
    PrefixCache(PagePool(5), PAGE, root="m:0").extend_hashes(hashes, tokens, num_pages)
    return hashes


def test_least_recently_used_prefixes_are_evicted_tail_first():
    pool = PagePool(5)
    cache = PrefixCache(pool, PAGE, root="m:0")
    tokens = list(range(16))
    hashes = PageHashes()
    cache.extend_hashes(hashes, tokens, 4)
    pages = pool.allocate(4)
    for page, page_hash in zip(pages, hashes, strict=True):
        cache.register(page, page_hash)
    pool.release(pages)
    assert pool.num_free == 4 and pool.num_idle == 4
    assert pool.allocate(1) == [pages[3]]
    assert cache.match(PageHashes(), [*tokens, 99]) == pages[:3]
    with pytest.raises(OutOfPages):
        pool.allocate(4)
    assert pool.num_free == 3


def test_the_prefix_of_another_model_or_epoch_is_not_found():
    pool = PagePool(5)
    hashes = [PageHashes(), PageHashes()]
    for root, target in zip(("m:0", "m:1"), hashes, strict=True):
        PrefixCache(pool, PAGE, root=root).extend_hashes(target, list(range(8)), 2)
    assert not set(hashes[0]) & set(hashes[1])


def test_H10_prefixes_of_other_salts_are_not_found():
    tokens = list(range(4 * PAGE))
    plain, one, again, two = (hashes_of(tokens, 4, salt) for salt in ("", "a", "a", "b"))
    assert one == again
    assert len({*plain, *one, *two}) == 12


def test_what_stands_at_placeholders_tells_pages_apart():
    """An image that reaches from the second page into the third: every page from the second on depends on it."""
    tokens = [7] * (4 * PAGE)
    plain = hashes_of(tokens, 4)
    image = ContentDigest(PAGE + 1, PAGE, b"image")
    seen = hashes_of(tokens, 4, "", image)
    assert seen == hashes_of(tokens, 4, "", ContentDigest(PAGE + 1, PAGE, b"image"))
    assert [a == b for a, b in zip(plain, seen, strict=True)] == [True, False, False, False]
    others = (ContentDigest(PAGE + 1, PAGE, b"other"), ContentDigest(PAGE + 2, PAGE, b"image"))
    for other in others:
        assert [a == b for a, b in zip(seen, hashes_of(tokens, 4, "", other), strict=True)] == [True] + [False] * 3
    only_third = ContentDigest(2 * PAGE, PAGE, b"image")
    assert hashes_of(tokens, 2, "", only_third) == plain[:2]


def test_the_last_token_is_always_computed() -> None:
    tokens = list(range(2 * PAGE))
    _, cache, pages = filled(5, tokens)
    assert cache.match(PageHashes(), tokens) == pages[:1]
    assert cache.match(PageHashes(), [*tokens, 99]) == pages
    assert cache.match(PageHashes(), [99, *tokens]) == []


def test_of_two_pages_with_one_content_the_first_is_found() -> None:
    tokens = list(range(PAGE))
    pool, cache, pages = filled(4, tokens)
    (twin,) = pool.allocate(1)
    cache.register(twin, hashes_of(tokens, 1)[0])
    assert cache.match(PageHashes(), [*tokens, 99]) == pages
    pool.release([twin])
    assert pool.num_idle == 0, "nobody can find the twin, so it is blank"


def test_forgotten_pages_are_not_found_and_a_clear_forgets_all() -> None:
    tokens = list(range(3 * PAGE))
    pool, cache, pages = filled(5, tokens)
    cache.forget(pages[1:2])
    assert cache.match(PageHashes(), [*tokens, 99]) == pages[:1]
    pool.release(pages)
    assert pool.num_idle == 2
    cache.clear()
    assert cache.match(PageHashes(), [*tokens, 99]) == []
    assert pool.num_idle == 0 and pool.num_free == 4 and cache.check() == []


def test_a_cache_that_is_off_finds_and_counts_nothing() -> None:
    pool = PagePool(3)
    cache = PrefixCache(pool, PAGE, root="m:0", enabled=False)
    tokens = list(range(PAGE))
    cache.register(pool.allocate(1)[0], hashes_of(tokens, 1)[0])
    cache.record(10, 4)
    assert cache.match(PageHashes(), [*tokens, 99]) == [] and (cache.query_tokens, cache.hit_tokens) == (0, 0)
