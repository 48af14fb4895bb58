"""Text that waits for what follows it: appended at the end, taken from the beginning, each character copied once."""

from __future__ import annotations

from collections import deque


class HeldText:
    """`len` is in characters. num_blanks: of how many the white space at the end consists."""

    __slots__ = ("_first_start", "_pieces", "_size", "num_blanks")

    def __init__(self) -> None:
        self._pieces: deque[str] = deque()
        self._first_start = 0
        self._size = 0
        self.num_blanks = 0

    def __len__(self) -> int:
        return self._size

    def append(self, text: str) -> None:
        if not text:
            return
        self._pieces.append(text)
        self._size += len(text)
        after = len(text) - len(text.rstrip())
        self.num_blanks = after if after < len(text) else self.num_blanks + after

    def take(self, count: int) -> str:
        """The first `count` characters, which are held no longer."""
        if count >= self._size:
            return self.take_all()
        self._size -= count
        self.num_blanks = min(self.num_blanks, self._size)
        taken: list[str] = []
        while count:
            first, start = self._pieces[0], self._first_start
            left = len(first) - start
            if left > count:
                taken.append(first[start : start + count])
                self._first_start += count
                break
            taken.append(first[start:] if start else first)
            self._pieces.popleft()
            self._first_start = 0
            count -= left
        return "".join(taken)

    def take_all(self) -> str:
        pieces, start = self._pieces, self._first_start
        text = "".join(pieces)[start:] if pieces else ""
        pieces.clear()
        self._first_start = self._size = self.num_blanks = 0
        return text
