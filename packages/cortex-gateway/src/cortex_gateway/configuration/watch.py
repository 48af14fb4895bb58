"""Detection of files that have changed and been written to their end."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

Print = tuple[int, int, int, int, int]
Prints = tuple[tuple[str, Print | None], ...]
"""Of each file what tells whether it is another one now; None where there is none."""


def prints_of(paths: Iterable[str]) -> Prints:
    """Links are followed: editors replace a file by renaming, configuration management swaps a link."""
    return tuple((path, _print(path)) for path in paths)


def _print(path: str) -> Print | None:
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


LOOKS = 2
"""So many looks in a row see the same before it is read."""


class Settling:
    """Look by look: a change is due once two looks in a row have seen the same, so that nobody reads half a file."""

    def __init__(self) -> None:
        self._taken: Prints | None = None
        self._seen: Prints | None = None
        self._num_looks = 0
        self._needed = LOOKS

    def take(self, prints: Prints) -> None:
        """The files were read when they looked like this."""
        self._taken = prints

    def hold(self, looks: int = LOOKS) -> None:
        """What was due is not believed yet: only when it has been seen so often in a row."""
        self._taken = None
        self._needed = looks

    def is_due(self, prints: Prints) -> bool:
        """Whether to read what looks like this now; then it counts as taken."""
        if prints == self._seen:
            self._num_looks += 1
        else:
            self._seen, self._num_looks, self._needed = prints, 1, LOOKS
        if prints == self._taken or self._num_looks < self._needed:
            return False
        self._taken = prints
        return True
