"""Text files of a checkpoint that say what cannot be: refused by name, or ignored where a model can do without."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from neuron.checkpoint.errors import CheckpointError
from neuron.checkpoint.files import max_bytes
from neuron.daemon.prompt.chat_template import find_templates
from neuron.daemon.prompt.model import TextModel
from neuron.daemon.prompt.tokenizer import Tokenizer, TokenizerError
from neuron.daemon.text.limits import MAX_VOCABULARY

from tests.neuron.daemon.prompt.checkpoints import byte_level_json, load, sentencepiece_model, write_checkpoint

TEXT_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "config.json",
)


def folder_with(folder: Path, name: str) -> Path:
    """A folder in which the file of this name would be read."""
    write_checkpoint(folder)
    if name == "tokenizer.model":
        (folder / "tokenizer.json").unlink()
    if name in ("chat_template.json", "tokenizer_config.json"):
        (folder / "chat_template.jinja").unlink()
    (folder / name).unlink(missing_ok=True)
    return folder


@pytest.mark.parametrize(
    "kind", ["a FIFO", "a folder", "a character device", "too long", "leads out of the checkpoint"]
)
@pytest.mark.parametrize("name", TEXT_FILES)
def test_H8_no_text_file_is_read_that_is_none(tmp_path: Path, name: str, kind: str) -> None:
    path = folder_with(tmp_path / "model", name) / name
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a character device":
        path.symlink_to("/dev/zero")
    elif kind == "too long":
        with path.open("wb") as stream:
            stream.truncate(max_bytes(name) + 1)
    else:
        path.symlink_to("/proc/self/environ")
    with pytest.raises((TokenizerError, CheckpointError), match=rf"{name} is .*{kind}"):
        TextModel.load(path.parent)


@pytest.mark.parametrize(
    ("config", "special"),
    [
        ({"chat_template": 7}, {}),
        ({"chat_template": [7, {"name": 3}, {"template": 5}]}, {}),
        ({"chat_template": {"a": 7}}, {}),
        ({"eos_token": 7, "bos_token": ["x"], "unk_token": {"content": 5}}, {}),
        ({"eos_token": {"content": "<|im_end|>", "lstrip": "x"}}, {"eos_token": "<|im_end|>"}),
        ({"added_tokens_decoder": 7}, {}),
        ({"added_tokens_decoder": [1, 2]}, {}),
        (
            {
                "added_tokens_decoder": {
                    "\u00b2": {"content": "x"},
                    "9" * 5_000: {"content": "y"},
                    "-1": {"content": "z"},
                }
            },
            {},
        ),
        ({"added_tokens_decoder": {"5": 7, "6": {"content": 7}, "7": {}}}, {}),
        ({"add_bos_token": "yes"}, {}),
        ({"added_tokens_decoder": {"1000000000000": {"content": "x"}}}, {}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_H8_a_tokenizer_config_of_other_types_says_nothing(
    tmp_path: Path, config: dict[str, Any], special: dict[str, str]
) -> None:
    path = write_checkpoint(tmp_path / "model", template=None)
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    model = TextModel.load(path)
    assert model.tokenizer.special_tokens == special
    assert model.tokenizer.vocab_size == Tokenizer.load(write_checkpoint(tmp_path / "plain")).vocab_size


@pytest.mark.parametrize("content", ["", "{", "[]", "7", '{"a":' * 100_000, "\ufeff{}"], ids=lambda text: text[:8])
@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json"]
)
def test_H8_what_is_no_json_is_ignored_where_a_model_can_do_without(tmp_path: Path, name: str, content: str) -> None:
    path = folder_with(tmp_path / "model", name)
    (path / name).write_text(content)
    assert TextModel.load(path).tokenizer.encode("hello")


@pytest.mark.parametrize("token_id", [2**31, 2**32 - 1, MAX_VOCABULARY])
def test_H8_an_id_far_beyond_any_vocabulary_is_refused(tmp_path: Path, token_id: int) -> None:
    document = json.loads(byte_level_json())
    document["model"]["vocab"]["far"] = token_id
    with pytest.raises(TokenizerError, match=f"a token has the id {token_id}"):
        Tokenizer.load(write_checkpoint(tmp_path / "model", tokenizer_json=json.dumps(document)))


@pytest.mark.parametrize(
    "vocab", [{"a": -1}, {"a": 2**32}, {"a": 1.5}, {"a": "0"}, {"a": None}, {"a": True}, [["a", 0]], 7], ids=str
)
def test_H8_ids_that_are_none_are_refused(tmp_path: Path, vocab: Any) -> None:
    document = json.loads(byte_level_json())
    document["model"] |= {"vocab": vocab, "merges": []}
    with pytest.raises(TokenizerError, match="the tokenizer cannot be read"):
        Tokenizer.load(write_checkpoint(tmp_path / "model", tokenizer_json=json.dumps(document)))


def test_H8_ids_with_gaps_and_ids_that_come_twice_are_served(tmp_path: Path) -> None:
    document = json.loads(byte_level_json())
    vocab = document["model"]["vocab"]
    vocab |= {"first": 5_000, "second": 5_000, "third": 9_000}
    tokenizer = Tokenizer.load(write_checkpoint(tmp_path / "model", tokenizer_json=json.dumps(document)))
    assert tokenizer.vocab_size == 9_001
    assert tokenizer.token_bytes(7_000) == b"" and tokenizer.token_bytes(9_000) == b"third"
    assert tokenizer.decode(tokenizer.encode("hello world")) == "hello world"


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", '{"model":7}', '{"a":' * 1_000, "\ufeff{}"], ids=str)
def test_H8_what_is_no_tokenizer_is_refused(tmp_path: Path, content: str) -> None:
    path = write_checkpoint(tmp_path / "model")
    (path / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError, match="tokenizer"):
        Tokenizer.load(path)


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_H8_a_sentencepiece_model_that_is_cut_short_is_refused_or_read(tmp_path: Path, model_type: str) -> None:
    path = folder_with(tmp_path / "model", "tokenizer.model")
    data = sentencepiece_model(model_type)
    for length in (0, 1, 10, len(data) // 3, len(data) // 2, len(data) - 1):
        (path / "tokenizer.model").write_bytes(data[:length])
        try:
            Tokenizer.load(path)
        except TokenizerError as exc:
            assert "tokenizer" in str(exc)


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({"eos_token_id": 10**12}, ()),
        ({"eos_token_id": -1}, ()),
        ({"eos_token_id": [5, -5, 10**12, True, "6", None, 7.5, [8]]}, (5,)),
        ({"eos_token_id": {"a": 1}}, ()),
        ({"eos_token_id": list(range(100_000))}, tuple(range(100))),
    ],
    ids=lambda value: str(value)[:40],
)
def test_H8_stop_ids_are_ids_and_few(tmp_path: Path, generation: dict[str, Any], expected: tuple[int, ...]) -> None:
    model = load(tmp_path / "model", generation_config=generation)
    end = model.tokenizer.token_id("<|im_end|>")
    found = model.defaults.stop_token_ids
    assert end in found and found[: len(expected)] == expected
    assert len(found) <= 128 + 5  # with those of the tokenizer


@pytest.mark.parametrize("value", ["x", -1, 1e300, None, True, [], {}, 10**18], ids=str)
@pytest.mark.parametrize("key", ["temperature", "top_p", "top_k", "min_p", "repetition_penalty"])
def test_H8_sampling_that_cannot_be_falls_back(tmp_path: Path, key: str, value: Any) -> None:
    odd = load(tmp_path / "odd", generation_config={key: value}).defaults
    plain = load(tmp_path / "plain").defaults
    assert getattr(odd, key) == getattr(plain, key)


def test_a_link_that_leads_nowhere_is_no_file(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model")
    for name in ("chat_template.jinja", "tokenizer_config.json", "generation_config.json"):
        (path / name).unlink(missing_ok=True)
        (path / name).symlink_to("nowhere")
    assert find_templates(path) == {}
    assert TextModel.load(path).tokenizer.encode("hello")
    (path / "tokenizer.json").rename(path / "other.json")
    (path / "tokenizer.json").symlink_to("nowhere")
    with pytest.raises(TokenizerError, match=r"neither tokenizer.json nor tokenizer.model"):
        Tokenizer.load(path)
