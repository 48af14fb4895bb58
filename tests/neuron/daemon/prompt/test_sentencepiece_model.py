"""SentencePiece models, read as the library that tokenizes wants them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from neuron.checkpoint.files import max_bytes
from neuron.daemon.output.detokenizer import Detokenizer
from neuron.daemon.prompt.sentencepiece_model import SentencePieceError, SentencePieceModel, _merges, read_model
from neuron.daemon.prompt.tokenizer import Tokenizer, TokenizerError
from neuron.daemon.text import limits

from tests.counting import steps
from tests.neuron.daemon.prompt.checkpoints import sentencepiece_model


def test_a_long_piece_is_not_cut_in_every_way() -> None:
    def cut(n: int) -> int:
        model = SentencePieceModel(pieces=[("a" * n, 0.0, 1), ("a", 0.0, 1)])
        vocab = {text: index for index, (text, _, _) in enumerate(model.pieces)}
        return steps(lambda: _merges(model, vocab))

    assert cut(limits.MAX_MERGED_CHARACTERS) > limits.MAX_MERGED_CHARACTERS
    assert cut(limits.MAX_MERGED_CHARACTERS + 1) == cut(100_000) < 60


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_a_sentencepiece_file_that_is_none_is_refused(tmp_path: Path, model_type: str) -> None:
    data = sentencepiece_model(model_type)
    file = tmp_path / "tokenizer.model"
    for damaged in (data[:-1], data[: len(data) // 2], b"\xff" * 100, b"\x0a\xff\xff\xff\xff\x0f", b"\x12\x02\x08\x01"):
        file.write_bytes(damaged)
        with pytest.raises(TokenizerError):
            Tokenizer.load(tmp_path)
    with file.open("wb") as sparse_file:
        sparse_file.truncate(max_bytes("tokenizer.model") + 1)
    with pytest.raises(TokenizerError, match=str(max_bytes("tokenizer.model"))):
        Tokenizer.load(tmp_path)


def test_a_sentencepiece_file_that_makes_the_library_panic_is_refused(tmp_path: Path) -> None:
    """A table of characters that is no table: the library panics, which is no `Exception`."""
    piece = b"\x0a\x08" + b"\x0a\x01a\x15" + b"\x00\x00\x00\x00"
    normalizer = b"\x1a\x0a" + b"\x12\x08" + b"\xff\xff\xff\x00" * 2
    (tmp_path / "tokenizer.model").write_bytes(piece + normalizer)
    with pytest.raises(TokenizerError):
        Tokenizer.load(tmp_path)


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def piece_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, bytes]:
    data = sentencepiece_model(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "tokenizer.model").write_bytes(data)
    return Tokenizer.load(folder), data


@settings(max_examples=150)
@given(text=st.text(alphabet='the wOslo cloud{}":,get_athr\n\t 12+=üéß東кв🇩  ', max_size=50))
def test_sentencepiece_ids_are_the_same(piece_model: tuple[Tokenizer, bytes], text: str) -> None:
    tokenizer, data = piece_model
    assume(not text.startswith(" "))  # where fast tokenizers differ from sentencepiece on purpose
    reference = sentencepiece.SentencePieceProcessor(model_proto=data)
    assert tokenizer.encode(text) == reference.encode(text)


def test_sentencepiece_bytes_and_leading_space(piece_model: tuple[Tokenizer, bytes]) -> None:
    tokenizer, _ = piece_model
    assert tokenizer.strips_leading_space
    ids = tokenizer.encode("hello 🇩🇪 world")
    assert tokenizer.decode(ids) == "hello 🇩🇪 world"
    chat = Detokenizer(tokenizer.output_bytes, strip_leading_space=True)
    assert "".join(chat.add(i) for i in ids) + chat.flush() == "hello 🇩🇪 world"
    raw = Detokenizer(tokenizer.output_bytes)
    assert "".join(raw.add(i) for i in ids) + raw.flush() == " hello 🇩🇪 world"


def test_sentencepiece_adds_no_space_after_a_special_token(piece_model: tuple[Tokenizer, bytes]) -> None:
    tokenizer, _ = piece_model
    ids = tokenizer.encode("a<tool_call>b</tool_call> c")
    pieces = [tokenizer.token_bytes(i) for i in ids]
    assert pieces == [b" a", b"<tool_call>", b"b", b"</tool_call>", b" c"]


def test_sentencepiece_serialises_for_grammars(piece_model: tuple[Tokenizer, bytes]) -> None:
    tokenizer, data = piece_model
    model = read_model(data)
    assert json.loads(tokenizer.tokenizer_json)["model"]["byte_fallback"] is True
    assert model.byte_fallback
    assert tokenizer.vocab_size == len(model.pieces)
    assert tokenizer.token_id("<tool_call>") == [text for text, _, _ in model.pieces].index("<tool_call>")


@pytest.mark.parametrize("data", [b"", b"\xff" * 20, b"\x0a\x7fabc", b"hello world"])
def test_what_is_no_sentencepiece_model(data: bytes) -> None:
    with pytest.raises(SentencePieceError):
        read_model(data)
