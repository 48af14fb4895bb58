"""The model's tokenizer behind a small, thread-safe interface.

Text becomes ids through Hugging Face `tokenizers` (Rust); ids become bytes through a table built once at load, so
that decoding a stream costs one list access per token and never splits a code point (`detokenizer.py`).
Truncation and padding are switched off once and never touched again: a `Tokenizer` is immutable afterwards and
may be used from several threads.
"""

from __future__ import annotations

import itertools
import logging
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import tokenizers

from neuron.checkpoint.errors import CheckpointError
from neuron.checkpoint.files import read_file, read_object, read_text
from neuron.daemon.text import limits
from neuron.daemon.text.token_table import TokenTable

logger = logging.getLogger(__name__)

_SHOWN_CHARACTERS = 200
_TOKEN_ID = re.compile("[0-9]{1,9}")
_BYTE_PIECE = re.compile("<0x[0-9A-Fa-f]{2}>")

SPECIAL_TOKEN_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TokenizerError(Exception):
    """The checkpoint has no tokenizer that can be read."""


class UntokenizableText(Exception):
    """The tokenizer gave up on a text: its regular expressions have limits of their own."""


class _AddedToken(msgspec.Struct):
    id: int
    content: str
    special: bool = False
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False


class _SerializedTokenizer(msgspec.Struct):
    """The few fields of tokenizer.json that decide how ids become bytes; the rest is skipped unparsed."""

    decoder: Any = None
    added_tokens: list[_AddedToken] = []


class Tokenizer:
    """Encode text, decode ids, and know the special tokens.

    vocab_size: one more than the largest token id. bos_ids: what the tokenizer itself puts in front of a raw
    prompt (empty for most). special_tokens: role -> text (`{"eos_token": "<|im_end|>", …}`), for templates.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: dict[str, str],
        *,
        add_bos_token: bool | None = None,
        serialized: str | None = None,
    ) -> None:
        """serialized: the tokenizer.json that `backend` is, if there is one; it is costly to write anew."""
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self.special_tokens = special_tokens
        self.tokenizer_json: str = backend.to_str() if serialized is None else serialized
        layout = msgspec.json.decode(self.tokenizer_json, type=_SerializedTokenizer)
        self._special_ids = frozenset(token.id for token in layout.added_tokens if token.special)
        vocab = _vocabulary(backend)
        largest = max(vocab.values(), default=-1)
        if largest >= limits.MAX_VOCABULARY:
            raise TokenizerError(f"a token has the id {largest}, at most {limits.MAX_VOCABULARY - 1}")
        self.vocab_size: int = largest + 1
        decoders = _decoder_types(layout.decoder)
        self.table = TokenTable(
            _byte_table(vocab, {t.id: t.content for t in layout.added_tokens}, decoders, self.vocab_size),
            self._special_ids,
            strips_leading_space="ByteLevel" not in decoders and bool(decoders & {"Strip", "Metaspace"}),
        )
        self.strips_leading_space = self.table.strips_leading_space
        self.output_bytes = self.table.output_bytes
        """Bytes each id adds to visible output: `token_bytes`, except that special tokens are silent."""
        self.longest_token_bytes = max(1, max(map(len, self.table.all_bytes()), default=1))
        """No token covers more: a text has at least its bytes divided by this many tokens."""
        self.bos_ids = self._probe_bos(add_bos_token)

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read the tokenizer of a checkpoint folder: `tokenizer.json`, else a sentencepiece `tokenizer.model`.

        Raises `TokenizerError`.
        """
        try:
            config = read_object(path / "tokenizer_config.json")
            backend, serialized = _backend_of(path)
        except TokenizerError:
            raise
        except CheckpointError as exc:
            raise TokenizerError(exc.message) from exc
        except BaseException as exc:  # the Rust side raises bare Exception
            if isinstance(exc, MemoryError) or not (isinstance(exc, Exception) or _is_panic(exc)):
                raise
            raise TokenizerError(f"{path}: the tokenizer cannot be read: {exc}") from exc
        if _add_missing_tokens(backend, path, config):
            serialized = None
        add_bos = config.get("add_bos_token")
        return cls(
            backend,
            _special_tokens(path, config),
            add_bos_token=add_bos if isinstance(add_bos, bool) else None,
            serialized=serialized,
        )

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; added and special tokens written in it are recognised, nothing is put around it.

        Raises `UntokenizableText`: one request is lost, not the model.
        """
        try:
            return self._encode(text)
        except (UnicodeError, TypeError):  # lone surrogates: JSON can spell them, UTF-8 cannot
            return self._encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))

    def _encode(self, text: str) -> list[int]:
        try:
            # the batch call releases the GIL, so a long prompt in an executor does not stall the event loop
            ids: list[int] = self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except BaseException as exc:
            if _is_panic(exc):
                raise UntokenizableText(str(exc)[:_SHOWN_CHARACTERS]) from exc
            raise
        return ids

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        """Text of `token_ids`. Ids outside the vocabulary decode to nothing."""
        text: str = self._backend.decode(
            [i for i in token_ids if 0 <= i < self.vocab_size], skip_special_tokens=skip_special_tokens
        )
        return text

    def token_id(self, token: str) -> int | None:
        """Id of a token by its exact text, None if it is not one entry of the vocabulary."""
        found: int | None = self._backend.token_to_id(token)
        return found

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for (a byte-level token may be part of a character); special tokens their text."""
        return self.table.token_bytes(token_id)

    def token_text(self, token_id: int) -> str:
        """`token_bytes` as text; bytes that are no text on their own show as U+FFFD."""
        return self.table.token_text(token_id)

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def _probe_bos(self, add_bos_token: bool | None) -> tuple[int, ...]:
        """What the post-processor puts before a text; `add_bos_token` of tokenizer_config decides if it says."""
        if add_bos_token is False:
            return ()
        plain: list[int] = self._backend.encode("a", add_special_tokens=False).ids
        wrapped: list[int] = self._backend.encode("a", add_special_tokens=True).ids
        prefix: tuple[int, ...] = ()
        for start in range(len(wrapped) - len(plain) + 1):
            if plain and wrapped[start : start + len(plain)] == plain:
                prefix = tuple(wrapped[:start])
                break
        if not prefix and add_bos_token:
            bos = self.token_id(self.special_tokens.get("bos_token", ""))
            prefix = () if bos is None else (bos,)
        return prefix


