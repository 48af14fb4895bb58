"""A `tokenizers.Tokenizer` from a sentencepiece `tokenizer.model`, for checkpoints without a tokenizer.json.

The model file is a protobuf (sentencepiece_model.proto: ModelProto); the handful of fields that matter are read
straight from the wire format, so no protobuf runtime is needed. Both model types are covered: BPE, whose merges are
recovered from the piece scores (a merge's rank is the rank of the piece it makes), and unigram. Byte fallback is
kept. The result serialises to tokenizer.json text, which is what grammars need.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from neuron.daemon.text import limits

_UNIGRAM, _BPE = 1, 2
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6


class SentencePieceError(Exception):
    """The file is no sentencepiece model, or of a type that has no equivalent here (char, word)."""


@dataclass(slots=True)
class SentencePieceModel:
    """What the protobuf says; `pieces` are (text, score, type) in id order."""

    pieces: list[tuple[str, float, int]] = field(default_factory=list)
    model_type: int = _UNIGRAM
    byte_fallback: bool = False
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    treat_whitespace_as_suffix: bool = False
    charsmap: bytes = b""


def read_model(data: bytes) -> SentencePieceModel:
    """Parse a ModelProto. Raises `SentencePieceError`."""
    model = SentencePieceModel()
    try:
        for number, value in _fields(data):
            if number == 1 and isinstance(value, bytes):
                model.pieces.append(_read_piece(value))
            elif number == 2 and isinstance(value, bytes):
                for inner, setting in _fields(value):
                    if inner == 3:
                        model.model_type = int(setting)
                    elif inner == 24:
                        model.treat_whitespace_as_suffix = bool(setting)
                    elif inner == 35:
                        model.byte_fallback = bool(setting)
            elif number == 3 and isinstance(value, bytes):
                for inner, setting in _fields(value):
                    if inner == 2 and isinstance(setting, bytes):
                        model.charsmap = setting
                    elif inner == 3:
                        model.add_dummy_prefix = bool(setting)
                    elif inner == 4:
                        model.remove_extra_whitespaces = bool(setting)
    except (IndexError, ValueError, struct.error) as exc:
        raise SentencePieceError(f"not a sentencepiece model: {exc}") from exc
    if not model.pieces:
        raise SentencePieceError("not a sentencepiece model: no pieces")
    return model


def tokenizer_from_sentencepiece(data: bytes) -> Tokenizer:
    """Build the fast tokenizer that is equivalent to a `tokenizer.model`. Raises `SentencePieceError`."""
    model = read_model(data)
    vocab = {text: token_id for token_id, (text, _, _) in enumerate(model.pieces)}
    unknown = next((i for i, (_, _, kind) in enumerate(model.pieces) if kind == _UNKNOWN), None)
    if model.model_type == _BPE:
        backend = Tokenizer(
            models.BPE(
                vocab=vocab,
                merges=_merges(model, vocab),
                unk_token=None if unknown is None else model.pieces[unknown][0],
                fuse_unk=True,
                byte_fallback=model.byte_fallback,
            )
        )
    elif model.model_type == _UNIGRAM:
        backend = Tokenizer(
            models.Unigram([(text, score) for text, score, _ in model.pieces], unknown, model.byte_fallback)
        )
    else:
        raise SentencePieceError(f"sentencepiece model type {model.model_type} is not supported")

    steps: list[normalizers.Normalizer] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if steps:
        backend.normalizer = normalizers.Sequence(steps)
    # The dummy prefix goes in front of the whole text, never after a special token in the middle of it. As in the
    # fast tokenizers of the field, a text that begins with a space of its own gets none.
    scheme = "first" if model.add_dummy_prefix else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)

    chain: list[decoders.Decoder] = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.add_dummy_prefix:
        chain.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(chain)
    backend.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t, _, kind in model.pieces if kind in (_CONTROL, _UNKNOWN)]
    )
    backend.add_tokens([AddedToken(t, normalized=False) for t, _, kind in model.pieces if kind == _USER_DEFINED])
    return backend


def _merges(model: SentencePieceModel, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to make a piece from two others, best-scored piece first.

    sentencepiece merges the adjacent pair whose union has the highest score, so a pair ranks as its union does. Pieces
    beyond `limits.MAX_MERGED_CHARACTERS` are no unions (those of models are cut at 16 characters, seldom at more).
    """
    mergeable = [(score, text) for text, score, kind in model.pieces if kind in (_NORMAL, _USER_DEFINED, _UNUSED)]
    usable = {text for _, text in mergeable}
    ranked: list[tuple[float, int, int, str, str]] = []
    for score, text in mergeable:
        for cut in range(1, len(text)) if len(text) <= limits.MAX_MERGED_CHARACTERS else ():
            left, right = text[:cut], text[cut:]
            if left in usable and right in usable:
                ranked.append((-score, vocab[left], vocab[right], left, right))
    ranked.sort()
    return [(left, right) for _, _, _, left, right in ranked]


# ---------------------------------------------------------------- protobuf wire format


def _read_piece(data: bytes) -> tuple[str, float, int]:
    text, score, kind = "", 0.0, _NORMAL
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            text = value.decode("utf-8")
        elif number == 2 and isinstance(value, bytes):
            score = struct.unpack("<f", value)[0]
        elif number == 3 and isinstance(value, int):
            kind = value
    return text, score, kind


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of one message: varints as int, fixed and length-delimited fields as bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire_type == 2:
            length, at = _varint(data, at)
        elif wire_type in (1, 5):
            length = 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"wire type {wire_type}")
        if at + length > len(data):
            raise ValueError("truncated")
        yield number, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("varint too long")
