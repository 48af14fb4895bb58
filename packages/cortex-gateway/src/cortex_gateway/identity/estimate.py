"""Estimates of a request's use: the most it can be, before it runs, and what it was where nobody says. Pure.

Two figures, for two promises. A budget must never be overshot, so it reserves a bound: no text has more tokens than
bytes, an answer is no longer than the client's own limit, and prompt and answer together fit the model's window. A
rate is there to smooth, so it reserves an estimate of four bytes to a token.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Protocol

import msgspec
from cortex_core.dialects.limits import MAX_PROMPTS
from cortex_core.entitlements import Budget
from cortex_core.fleet import ContextLimit, ModelCost

TEMPLATE_TOKENS = 512
"""What a chat template may add that is in no byte of the body: role marks, the preamble for tools."""

TYPICAL_BYTES_PER_TOKEN = 4
DEFAULT_OUTPUT_TOKENS = 4096
"""Reserved for an answer where neither the client nor the model says how long it may become."""

MAX_TOKENS_PER_SECOND = 200
"""No single sequence is generated faster: bounds what a client that hung up can have used."""

NANO_USD = 1_000_000_000
MAX_AMOUNT = 2**62
"""Amounts live in 64-bit columns; a client chooses `max_tokens`."""


class _Ask(msgspec.Struct, frozen=True):
    """The few fields that bound an answer, of every dialect. Wrong types are for the neuron to refuse."""

    max_tokens: Any = None
    max_completion_tokens: Any = None
    max_output_tokens: Any = None
    n: Any = None
    best_of: Any = None
    prompt: msgspec.Raw = msgspec.Raw(b"")


class Asked(msgspec.Struct, frozen=True):
    """What an estimate needs to know of a body of `num_bytes`. output, output_bound: the smallest and the largest
    number of tokens that it asks for in each of its `num_choices` answers; 0 where it does not say."""

    num_bytes: int
    output: int = 0
    output_bound: int = 0
    num_choices: int = 1
    num_prompts: int = 1


class Body(Protocol):
    """A request's body, of which somebody has read that already."""

    def asked(self) -> Asked | None: ...