def _backend_of(path: Path) -> tuple[tokenizers.Tokenizer, str | None]:
    """The tokenizer of a folder, and the tokenizer.json that it is, if there is one."""
    with suppress(FileNotFoundError):
        serialized = read_text(path / "tokenizer.json")
        return tokenizers.Tokenizer.from_str(serialized), serialized
    with suppress(FileNotFoundError):
        data = read_file(path / "tokenizer.model")
        from neuron.daemon.prompt.sentencepiece_model import tokenizer_from_sentencepiece

        return tokenizer_from_sentencepiece(data), None
    raise TokenizerError(f"{path}: neither tokenizer.json nor tokenizer.model")


def _is_panic(exc: BaseException) -> bool:
    """A panic of the Rust side derives from `BaseException`."""
    return type(exc).__name__ == "PanicException"


# ---------------------------------------------------------------- ids to bytes


def _decoder_types(decoder: Any) -> set[str]:
    """Names of all decoders in a (possibly nested) decoder description."""
    if not isinstance(decoder, dict):
        return set()
    names = {str(decoder.get("type"))}
    if decoder.get("prepend_scheme") == "never":
        names = {"ByteFallback"}  # a Metaspace that adds no space in front: same bytes, nothing to strip
    for nested in decoder.get("decoders") or ():
        names |= _decoder_types(nested)
    return names


def byte_level_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE (GPT-2): printable Latin-1 stands for itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    spare = 0x100
    for byte in range(0x100):
        if chr(byte) not in alphabet:
            alphabet[chr(spare)] = byte
            spare += 1
    return alphabet


def _vocabulary(backend: tokenizers.Tokenizer) -> dict[str, int]:
    """Every entry and its id, added tokens too.

    Asked for one by one: `get_vocab` holds the interpreter's lock for a tenth of a second where the vocabulary is
    large, and with it everything else that this process serves.
    """
    size: int = backend.get_vocab_size(with_added_tokens=True)
    vocab: dict[str, int] = {}
    for token_id in range(2 * size):  # ids may have gaps
        piece = backend.id_to_token(token_id)
        if piece is not None:
            vocab[piece] = token_id
            if len(vocab) == size:
                return vocab
    return dict(backend.get_vocab(with_added_tokens=True))


