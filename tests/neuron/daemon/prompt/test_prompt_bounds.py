"""Prompts and checkpoints that ask for more than they are worth: counted before anything is made of them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from cortex_core.conversation import RawPrompt, Request, TextPart, ThinkingPart, ToolCallPart, ToolResultPart, Turn
from cortex_core.errors import ApiError
from neuron.daemon.prompt.chat_template import ChatTemplate, TemplateRenderError, chatml
from neuron.daemon.prompt.model import TextModel
from neuron.daemon.prompt.tokenizer import Tokenizer, TokenizerError
from neuron.daemon.text import limits
from tokenizers import Tokenizer as Backend
from tokenizers import models

from tests.counting import assert_linear, peak_bytes, steps
from tests.neuron.daemon.prompt.checkpoints import ask, byte_level_json, load, user, write_checkpoint

WINDOW = 1000
MOST = WINDOW * limits.MAX_BYTES_PER_TOKEN


def refusal(work: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        work()
    assert caught.value.status == 400
    assert len(caught.value.message) < 1000
    return caught.value


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    """A model with a token of 64 blanks, so that no text is sure to be long."""
    added = ("<think>", " " * 64)
    return load(tmp_path_factory.mktemp("sparse"), tokenizer_json=byte_level_json(added))


def test_H9_what_has_too_many_bytes_for_the_window_is_neither_rendered_nor_tokenised(
    sparse: TextModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sparse.tokenizer.longest_token_bytes == 64
    touched: list[str] = []
    monkeypatch.setattr(sparse.tokenizer, "encode", lambda text: touched.append("encode") or [1])
    monkeypatch.setattr(sparse.template, "render", lambda *a, **k: touched.append("render") or "x")
    result = Turn("tool", (ToolResultPart("c", (TextPart("x" * (MOST + 1)),)),))
    called = Turn("assistant", (ToolCallPart("c", "f", json.dumps({"a": "x" * MOST})),))
    for turns in ((user("x" * (MOST + 1)),), (user("a"), called, result)):
        asked = ask(turns=turns)
        for windows in (1, limits.COUNTED_WINDOWS):
            error = refusal(lambda a=asked, w=windows: sparse.render(a, max_model_len=WINDOW, windows=w))
            assert (error.code, error.param) == ("context_length_exceeded", "messages")
            assert error.extras["max"] == WINDOW < error.extras["prompt_len"]
        assert refusal(lambda asked=asked: sparse.count_tokens(asked, max_model_len=WINDOW)).param == "messages"
    assert touched == []
    sparse.render(ask("x" * MOST), max_model_len=WINDOW)
    assert touched == ["render", "encode"]


def test_H9_several_windows_of_text_are_counted(qwen: TextModel) -> None:
    text = "hello world " * (WINDOW * 3 // 12)
    assert qwen.count_tokens(ask(text), max_model_len=WINDOW // 3) > WINDOW // 3


def test_H9_thoughts_that_a_template_may_leave_out_do_not_count(sparse: TextModel) -> None:
    thought = Turn("assistant", (ThinkingPart("x" * 2 * MOST), TextPart("a")))
    turns = (user("a"), thought, user("b"))
    assert len(sparse.render(ask(turns=turns), max_model_len=WINDOW)[0].token_ids) < WINDOW


def test_H9_where_the_window_is_not_known_a_large_one_is_assumed(qwen: TextModel) -> None:
    text = "x" * (limits.ASSUMED_WINDOW * limits.MAX_BYTES_PER_TOKEN + 1)
    assert refusal(lambda: qwen.count_tokens(ask(text))).code == "context_length_exceeded"
    assert refusal(lambda: qwen.encode(text)).code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("prompts", "param"),
    [
        ((RawPrompt(text="x" * (MOST + 1)),), "prompt"),
        ((RawPrompt(text="a"), RawPrompt(text="x" * (MOST + 1))), "prompt[1]"),
        ((RawPrompt(token_ids=(1,) * (WINDOW + 1)),), "prompt"),
        ((RawPrompt(token_ids=(1,)), RawPrompt(token_ids=(1,) * (WINDOW + 1))), "prompt[1]"),
    ],
)
def test_H15_raw_prompts_name_themselves(sparse: TextModel, prompts: tuple[RawPrompt, ...], param: str) -> None:
    error = refusal(lambda: sparse.render(Request(model="m", prompts=prompts), max_model_len=WINDOW))
    assert (error.code, error.param) == ("context_length_exceeded", param)


def test_H15_ids_are_counted_before_they_are_decoded(qwen: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qwen.tokenizer, "decode", lambda ids: pytest.fail("they were decoded"))
    prompt = RawPrompt(token_ids=(1,) * 100_000)
    refusal(lambda: qwen.render(Request(model="m", prompts=(prompt,)), max_model_len=WINDOW))


def test_H15_a_text_on_which_the_tokenizer_gives_up_is_a_400(tmp_path: Path) -> None:
    """A run of ten million blanks is more than its regular expression will go back over; here a quicker one is."""
    tokenizer = json.loads(byte_level_json())
    split = {"type": "Split", "pattern": {"Regex": r"(a|aa)+$"}, "behavior": "Isolated", "invert": False}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, tokenizer["pre_tokenizer"]]}
    model = load(tmp_path, tokenizer_json=json.dumps(tokenizer))
    text = "a" * 40 + "b"
    for work, param in (
        (lambda: model.encode(text, max_model_len=WINDOW), "prompt"),
        (lambda: model.render(Request(model="m", prompts=(RawPrompt(text=text),))), "prompt"),
        (lambda: model.count_tokens(ask(text)), "messages"),
    ):
        error = refusal(work)
        assert error.param == param and "cannot split this text" in error.message
    assert model.encode("hello")


def test_prompts_that_come_back_with_log_probabilities_are_bounded(sparse: TextModel) -> None:
    def scored(*lengths: int, num_choices: int = 1, logprobs: int | None = 1) -> None:
        prompts = tuple(RawPrompt(token_ids=(1,) * length) for length in lengths)
        request = Request(model="m", prompts=prompts, num_choices=num_choices, echo=True, logprobs=logprobs)
        sparse.resolve(request, sparse.render(request), max_model_len=100_000)

    most, all_of_them = limits.MAX_SCORED_TOKENS, limits.MAX_ALL_SCORED_TOKENS
    scored(most)
    scored(most + 1, logprobs=None)
    assert refusal(lambda: scored(most + 1)).param == "prompt"
    error = refusal(lambda: scored(1, most + 1))
    assert error.param == "prompt[1]" and str(most) in error.message and str(most + 1) in error.message
    scored(*[most] * 8)
    scored(most, num_choices=8)
    for work in (lambda: scored(*[most] * 8, 1), lambda: scored(most, num_choices=9)):
        error = refusal(work)
        assert error.param == "prompt" and str(all_of_them) in error.message


def test_calls_of_a_turn_are_written_in_pieces() -> None:
    def written(n: int) -> int:
        call = {"id": "c", "function": {"name": "f", "arguments": {}}}
        messages = [{"role": "assistant", "content": "x" * 50, "tool_calls": [call] * n}]
        return steps(lambda: chatml(messages)) + peak_bytes(lambda: chatml(messages))

    assert_linear(written, 300)


def test_what_a_template_says_of_a_conversation_is_quoted_in_part() -> None:
    template = ChatTemplate({"default": "{{ raise_exception('no: ' + messages[0].content) }}"}, {})
    with pytest.raises(TemplateRenderError) as caught:
        template.render([{"role": "user", "content": "x" * 100_000}])
    assert str(caught.value).startswith("no: xxx") and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in messages %}" * 25 + "x" + "{% endfor %}" * 25,
        "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
        "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
        "{{ " + "[" * 500 + "]" * 500 + " }}",
        "{{ x" + ".a" * 5000 + " }}",
        "{% generation %}",
        "{{ '" + "\\" + "' }}",
    ],
)
def test_a_template_that_python_does_not_compile_is_ignored_as_one_that_jinja_does_not(source: str) -> None:
    assert ChatTemplate({"default": source}, {}).render([{"role": "user", "content": "hi"}]).startswith("<|im_start|>")


def test_ids_far_apart_are_no_table_of_their_span() -> None:
    backend = Backend(models.BPE(vocab={"a": 0, "b": limits.MAX_VOCABULARY}, merges=[]))
    with pytest.raises(TokenizerError, match=str(limits.MAX_VOCABULARY)):
        Tokenizer(backend, {})
    backend = Backend(models.BPE(vocab={"a": 0, "b": limits.MAX_VOCABULARY - 1}, merges=[]))
    assert Tokenizer(backend, {}).vocab_size == limits.MAX_VOCABULARY


def test_added_tokens_are_added_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call of the library goes through all of them: 20,000 tokens took minutes."""
    write_checkpoint(tmp_path)
    first = Tokenizer.load(tmp_path).vocab_size
    added = {f"<x{n}>": first + n for n in range(20_000)}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.vocab_size == first + 20_000
    assert tokenizer.encode("<x19999>") == [first + 19_999]
    decoder = {str(first + n): {"content": f"<y{n}>", "special": n % 2 == 0} for n in range(40)}
    (tmp_path / "added_tokens.json").unlink()
    settings = {"eos_token": "<|im_end|>", "added_tokens_decoder": {**decoder, "\u00b2": {"content": "two"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer.load(tmp_path)
    assert [tokenizer.token_id(f"<y{n}>") for n in range(40)] == [first + n for n in range(40)]
    assert [tokenizer.is_special(first + n) for n in range(4)] == [True, False, True, False]


def test_added_tokens_that_cannot_be_are_one_line_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_checkpoint(tmp_path)
    added = {f"<{'x' * 5000}{n}>": 900_000 + n for n in range(500)} | {"": 5}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    with caplog.at_level(logging.WARNING):
        Tokenizer.load(tmp_path)
    (record,) = (record for record in caplog.records if "added tokens" in record.getMessage())
    assert "501 added tokens" in record.getMessage() and len(record.getMessage()) < 1000


def test_odd_byte_pieces_are_text() -> None:
    backend = Backend(models.BPE(vocab={"<0xZZ>": 0, "<0x41>": 1}, merges=[], byte_fallback=True))
    tokenizer = json.loads(backend.to_str())
    tokenizer["decoder"] = {"type": "ByteFallback"}
    table = Tokenizer(Backend.from_str(json.dumps(tokenizer)), {})
    assert [table.token_bytes(n) for n in range(2)] == [b"<0xZZ>", b"A"]
