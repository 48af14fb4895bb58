from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cortex_core.conversation import Limits, RawPrompt, Request, ResponseFormat, Sampling
from cortex_core.errors import ApiError
from hypothesis import given
from hypothesis import strategies as st
from neuron.daemon.prompt.model import TextModel
from neuron.daemon.prompt.sampling_defaults import choice_seed
from neuron.daemon.text.prompts import Choice

from tests.neuron.daemon.prompt.checkpoints import ask, load


def resolve(model: TextModel, request: Request, max_model_len: int = 1000) -> list[Choice]:
    return model.resolve(request, model.render(request), max_model_len=max_model_len)


def test_N25_the_models_generation_config_is_the_default(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
        "min_p": 0.05,
        "repetition_penalty": 1.05,
        "do_sample": True,
    }
    model = load(tmp_path, generation_config=settings)
    sampling = resolve(model, ask())[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.6, 0.95, 20)
    assert (sampling.min_p, sampling.repetition_penalty, sampling.logprobs) == (0.05, 1.05, -1)
    asked = Sampling(temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0, presence_penalty=1.5)
    sampling = resolve(model, ask(sampling=asked, logprobs=3))[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.0, 1.0, 0, 0.0)
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.logprobs) == (1.0, 1.5, 3)


def test_without_a_config_the_reference_decides(qwen: TextModel) -> None:
    sampling = resolve(qwen, ask())[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.7, 1.0, 0)


def test_greedy_by_config(tmp_path: Path) -> None:
    model = load(tmp_path, generation_config={"do_sample": False, "temperature": 0.6})
    assert resolve(model, ask())[0].sampling.temperature == 0.0
    assert resolve(model, ask(sampling=Sampling(temperature=0.3)))[0].sampling.temperature == 0.3


@pytest.mark.parametrize("odd", [{"temperature": "hot", "top_k": None, "top_p": 0}, {"top_k": -1, "top_p": 7}])
def test_odd_values_in_the_config_fall_back(tmp_path: Path, odd: dict[str, Any]) -> None:
    sampling = resolve(load(tmp_path, generation_config=odd), ask())[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.7, 1.0, 0)


def test_stop_tokens_come_from_everywhere(tmp_path: Path) -> None:
    model = load(
        tmp_path,
        generation_config={"eos_token_id": [3, 5]},
        config={"eos_token_id": 7, "text_config": {"eos_token_id": 9}},
    )
    ends = {model.tokenizer.token_id("<|im_end|>"), model.tokenizer.token_id("<|endoftext|>")}
    assert set(resolve(model, ask())[0].stop_token_ids) == {3, 5, 7, 9} | ends
    assert resolve(model, ask(limits=Limits(ignore_eos=True)))[0].stop_token_ids == ()
    constrained = ask(limits=Limits(ignore_eos=True), response_format=ResponseFormat("json_object"))
    assert resolve(model, constrained)[0].stop_token_ids != ()


# ---------------------------------------------------------------- limits


def test_max_tokens_is_clamped_to_the_window(qwen: TextModel) -> None:
    request = ask(limits=Limits(max_tokens=128_000))
    prompt_len = qwen.render(request)[0].num_tokens
    assert resolve(qwen, request, prompt_len + 10)[0].max_tokens == 10
    assert resolve(qwen, ask(), 100_000)[0].max_tokens == 8192
    assert resolve(qwen, ask(), prompt_len + 10)[0].max_tokens == 10
    assert resolve(qwen, ask(limits=Limits(max_tokens=5)))[0].max_tokens == 5
    assert resolve(qwen, ask(limits=Limits(max_tokens=0)))[0].max_tokens == 0


@pytest.mark.parametrize("missing", [0, 1, 50])
def test_a_prompt_too_long_is_refused_with_numbers_that_compare(qwen: TextModel, missing: int) -> None:
    request = ask("hello " * 100)
    num_tokens = qwen.render(request)[0].num_tokens
    with pytest.raises(ApiError) as caught:
        resolve(qwen, request, num_tokens - missing)
    assert caught.value.code == "context_length_exceeded"
    sizes = caught.value.extras
    assert sizes["prompt_len"] == num_tokens > sizes["max"]
    assert f"{num_tokens} tokens > {sizes['max']} maximum" in caught.value.message


# ---------------------------------------------------------------- seeds and choices


def test_choices_are_prompt_major_with_seeds_of_their_own(qwen: TextModel) -> None:
    request = Request(
        model="tiny",
        prompts=(RawPrompt(text="a"), RawPrompt(text="b")),
        num_choices=3,
        sampling=Sampling(seed=42),
        echo=True,
        logprobs=0,
    )
    choices = resolve(qwen, request)
    assert [choice.choice for choice in choices] == list(range(6))
    assert [choice.prompt.text for choice in choices] == ["a"] * 3 + ["b"] * 3
    assert choices[0].sampling.seed == 42
    assert len({choice.sampling.seed for choice in choices}) == 6
    assert [choice.sampling.seed for choice in resolve(qwen, request)] == [c.sampling.seed for c in choices]
    assert all(choice.prompt_logprobs for choice in choices)
    frame = choices[4].generate(17, (1, 2))
    assert (frame.request_id, frame.prompt_ids, frame.output_ids) == (17, choices[4].prompt.token_ids, (1, 2))


def test_a_request_without_a_seed_gets_a_fresh_one(qwen: TextModel) -> None:
    assert resolve(qwen, ask())[0].sampling.seed != resolve(qwen, ask())[0].sampling.seed


@given(st.integers(-(2**70), 2**70), st.integers(0, 200))
def test_seeds_fit_in_63_bits(qwen: TextModel, seed: int, choice: int) -> None:
    base = resolve(qwen, ask(sampling=Sampling(seed=seed)))[0].sampling.seed
    assert 0 <= base < 2**63
    assert 0 <= choice_seed(base, choice) < 2**63


@pytest.mark.parametrize("token_id", [-1, 10**6])
def test_logit_bias_outside_the_vocabulary(qwen: TextModel, token_id: int) -> None:
    with pytest.raises(ApiError) as caught:
        resolve(qwen, ask(sampling=Sampling(logit_bias={3: 1.0, token_id: 2.0})))
    assert caught.value.param == "logit_bias"
    assert caught.value.status == 400
