from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from cortex_core.errors import ApiError
from hypothesis import given
from hypothesis import strategies as st
from neuron.daemon.output.detokenizer import Detokenizer
from neuron.daemon.prompt.model import TextModel
from neuron.daemon.prompt.tokenizer import Tokenizer, TokenizerError
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from tests.neuron.daemon.prompt.checkpoints import byte_level_json, write_checkpoint

TEXTS = st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=60)
EMOJI = "👩‍👩‍👧 \U0001f9d1🏽‍🚀 flags 🇩🇪"


@given(TEXTS)
def test_byte_level_round_trip(qwen: TextModel, text: str) -> None:
    tokenizer = qwen.tokenizer
    ids = tokenizer.encode(text)
    assert b"".join(tokenizer.token_bytes(i) for i in ids) == text.encode()
    assert tokenizer.decode(ids) == text


def test_special_tokens_are_recognised_and_silent(qwen: TextModel) -> None:
    tokenizer = qwen.tokenizer
    ids = tokenizer.encode("<|im_start|>hi<|im_end|><think>")
    assert ids[0] == tokenizer.token_id("<|im_start|>")
    assert tokenizer.is_special(ids[0])
    assert not tokenizer.is_special(ids[-1])
    assert b"".join(tokenizer.output_bytes[i] for i in ids) == b"hi<think>"
    assert tokenizer.token_text(ids[0]) == "<|im_start|>"
    assert tokenizer.vocab_size == max(Backend.from_str(byte_level_json()).get_vocab().values()) + 1


def test_lone_surrogates_do_not_break_encoding(qwen: TextModel) -> None:
    assert qwen.tokenizer.decode(qwen.tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_ids_outside_the_vocabulary_are_silent(qwen: TextModel) -> None:
    size = qwen.tokenizer.vocab_size
    assert qwen.tokenizer.token_bytes(size) == b""
    assert qwen.tokenizer.decode([size, size + 7]) == ""
    assert Detokenizer(qwen.tokenizer.output_bytes).add(size + 3) == ""


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    backend = Backend.from_str(byte_level_json())
    backend.enable_truncation(4)
    backend.enable_padding(length=9, pad_token="<|endoftext|>")
    write_checkpoint(tmp_path, tokenizer_json=backend.to_str())
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode(tokenizer.encode("a rather longer text")) == "a rather longer text"


def test_encoding_from_many_threads(qwen: TextModel) -> None:
    texts = [f"{'the weather in Oslo ' * n}{n}" for n in range(1, 40)]
    alone = [qwen.tokenizer.encode(text) for text in texts]
    together: dict[int, list[list[int]]] = {}

    def work(number: int) -> None:
        together[number] = [qwen.tokenizer.encode(text) for text in texts]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(together[number] == alone for number in range(4))


def test_bos_comes_from_the_post_processor_or_the_flag(tmp_path: Path) -> None:
    backend = Backend.from_str(byte_level_json())
    start = backend.token_to_id("<|endoftext|>")
    backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", start)]
    )
    assert Tokenizer.load(write_checkpoint(tmp_path / "a", tokenizer_json=backend.to_str())).bos_ids == (start,)
    off = write_checkpoint(tmp_path / "b", tokenizer_json=backend.to_str(), tokenizer_config={"add_bos_token": False})
    assert Tokenizer.load(off).bos_ids == ()
    on = write_checkpoint(
        tmp_path / "c", tokenizer_config={"add_bos_token": True, "bos_token": {"content": "<|im_start|>"}}
    )
    tokenizer = Tokenizer.load(on)
    assert tokenizer.bos_ids == (tokenizer.token_id("<|im_start|>"),)


def test_tokens_declared_only_in_the_config_are_added(tmp_path: Path) -> None:
    backend = Backend.from_str(byte_level_json())
    size = backend.get_vocab_size()
    declared = {
        str(size): {"content": "<|extra|>", "special": True},
        str(size + 1): {"content": "<note>", "special": False},
        str(size + 9): {"content": "<gap>", "special": False},
    }
    write_checkpoint(tmp_path, tokenizer_config={"added_tokens_decoder": declared})
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("<|extra|><note>") == [size, size + 1]
    assert tokenizer.token_id("<gap>") is None
    assert tokenizer.is_special(size)
    assert not tokenizer.is_special(size + 1)


@pytest.mark.parametrize("content", [None, "no json", "{}"])
def test_a_folder_without_a_readable_tokenizer(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError):
        Tokenizer.load(tmp_path)


@given(st.lists(st.integers(0, 700), max_size=60))
def test_detokenizer_equals_full_decode(qwen: TextModel, ids: list[int]) -> None:
    detokenizer = Detokenizer(qwen.tokenizer.output_bytes)
    pieces = [detokenizer.add(token_id) for token_id in ids]
    text = "".join(pieces) + detokenizer.flush()
    whole = b"".join(qwen.tokenizer.output_bytes[i] for i in ids if i < qwen.tokenizer.vocab_size)
    assert text == whole.decode("utf-8", "replace")


@given(st.lists(st.integers(0, 590), max_size=40))
def test_detokenizer_equals_the_library(qwen: TextModel, ids: list[int]) -> None:
    backend = Backend.from_str(qwen.tokenizer_json)
    detokenizer = Detokenizer(qwen.tokenizer.output_bytes)
    text = "".join(detokenizer.add(token_id) for token_id in ids) + detokenizer.flush()
    assert text == backend.decode(ids, skip_special_tokens=True)


def test_F9_an_emoji_split_over_tokens_arrives_whole(qwen: TextModel) -> None:
    ids = qwen.tokenizer.encode(EMOJI)
    assert len(ids) > len(EMOJI)
    detokenizer = Detokenizer(qwen.tokenizer.output_bytes)
    pieces = [detokenizer.add(token_id) for token_id in ids]
    assert "".join(pieces) == EMOJI
    assert "" in pieces
    assert not any("\ufffd" in piece for piece in pieces)


def test_an_unfinished_character_shows_at_the_end_only(qwen: TextModel) -> None:
    ids = qwen.tokenizer.encode("ok 🇩")
    detokenizer = Detokenizer(qwen.tokenizer.output_bytes)
    assert "".join(detokenizer.add(token_id) for token_id in ids[:-1]) == "ok "
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_F8_a_tokenizer_that_panics_fails_one_request(qwen: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Rust panic derives from BaseException; here the backend raises one as it would, for one text."""
    PanicException = type("PanicException", (BaseException,), {})
    backend = qwen.tokenizer._backend

    class Panicking:
        def encode_batch_fast(self, texts: list[str], **options: Any) -> Any:
            if "boom" in texts[0]:
                raise PanicException("index out of bounds")
            return backend.encode_batch_fast(texts, **options)

    monkeypatch.setattr(qwen.tokenizer, "_backend", Panicking())
    with pytest.raises(ApiError, match="cannot split this text") as caught:
        qwen.encode("boom")
    assert (caught.value.status, caught.value.param) == (400, "prompt")
    assert qwen.tokenizer.encode("hello"), "the next one is served"
