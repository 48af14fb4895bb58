"""Incremental detokenisation: ids in, whole characters out.

A byte-level or byte-fallback token may be a fraction of a character; its bytes are kept until the character is
complete, so no delta ever splits a code point (F9). Fed one by one or all at once, the text is the same.
"""

from __future__ import annotations

import codecs

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """Text of one output sequence.

    output_bytes: bytes per token id (`Tokenizer.output_bytes`); ids beyond it are silent. strip_leading_space:
    sentencepiece tokenizers write the space before a word into the word's token, so an answer would begin with
    one; chat drops it, a raw completion keeps it.
    """

    __slots__ = ("_decoder", "_num_ids", "_output_bytes", "_strip")

    def __init__(self, output_bytes: list[bytes], *, strip_leading_space: bool = False) -> None:
        self._output_bytes = output_bytes
        self._num_ids = len(output_bytes)
        self._strip = strip_leading_space
        self._decoder = _Utf8Decoder("replace")

    def add(self, token_id: int) -> str:
        """The characters that `token_id` completes, possibly none."""
        if not 0 <= token_id < self._num_ids:
            return ""
        text = self._decoder.decode(self._output_bytes[token_id])
        if self._strip and text:
            self._strip = False
            return text[1:] if text[0] == " " else text
        return text

    def flush(self) -> str:
        """End of the sequence, or a place where no character may continue: an unfinished one becomes U+FFFD."""
        text = self._decoder.decode(b"", True)
        self._decoder.reset()
        return text
