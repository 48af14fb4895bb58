"""Finding pages that already hold the keys and values of a prompt's beginning.

A full page is known by the hash of (hash of the page before it, its tokens, what else its content depends on), so equal
hashes mean equal whole prefixes (the hash-chain scheme of vLLM's automatic prefix caching; radix trees find the same
pages). Pages without a holder stay findable until the pool hands them out for new content, least recently let go first.

Two things tell pages of equal tokens apart. A *salt* begins the chain: requests with different salts never find each
other's pages, nor learn from the time an answer takes what others have asked. A *digest* names what stands at positions
whose tokens are placeholders (an image): it goes into the hash of every page that it reaches into.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

from neuron.engine.kv_cache.page_pool import PagePool
from neuron.protocol import ContentDigest

PageHash = bytes

# 128 bits of a cryptographic hash: nobody can craft a prompt that is answered from another prompt's pages.
_DIGEST_BYTES = 16


class PageHashes(list[PageHash]):
    """Hashes of the first pages of one sequence, as far as they were needed, and what they depend on besides tokens.

    salt: begins the chain. contents: digests by position, in order, none overlapping another.
    """

    __slots__ = ("contents", "salt")

    def __init__(self, salt: str = "", contents: Sequence[ContentDigest] = ()) -> None:
        super().__init__()
        self.salt = salt
        self.contents = tuple(contents)

    def content_of(self, start: int, end: int) -> bytes:
        """What the tokens from `start` up to `end` do not say of their content."""
        reaching = [each for each in self.contents if each.start < end and start < each.start + each.length]
        return b"".join(each.digest + (start - each.start).to_bytes(8, "little", signed=True) for each in reaching)


class PrefixCache:
    """Maps page hashes to pages of one pool. `root` names what the content depends on besides tokens: model, epoch."""

    def __init__(self, pool: PagePool, page_size: int, *, root: str, enabled: bool = True) -> None:
        self._pool = pool
        self._page_size = page_size
        self.is_enabled = enabled
        self._root = blake2b(root.encode(), digest_size=_DIGEST_BYTES).digest()
        self._page_of: dict[PageHash, int] = {}
        self._hash_of: dict[int, PageHash] = {}
        self.query_tokens = 0
        self.hit_tokens = 0
        pool.is_findable = self._hash_of.__contains__
        pool.on_reuse = self._drop

    def extend_hashes(self, hashes: PageHashes, tokens: Sequence[int], num_pages: int) -> None:
        """Append to `hashes` those of the full pages of `tokens` up to `num_pages`."""
        page_size = self._page_size
        parent = hashes[-1] if hashes else self._first_parent(hashes.salt)
        for index in range(len(hashes), num_pages):
            content = array("q", tokens[index * page_size : (index + 1) * page_size]).tobytes()
            if hashes.contents:
                content += hashes.content_of(index * page_size, (index + 1) * page_size)
            parent = blake2b(parent + content, digest_size=_DIGEST_BYTES).digest()
            hashes.append(parent)

    def _first_parent(self, salt: str) -> PageHash:
        if not salt:
            return self._root
        return blake2b(self._root + salt.encode(), digest_size=_DIGEST_BYTES).digest()

    def match(self, hashes: PageHashes, tokens: Sequence[int]) -> list[int]:
        """Pages that hold the longest known beginning of `tokens`; not yet retained.

        At least the last token is left out, because its logits are wanted. `hashes` is extended as far as needed.
        """
        if not self.is_enabled:
            return []
        pages: list[int] = []
        for index in range((len(tokens) - 1) // self._page_size):
            self.extend_hashes(hashes, tokens, index + 1)
            page = self._page_of.get(hashes[index])
            if page is None:
                break
            pages.append(page)
        return pages

    def record(self, query_tokens: int, hit_tokens: int) -> None:
        """Count one admission: how many tokens were looked up and how many were found."""
        if self.is_enabled:
            self.query_tokens += query_tokens
            self.hit_tokens += hit_tokens

    def register(self, page: int, page_hash: PageHash) -> None:
        """A held page is full and its content has been computed. Of two pages with one content the first is kept."""
        if self.is_enabled and page not in self._hash_of and page_hash not in self._page_of:
            self._page_of[page_hash] = page
            self._hash_of[page] = page_hash

    def forget(self, pages: Sequence[int]) -> None:
        """Never find these pages again (their content is not to be trusted)."""
        for page in pages:
            if page in self._hash_of:
                self._drop(page)
                self._pool.forget(page)

    def clear(self) -> None:
        """Forget every page."""
        self.forget(list(self._hash_of))

    def _drop(self, page: int) -> None:
        page_hash = self._hash_of.pop(page, None)
        if page_hash is not None:
            del self._page_of[page_hash]

    def check(self) -> list[str]:
        """Contradictions inside the two maps; empty when all is well."""
        problems: list[str] = []
        if len(self._page_of) != len(self._hash_of):
            problems.append("the two maps of the prefix cache differ in size")
        problems.extend(
            f"page {page} is not found under its own hash"
            for page, page_hash in self._hash_of.items()
            if self._page_of.get(page_hash) != page
        )
        return problems
