"""Ownership of KV pages: reference counts over page numbers. Pure Python, no tensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence


class OutOfPages(Exception):
    """More pages were asked for than are free; the caller preempts or waits."""


class PagePool:
    """Hands out pages 1 … num_pages-1 and counts their holders.

    A page is in exactly one of four states: *held* (count > 0), *idle* (no holder, but its content can be found by
    the prefix cache; oldest first), *blank* (no holder, content worthless) or *dirty* (no holder, must be zeroed
    before it is handed out again). Blank pages are handed out before idle ones. Page 0 belongs to nobody.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 2:
            raise ValueError("a pool needs page 0 and at least one usable page")
        self.num_pages = num_pages
        self._counts: list[int] = []
        self._blank: list[int] = []
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._dirty: list[int] = []
        self._tainted: set[int] = set()
        self.reset()
        # Set by the prefix cache: which pages it can still find, and a notice that one is handed out for new content.
        self.is_findable: Callable[[int], bool] = lambda page: False
        self.on_reuse: Callable[[int], None] = lambda page: None

    def reset(self) -> None:
        """Start afresh: nobody holds anything and every page is blank."""
        self._counts = [0] * self.num_pages
        self._idle.clear()
        self._tainted.clear()
        self._dirty = []
        self._blank = list(range(self.num_pages - 1, 0, -1))

    @property
    def num_usable(self) -> int:
        """Pages that sequences can have in all; page 0 is not one of them."""
        return self.num_pages - 1

    @property
    def num_free(self) -> int:
        """Pages that `allocate` could give now: blank and idle ones."""
        return len(self._blank) + len(self._idle)

    @property
    def num_idle(self) -> int:
        """Free pages that still hold a reusable prefix."""
        return len(self._idle)

    def count(self, page: int) -> int:
        """Number of holders of a page."""
        return self._counts[page]

    def allocate(self, number: int) -> list[int]:
        """Pages with one holder each. Raises `OutOfPages`, and then takes none."""
        if number > self.num_free:
            raise OutOfPages(f"{number} pages wanted, {self.num_free} free")
        pages: list[int] = []
        for _ in range(number):
            if self._blank:
                page = self._blank.pop()
            else:
                page, _ = self._idle.popitem(last=False)
                self.on_reuse(page)
            self._counts[page] = 1
            pages.append(page)
        return pages

    def retain(self, pages: Iterable[int]) -> None:
        """One more holder for each page, which must be held or idle."""
        for page in pages:
            if self._counts[page] == 0:
                del self._idle[page]
            self._counts[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One holder less for each page.

        Pages are let go from the last to the first, so that the tail of a prefix is evicted before its head, without
        which the tail could not be found.
        """
        for page in reversed(pages):
            count = self._counts[page]
            if count <= 0:
                raise ValueError(f"page {page} is released but nobody holds it")
            self._counts[page] = count - 1
            if count == 1:
                if page in self._tainted:
                    self._tainted.discard(page)
                    self._dirty.append(page)
                elif self.is_findable(page):
                    self._idle[page] = None
                else:
                    self._blank.append(page)

    def taint(self, pages: Iterable[int]) -> None:
        """Mark held pages whose content must never be read again (NaN): they become dirty when let go."""
        self._tainted.update(pages)

    def forget(self, page: int) -> None:
        """The prefix cache can no longer find this page: if it was idle it becomes blank."""
        if page in self._idle:
            del self._idle[page]
            self._blank.append(page)

    def take_dirty(self) -> list[int]:
        """The dirty pages, to be zeroed by the caller and given back with `cleaned`."""
        pages, self._dirty = self._dirty, []
        return pages

    def cleaned(self, pages: Iterable[int]) -> None:
        """Zeroed pages become blank."""
        self._blank.extend(pages)

    def check(self, holders: Iterable[Sequence[int]]) -> list[str]:
        """Contradictions between this pool and the page lists of all living sequences; empty when all is well.

        Every page must be in one state only, and its count must equal the number of lists that name it.
        """
        expected = [0] * self.num_pages
        for pages in holders:
            for page in pages:
                expected[page] += 1
        problems: list[str] = []
        if expected[0]:
            problems.append("page 0 is held by a sequence")
        problems.extend(
            f"page {page} has count {self._counts[page]}, {expected[page]} holders"
            for page in range(1, self.num_pages)
            if expected[page] != self._counts[page]
        )
        free = [*self._blank, *self._idle, *self._dirty]
        if len(set(free)) != len(free):
            problems.append("a page is in two free lists")
        held = [page for page in range(1, self.num_pages) if self._counts[page]]
        if len(free) + len(held) != self.num_usable:
            problems.append(f"{len(free)} free and {len(held)} held pages of {self.num_usable}")
        if any(self._counts[page] for page in free):
            problems.append("a free page has a holder")
        problems.extend(f"idle page {page} cannot be found" for page in self._idle if not self.is_findable(page))
        return problems
