"""Request fields that several OpenAI surfaces share, their limits included."""

from __future__ import annotations

from typing import Any

from cortex_core.conversation import Reasoning, Sampling
from cortex_core.dialects.json_body import Fields, one_of, show, unsupported, wrong_type
from cortex_core.errors import invalid

MAX_TOKENS_CEILING = 2**31 - 1
"""Larger values are cut to this: a limit is clamped to the window, never refused for being large."""

MAX_CHOICES = 128
MAX_STOP_SEQUENCES = 64
"""The official limit is four; editors send more, and each costs a comparison per token."""

REASONING_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
THINKING_TYPES = ("enabled", "adaptive", "auto", "disabled")

_MAX_TOKEN_ID = 2**31 - 1
MAX_TOKEN_ID_DIGITS = 9
"""No vocabulary has a thousand million tokens."""


def max_tokens(body: Fields, name: str, *, minimum: int = 1) -> int | None:
    value = body.integer(name, minimum)
    return None if value is None else min(value, MAX_TOKENS_CEILING)


def num_choices(body: Fields) -> int:
    return body.integer("n", 1, MAX_CHOICES) or 1


def sampling(body: Fields) -> Sampling:
    """The official sampling fields and the extensions `top_k`, `min_p` and `repetition_penalty`."""
    return Sampling(
        temperature=body.number("temperature", 0, 2),
        top_p=body.number("top_p", 0, 1),
        top_k=top_k(body),
        min_p=body.number("min_p", 0, 1),
        presence_penalty=body.number("presence_penalty", -2, 2),
        frequency_penalty=body.number("frequency_penalty", -2, 2),
        repetition_penalty=body.number("repetition_penalty", 0, 10, minimum_is_excluded=True),
        logit_bias=logit_bias(body),
        seed=body.integer("seed", -(2**63), 2**64 - 1),
    )


def top_k(body: Fields) -> int | None:
    """0 and -1 both switch it off."""
    value = body.integer("top_k", -1)
    return None if value is None else min(max(value, 0), _MAX_TOKEN_ID)


def logit_bias(body: Fields) -> dict[int, float]:
    """Token ids arrive as strings, being JSON keys."""
    biases = body.object("logit_bias")
    if biases is None:
        return {}
    result: dict[int, float] = {}
    for key in biases.values:
        if not (key.isascii() and key.isdigit() and len(key) <= MAX_TOKEN_ID_DIGITS):
            path = biases.at(key[:20])
            raise invalid(f"{path}: keys are token ids, got {show(key)}", param=path)
        bias = biases.number(key, -100, 100)
        if bias is None:
            raise wrong_type(biases.at(key), "a number", None)
        result[int(key)] = bias
    return result


def stop(body: Fields, name: str = "stop") -> tuple[str, ...]:
    """A string, an array of strings, or null."""
    value = body.get(name)
    path = body.at(name)
    if value is None:
        return ()
    if type(value) is str:
        value = [value]
    if type(value) is not list:
        raise wrong_type(path, "a string or an array of strings", value)
    if len(value) > MAX_STOP_SEQUENCES:
        raise invalid(f"{path}: at most {MAX_STOP_SEQUENCES} sequences, got {len(value)}", param=path)
    for index, sequence in enumerate(value):
        if type(sequence) is not str:
            raise wrong_type(f"{path}[{index}]", "a string", sequence)
        if not sequence:
            raise invalid(f"{path}[{index}]: must not be empty", param=f"{path}[{index}]")
    return tuple(dict.fromkeys(value))


def include_usage(body: Fields) -> bool:
    """Whether a stream ends with a usage chunk. `include_obfuscation` is a hint and is ignored."""
    options = body.object("stream_options")
    return options is not None and options.boolean("include_usage")


def reasoning(effort: str | None, fields: Fields, template_kwargs: Fields | None) -> Reasoning:
    """Four ways to say it; the more specific to the model wins: effort < thinking < enable_thinking < kwargs."""
    thinks: bool | None = None if effort is None else effort != "none"
    budget_tokens = None
    thinking = fields.object("thinking")
    if thinking is not None:
        kind = thinking.required_string("type")
        if kind not in THINKING_TYPES:
            raise one_of("thinking.type", kind, THINKING_TYPES)
        thinks = kind != "disabled"
        budget_tokens = max_tokens(thinking, "budget_tokens")
    for source in (fields, template_kwargs):
        switch = None if source is None else source.optional_boolean("enable_thinking")
        thinks = thinks if switch is None else switch
    return Reasoning(
        mode="default" if thinks is None else "on" if thinks else "off",
        effort=None if effort == "none" else effort,
        budget_tokens=budget_tokens,
    )


def json_schema(value: Any, path: str) -> dict[str, Any] | bool:
    """A JSON Schema as decoded; whether it compiles is found out where it is compiled."""
    if type(value) is dict or type(value) is bool:
        return value
    raise wrong_type(path, "a JSON Schema object", value)


def refuse_unsupported(body: Fields, names: tuple[str, ...], why: str) -> None:
    """Refuse by name what would change the answer but cannot be honoured. null, false and 0 ask for nothing."""
    for name in names:
        if body.get(name):
            raise unsupported(body.at(name), why)
