"""Defaults of sampling: what the client leaves open, generation_config says; what that leaves open, the reference does.

Resolved here and nowhere else: sampling parameters, seeds, the token limit and the stop tokens of each choice.
"""

from __future__ import annotations

import logging
import secrets
from pathlib import Path
from typing import Any

import msgspec
from cortex_core.conversation import Request
from cortex_core.errors import invalid, prompt_too_long

from neuron.checkpoint.files import read_object
from neuron.checkpoint.hyperparameters import INTEGERS, language_model
from neuron.daemon.prompt.tokenizer import Tokenizer
from neuron.daemon.text import limits
from neuron.daemon.text.prompts import Prompt
from neuron.protocol import SamplingParams

logger = logging.getLogger(__name__)

DEFAULT_TEMPERATURE = 0.7
DEFAULT_MAX_TOKENS = 8192
_END_OF_TURN_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<end_of_turn>")
# What files may name: each is sent with each request. Those of the field name eight at most.
_MAX_STOP_IDS = 128
_MAX_TOKEN_ID = INTEGERS["vocab_size"][1]
_SEED_BITS = 63
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15


class GenerationDefaults(msgspec.Struct, frozen=True):
    """Defaults of one model.

    stop_token_ids: every token that ends a turn, from generation_config, config, the tokenizer and the customary
    end-of-turn tokens. max_tokens: the limit of a request that names none, in tokens.
    """

    temperature: float = DEFAULT_TEMPERATURE
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    max_tokens: int = DEFAULT_MAX_TOKENS

    @classmethod
    def load(cls, path: Path, tokenizer: Tokenizer) -> GenerationDefaults:
        """Read `generation_config.json` and `config.json`; missing files and odd values fall back."""
        generation = read_object(path / "generation_config.json")
        config = read_object(path / "config.json")
        temperature = _number(generation, "temperature", 0.0, 100.0, DEFAULT_TEMPERATURE)
        if generation.get("do_sample") is False:
            temperature = 0.0
        stop_ids: dict[int, None] = {}
        for source in (generation, config, language_model(config)):
            eos = source.get("eos_token_id")
            for token_id in eos if isinstance(eos, list) else [eos]:
                if isinstance(token_id, int) and not isinstance(token_id, bool) and 0 <= token_id < _MAX_TOKEN_ID:
                    stop_ids[token_id] = None
        stop_ids = dict.fromkeys(list(stop_ids)[:_MAX_STOP_IDS])
        for token in (tokenizer.special_tokens.get("eos_token"), *_END_OF_TURN_TOKENS):
            found = tokenizer.token_id(token) if token else None
            if found is not None:
                stop_ids[found] = None
        return cls(
            temperature=temperature,
            top_p=_number(generation, "top_p", 0.0, 1.0, 1.0) or 1.0,
            top_k=int(_number(generation, "top_k", 0, 2**31 - 1, 0)),
            min_p=_number(generation, "min_p", 0.0, 1.0, 0.0),
            repetition_penalty=_number(generation, "repetition_penalty", 0.01, 100.0, 1.0),
            stop_token_ids=tuple(stop_ids),
        )


def resolve_sampling(request: Request, defaults: GenerationDefaults, vocab_size: int, seed: int) -> SamplingParams:
    """Sampling of one choice, every default applied. Raises `ApiError` for a logit_bias outside the vocabulary."""
    asked = request.sampling
    wrong = next((token_id for token_id in asked.logit_bias if not 0 <= token_id < vocab_size), None)
    if wrong is not None:
        raise invalid(f"token id {wrong} is not in the vocabulary (0 to {vocab_size - 1})", param="logit_bias")
    return SamplingParams(
        temperature=defaults.temperature if asked.temperature is None else asked.temperature,
        top_p=defaults.top_p if asked.top_p is None else asked.top_p,
        top_k=max(0, defaults.top_k if asked.top_k is None else asked.top_k),
        min_p=defaults.min_p if asked.min_p is None else asked.min_p,
        presence_penalty=asked.presence_penalty or 0.0,
        frequency_penalty=asked.frequency_penalty or 0.0,
        repetition_penalty=(
            defaults.repetition_penalty if asked.repetition_penalty is None else asked.repetition_penalty
        ),
        logit_bias=asked.logit_bias,
        seed=seed,
        logprobs=-1 if request.logprobs is None else request.logprobs,
    )


def request_seed(request: Request) -> int:
    """The request's seed as 63 bits, a fresh random one if it has none."""
    seed = request.sampling.seed
    return secrets.randbits(_SEED_BITS) if seed is None else seed & ((1 << _SEED_BITS) - 1)


def choice_seed(seed: int, choice: int) -> int:
    """The seed of one choice: choice 0 has the request's, the others well-mixed ones (SplitMix64, Steele 2014)."""
    if choice == 0:
        return seed
    mask = (1 << 64) - 1
    mixed = (seed + choice * _GOLDEN_GAMMA) & mask
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & mask
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
    return (mixed ^ (mixed >> 31)) >> 1


def resolve_max_tokens(request: Request, prompt_len: int, max_model_len: int, defaults: GenerationDefaults) -> int:
    """Output tokens of a choice: what was asked for, clamped to the rest of the window (in tokens).

    Raises `ApiError` `context_length_exceeded` when the prompt leaves no room for a single token. A request for
    0 tokens (a cache warm-up, or scoring with echo) stays 0.
    """
    room = max_model_len - prompt_len
    asked = request.limits.max_tokens
    if asked == 0 and room >= 0:
        return 0
    if room < 1:
        # a prompt of exactly the window is one too long: say so with numbers that compare
        param = "prompt" if request.prompts else "messages"
        raise prompt_too_long(prompt_len, max_model_len if room < 0 else max_model_len - 1, param=param)
    return min(defaults.max_tokens if asked is None else asked, room)


def check_scored(prompts: list[Prompt], num_choices: int) -> None:
    """Raises `ApiError` where prompts are too long to come back with log-probabilities."""
    for index, prompt in enumerate(prompts):
        if prompt.num_tokens > limits.MAX_SCORED_TOKENS:
            param = "prompt" if len(prompts) == 1 else f"prompt[{index}]"
            most = f"with echo and logprobs at most {limits.MAX_SCORED_TOKENS} tokens, got {prompt.num_tokens}"
            raise invalid(f"{param}: {most}", param=param)
    total = num_choices * sum(prompt.num_tokens for prompt in prompts)
    if total > limits.MAX_ALL_SCORED_TOKENS:
        most = f"with echo and logprobs at most {limits.MAX_ALL_SCORED_TOKENS} tokens in the prompts of all choices"
        raise invalid(f"prompt: {most}, got {total}", param="prompt")


def _number(source: dict[str, Any], key: str, low: float, high: float, default: float) -> float:
    value = source.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        return default  # a NaN lies nowhere
    return float(value)
