"""Bytes of every token id: all that turning output ids into text needs of a tokenizer. Plain data, cheap to import."""

from __future__ import annotations

from collections.abc import Iterable


class TokenTable:
    """Immutable. Ids outside of the vocabulary stand for nothing.

    token_bytes: by id; a byte-level token may be part of a character. special_ids: tokens that are silent in output.
    strips_leading_space: whether decoding a whole text drops the space that sentencepiece puts before its first word.
    output_bytes: what each id adds to visible output.
    """

    __slots__ = ("_bytes", "_shown", "output_bytes", "special_ids", "strips_leading_space")

    def __init__(self, token_bytes: list[bytes], special_ids: Iterable[int], *, strips_leading_space: bool) -> None:
        self._bytes = token_bytes
        self._shown: dict[int, tuple[str, tuple[int, ...]]] = {}
        self.special_ids = frozenset(special_ids)
        self.strips_leading_space = strips_leading_space
        self.output_bytes: list[bytes] = [
            b"" if token_id in self.special_ids else data for token_id, data in enumerate(token_bytes)
        ]

    @property
    def vocab_size(self) -> int:
        return len(self._bytes)

    def all_bytes(self) -> list[bytes]:
        """By id, special tokens as their text."""
        return self._bytes

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for; special tokens their text."""
        return self._bytes[token_id] if 0 <= token_id < len(self._bytes) else b""

    def shown(self, token_id: int) -> tuple[str, tuple[int, ...]]:
        """`token_text` and `token_bytes` as log-probabilities show them: asked for several times for each token of an
        answer, and so made once for each of the vocabulary."""
        known = self._shown.get(token_id)
        if known is None:
            known = self.token_text(token_id), tuple(self.token_bytes(token_id))
            if 0 <= token_id < len(self._bytes):
                self._shown[token_id] = known
        return known

    def token_text(self, token_id: int) -> str:
        """`token_bytes` as text; bytes that are no text on their own show as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")