def _byte_table(vocab: dict[str, int], added: dict[int, str], decoders: set[str], size: int) -> list[bytes]:
    """Bytes of every id; ids without a token (padding of the embedding) are empty."""
    table = [b""] * size
    if "ByteLevel" in decoders:
        alphabet = byte_level_alphabet()
        for piece, token_id in vocab.items():
            try:
                table[token_id] = bytes([alphabet[char] for char in piece])
            except KeyError:
                table[token_id] = piece.encode("utf-8", "replace")
    elif decoders & {"ByteFallback", "Metaspace"}:
        for piece, token_id in vocab.items():
            if _BYTE_PIECE.fullmatch(piece):
                table[token_id] = bytes([int(piece[3:5], 16)])
            else:
                table[token_id] = piece.replace("\u2581", " ").encode("utf-8", "replace")
    elif "WordPiece" in decoders:
        for piece, token_id in vocab.items():
            table[token_id] = (piece[2:] if piece.startswith("##") else " " + piece).encode("utf-8", "replace")
    else:
        for piece, token_id in vocab.items():
            table[token_id] = piece.encode("utf-8", "replace")
    for token_id, content in added.items():
        if token_id < size:  # what the file says; the tokenizer may have given it another
            table[token_id] = content.encode("utf-8", "replace")
    return table


# ---------------------------------------------------------------- the files beside tokenizer.json


def _token_content(value: Any) -> str | None:
    if isinstance(value, str):
        return value
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        return str(value["content"])
    return None


def _special_tokens(path: Path, config: dict[str, Any]) -> dict[str, str]:
    merged = read_object(path / "special_tokens_map.json") | {k: v for k, v in config.items() if v is not None}
    contents = {role: _token_content(merged.get(role)) for role in SPECIAL_TOKEN_ROLES}
    return {role: content for role, content in contents.items() if content is not None}


def _add_missing_tokens(backend: tokenizers.Tokenizer, path: Path, config: dict[str, Any]) -> bool:
    """Tokens that only `tokenizer_config.json` or `added_tokens.json` declare, in the order of their ids.

    Returns whether there were any.
    """
    declared: dict[int, dict[str, Any]] = {}
    for content, token_id in read_object(path / "added_tokens.json").items():
        if isinstance(token_id, int):
            declared[token_id] = {"content": content, "special": False}
    decoder = config.get("added_tokens_decoder")
    for key, entry in decoder.items() if isinstance(decoder, dict) else ():
        if isinstance(entry, dict) and isinstance(entry.get("content"), str) and _TOKEN_ID.fullmatch(str(key)):
            declared[int(key)] = entry
    next_id: int = backend.get_vocab_size(with_added_tokens=True)
    missing: dict[str, dict[str, Any]] = {}
    left_out: list[tuple[int, str]] = []
    for token_id, entry in sorted(declared.items()):
        content = entry["content"]
        if content in missing or backend.token_to_id(content) is not None:
            continue
        if token_id != next_id or not content:
            left_out.append((token_id, content))
            continue
        missing[content] = entry
        next_id += 1
    if left_out:
        logger.warning(
            "%s: %d added tokens cannot have the ids they want and are left out, the first of them %r with id %d",
            path,
            len(left_out),
            left_out[0][1][:_SHOWN_CHARACTERS],
            left_out[0][0],
        )
    # runs of one kind at once: each call goes through all added tokens anew
    for is_special, run in itertools.groupby(missing.values(), lambda entry: bool(entry.get("special"))):
        tokens = [_added_token(entry) for entry in run]
        if is_special:
            backend.add_special_tokens(tokens)
        else:
            backend.add_tokens(tokens)
    return bool(missing)


def _added_token(entry: dict[str, Any]) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(
        entry["content"],
        single_word=bool(entry.get("single_word", False)),
        lstrip=bool(entry.get("lstrip", False)),
        rstrip=bool(entry.get("rstrip", False)),
        normalized=bool(entry.get("normalized", False)),
        special=bool(entry.get("special", False)),
    )
