"""Request fields that several OpenAI surfaces share, their limits included."""

from __future__ import annotations

from typing import Any

from cortex_core.conversation import Reasoning, Sampling
from cortex_core.dialects import limits
from cortex_core.dialects.json_body import Fields, encode_compact, one_of, show, unsupported, wrong_type
from cortex_core.dialects.stop_sequences import read_stop_sequences
from cortex_core.errors import invalid

REASONING_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
THINKING_TYPES = ("enabled", "adaptive", "auto", "disabled")


def max_tokens(body: Fields, name: str, *, minimum: int = 1) -> int | None:
    value = body.integer(name, minimum)
    return None if value is None else min(value, limits.MAX_TOKENS_CEILING)


def num_choices(body: Fields) -> int:
    return body.integer("n", 1, limits.MAX_CHOICES) or 1


def sampling(body: Fields) -> Sampling:
    """The official sampling fields and the extensions `top_k`, `min_p` and `repetition_penalty`."""
    return Sampling(
        temperature=body.number("temperature", 0, 2),
        top_p=body.number("top_p", 0, 1),
        top_k=top_k(body),
        min_p=body.number("min_p", 0, 1),
        presence_penalty=body.number("presence_penalty", -2, 2),
        frequency_penalty=body.number("frequency_penalty", -2, 2),
        repetition_penalty=body.number("repetition_penalty", *limits.REPETITION_PENALTIES),
        logit_bias=logit_bias(body),
        seed=body.integer("seed", -(2**63), 2**64 - 1),
    )


def top_k(body: Fields) -> int | None:
    """0 and -1 both switch it off."""
    value = body.integer("top_k", -1)
    return None if value is None else min(max(value, 0), limits.MAX_TOKEN_ID)


def logit_bias(body: Fields) -> dict[int, float]:
    """Token ids arrive as strings, being JSON keys."""
    biases = body.object("logit_bias")
    if biases is None:
        return {}
    if len(biases.values) > limits.MAX_LOGIT_BIAS:
        what = f"at most {limits.MAX_LOGIT_BIAS} token ids, got {len(biases.values)}"
        raise invalid(f"{biases.path}: {what}", param=biases.path)
    result: dict[int, float] = {}
    for key in biases.values:
        if not (key.isascii() and key.isdigit() and len(key) <= limits.MAX_TOKEN_ID_DIGITS):
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
    return read_stop_sequences(value, path)


def cache_salt(body: Fields) -> str:
    """`cache_salt`, as vLLM has it. Raises `ApiError`."""
    value = body.string("cache_salt") or ""
    if len(value) > limits.MAX_CACHE_SALT:
        raise invalid(f"cache_salt: at most {limits.MAX_CACHE_SALT} characters, got {len(value)}", param="cache_salt")
    return value


def template_kwargs(body: Fields) -> Fields | None:
    """Variables for the chat template."""
    given = body.object("chat_template_kwargs")
    if given is not None:
        num_bytes = len(encode_compact(given.values).encode("utf-8", "replace"))
        if num_bytes > limits.MAX_TEMPLATE_KWARGS_BYTES:
            what = f"at most {limits.MAX_TEMPLATE_KWARGS_BYTES} bytes of JSON, got {num_bytes}"
            raise invalid(f"{given.path}: {what}", param=given.path)
    return given


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
