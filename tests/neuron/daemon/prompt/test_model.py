"""A model's text side: a request becomes token ids, or is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from cortex_core.conversation import RawPrompt, Request
from cortex_core.errors import ApiError
from neuron.daemon.prompt.model import TextModel
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from tests.neuron.daemon.prompt.checkpoints import ask, byte_level_json, load
from tests.neuron.daemon.prompt.harness import states


def test_ids_are_those_of_the_text_with_special_tokens(qwen: TextModel) -> None:
    prompt = qwen.render(ask("hi"))[0]
    assert prompt.token_ids == qwen.tokenizer.encode(prompt.text)
    assert prompt.token_ids[0] == qwen.tokenizer.token_id("<|im_start|>")
    assert prompt.is_chat
    assert qwen.count_tokens(ask("hi")) == prompt.num_tokens


def test_a_model_without_markers_does_not_reason(tmp_path: Path) -> None:
    model = load(tmp_path, template="llama3", tokenizer_json=byte_level_json(()))
    assert model.reasoning is None
    assert not model.can_reason
    assert states(model) == "none"


def test_a_completion_has_no_template(qwen: TextModel) -> None:
    prompts = qwen.render(Request(model="tiny", prompts=(RawPrompt(text="12 + 30"), RawPrompt(token_ids=(5, 6)))))
    assert prompts[0].text == "12 + 30"
    assert prompts[0].token_ids == qwen.tokenizer.encode("12 + 30")
    assert not prompts[0].is_chat
    assert prompts[1].token_ids == [5, 6]
    assert prompts[1].text == qwen.tokenizer.decode([5, 6])


def test_bos_is_written_once(tmp_path: Path) -> None:
    backend = Backend.from_str(byte_level_json())
    start = backend.token_to_id("<|endoftext|>")
    backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", start)]
    )
    model = load(
        tmp_path,
        template="llama3",
        tokenizer_json=backend.to_str(),
        tokenizer_config={"bos_token": "<|endoftext|>"},
    )
    assert model.render(ask())[0].token_ids.count(start) == 1
    for text in ("hello", "<|endoftext|>hello"):
        ids = model.render(Request(model="tiny", prompts=(RawPrompt(text=text),)))[0].token_ids
        assert ids[0] == start
        assert ids.count(start) == 1
    assert model.render(Request(model="tiny", prompts=(RawPrompt(token_ids=(7,)),)))[0].token_ids == [7]
    assert model.render(Request(model="tiny", prompts=(RawPrompt(text=""),)))[0].token_ids == [start]


def test_an_empty_prompt_starts_a_document(qwen: TextModel) -> None:
    ids = qwen.render(Request(model="tiny", prompts=(RawPrompt(text=""),)))[0].token_ids
    assert ids == [qwen.tokenizer.token_id("<|endoftext|>")]


@pytest.mark.parametrize("token_id", [-1, 10**6])
def test_ids_that_do_not_exist_are_refused(qwen: TextModel, token_id: int) -> None:
    request = Request(model="tiny", prompts=(RawPrompt(text="a"), RawPrompt(token_ids=(1, token_id))))
    with pytest.raises(ApiError) as caught:
        qwen.render(request)
    assert caught.value.param == "prompt[1]"


def test_what_cannot_fit_is_refused_before_it_is_tokenised(qwen: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    request = ask("hello " * 100)
    assert qwen.render(request, max_model_len=1000) == qwen.render(request)
    monkeypatch.setattr(qwen.tokenizer, "encode", lambda text: pytest.fail("tokenised"))
    huge = "x" * (1000 * qwen.tokenizer.longest_token_bytes * 2)
    for request in (ask(huge), Request(model="tiny", prompts=(RawPrompt(text=huge),))):
        with pytest.raises(ApiError) as caught:
            qwen.render(request, max_model_len=1000)
        assert caught.value.code == "context_length_exceeded"
        assert caught.value.extras["prompt_len"] > 1000