class MeteredTokens(msgspec.Struct, frozen=True):
    """Tokens; `cached` of the prompt came out of a prefix cache."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0

    @property
    def total(self) -> int:
        return self.prompt + self.completion


class Estimate(msgspec.Struct, frozen=True):
    """bound is the most a request can use in prompt and in answer, bound_total in both together; typical is what it
    probably will use; num_choices answers are written in parallel.
    """

    bound: MeteredTokens = MeteredTokens()
    bound_total: int = 0
    typical: MeteredTokens = MeteredTokens()
    num_choices: int = 1


NOTHING = Estimate()
NOTHING_USED = MeteredTokens()
_decoder = msgspec.json.Decoder(_Ask)
_FIRST = re.compile(rb"\[\s*+")
_PROMPT = re.compile(rb'\s*+(?:"(?:[^"\\]++|\\.)*+"|\[[^\["\]]*+\])\s*+,?', re.DOTALL)
"""One of a list of prompts: a text, or token ids."""


def asked_of(body: bytes) -> Asked | None:
    """None for a body that is no request."""
    try:
        ask = _decoder.decode(body)
        num_prompts = _num_prompts(bytes(ask.prompt))
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None
    return _asked(ask, num_prompts, len(body))


def asked_of_fields(fields: Mapping[str, msgspec.Raw], num_bytes: int) -> Asked | None:
    """`asked_of` a body of so many bytes, from its fields."""
    named = {name: bytes(fields[name]) for name in _Ask.__struct_fields__ if name in fields}
    try:
        num_prompts = _num_prompts(named.pop("prompt", b""))
        ask = _decoder.decode(b"{%b}" % b",".join(b'"%b":%b' % (name.encode(), text) for name, text in named.items()))
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None
    return _asked(ask, num_prompts, num_bytes)


def _asked(ask: _Ask, num_prompts: int, num_bytes: int) -> Asked:
    outputs = [
        count
        for value in (ask.max_tokens, ask.max_completion_tokens, ask.max_output_tokens)
        if (count := _count(value))
    ]
    return Asked(
        num_bytes=num_bytes,
        output=_bounded(min(outputs, default=0)),
        output_bound=_bounded(max(outputs, default=0)),
        num_choices=_bounded(max(_count(ask.n), _count(ask.best_of), 1) * num_prompts),
        num_prompts=num_prompts,
    )


def estimate(body: bytes, limit: ContextLimit | None, *, min_bytes_per_token: float = 1.0) -> Estimate:
    """What `body` may cost on a model with this window. A body that is no request costs nothing: it is refused."""
    return estimate_of(asked_of(body), limit, min_bytes_per_token=min_bytes_per_token)


def estimate_of(asked: Asked | None, limit: ContextLimit | None, *, min_bytes_per_token: float = 1.0) -> Estimate:
    """`estimate` of a body that has been read."""
    if asked is None:
        return NOTHING
    num_choices, num_prompts = asked.num_choices, asked.num_prompts
    prompt = asked.num_bytes // TYPICAL_BYTES_PER_TOKEN + 1
    prompt_bound = math.ceil(asked.num_bytes / min_bytes_per_token) + TEMPLATE_TOKENS * num_prompts
    if asked.output_bound:
        output, output_bound = asked.output, asked.output_bound
    else:
        output = (limit.output if limit is not None else None) or DEFAULT_OUTPUT_TOKENS
        # A neuron may fill what the prompt leaves of the window.
        output_bound = limit.context if limit is not None else output
    total = prompt_bound + output_bound * num_choices
    if limit is not None:
        window = limit.context
        prompt, prompt_bound = min(prompt, window * num_prompts), min(prompt_bound, window * num_prompts)
        output, output_bound = min(output, window), min(output_bound, window)
        total = min(prompt_bound + output_bound * num_choices, window * num_choices)
    return Estimate(
        bound=MeteredTokens(prompt=_bounded(prompt_bound), completion=_bounded(output_bound * num_choices)),
        bound_total=_bounded(total),
        typical=MeteredTokens(prompt=_bounded(prompt), completion=_bounded(output * num_choices)),
        num_choices=num_choices,
    )


def unmetered_usage(estimate: Estimate, *, num_events: int | None, seconds: float) -> MeteredTokens:
    """What was used by an answer that ended without saying so (a client that hung up, an older neuron).

    num_events: of a stream, each about a token; None for an answer that came (or was to come) in one piece, of
    which only the time it ran for is known.
    """
    if num_events is None:
        num_events = math.ceil(seconds * MAX_TOKENS_PER_SECOND) * estimate.num_choices
    return MeteredTokens(prompt=estimate.typical.prompt, completion=min(num_events, estimate.bound.completion))


def reserved_amount(budget: Budget, estimate: Estimate, cost: ModelCost | None) -> int:
    """In the unit of the budget: tokens, or billionths of a US dollar. A model without a price is free."""
    if budget.tokens is not None:
        return estimate.bound_total
    if cost is None:
        return 0
    prompt_price = max(cost.input, cost.cache_read or 0.0)
    bound, room = estimate.bound, estimate.bound_total
    # Prompt and answer share the window: the worst case gives the dearer half all it may have.
    if cost.output >= prompt_price:
        completion = min(bound.completion, room)
        prompt = min(bound.prompt, room - completion)
    else:
        prompt = min(bound.prompt, room)
        completion = min(bound.completion, room - prompt)
    return _nano_usd(prompt * prompt_price + completion * cost.output)


def used_amount(budget: Budget, usage: MeteredTokens, cost: ModelCost | None) -> int:
    if budget.tokens is not None:
        return usage.total
    if cost is None:
        return 0
    cached = min(usage.cached, usage.prompt)
    cache_read = cost.input if cost.cache_read is None else cost.cache_read
    return _nano_usd((usage.prompt - cached) * cost.input + cached * cache_read + usage.completion * cost.output)


def cap_of(budget: Budget) -> int:
    return budget.tokens if budget.tokens is not None else round((budget.cost_usd or 0.0) * NANO_USD)


def _nano_usd(usd_per_million: float) -> int:
    """Rounded up, but not for the noise of floating point."""
    return min(math.ceil(round(usd_per_million * NANO_USD / 1_000_000, 6)), MAX_AMOUNT)


def _bounded(count: int) -> int:
    return min(count, MAX_AMOUNT)


def _count(value: Any) -> int:
    """A positive count, or 0 for what is none."""
    if type(value) is int:
        return max(value, 0)
    return math.ceil(value) if type(value) is float and 0 < value < MAX_AMOUNT else 0


def _num_prompts(prompt: bytes) -> int:
    """Completions take a list of prompts: of texts, or of lists of token ids. A list of ids is one prompt. More than a
    request may hold are not counted: it is refused."""
    if not prompt.startswith(b"["):
        return 1
    first = _FIRST.match(prompt)
    if first is None or prompt[first.end() : first.end() + 1] not in (b'"', b"["):
        return 1
    count, at = 0, first.end()
    while count < MAX_PROMPTS and (found := _PROMPT.match(prompt, at)) is not None:
        count, at = count + 1, found.end()
    return max(count, 1)
