"""KV cache capacity: what it holds, what a request needs of it, and the one place that decides whether it fits.

The load preflight asks it of an estimated cache, `servable` and every request ask it of the real one (law 7, F25).
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
from cortex_core.errors import ApiError

from neuron.protocol import CacheGroup

_MIB = 2**20

# Before any answer has been seen, one is expected to have up to 256 + 4 · 192 = 1024 tokens.
_FIRST_MEAN = 256.0
_FIRST_DEVIATION = 192.0
# Gains of Jacobson's estimator: 1/8 for the mean, 1/4 for the deviation, and four deviations on top.
_MEAN_GAIN = 0.125
_DEVIATION_GAIN = 0.25
_NUM_DEVIATIONS = 4.0


class KVNeed(msgspec.Struct, frozen=True):
    """KV pages of a request. minimum: without these it can never run, its longest prompt and one token of output;
    expected: what it is likely to hold in all, which is what admission reserves. output_tokens: of all choices
    together, as far as `expected` covers them."""

    minimum: int
    expected: int
    output_tokens: int = 0
    num_prompts: int = 1


class KVCapacity(msgspec.Struct, frozen=True):
    """A KV cache: usable pages of `page_size` tokens of every layer; bytes_per_token over all ranks.

    groups: what those bytes are made of, where the engine has said so.
    """

    num_pages: int
    page_size: int
    bytes_per_token: int
    groups: tuple[CacheGroup, ...] = ()

    @property
    def num_tokens(self) -> int:
        return self.num_pages * self.page_size

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def megabytes(self, num_pages: int) -> int:
        """Size of so many pages in MiB."""
        return num_pages * self.page_size * self.bytes_per_token // _MIB

    def need(self, prompts: Iterable[tuple[int, int]], *, num_choices: int, expected_output: int) -> KVNeed:
        """What a request needs. prompts: length of each, and the most output tokens that each choice of it may have.

        The choices of one prompt share its pages. Output counts as far as `expected_output`: the engine sets
        sequences back when pages run out and computes them again, so that expecting too little costs time and nothing
        else, while reserving `max_tokens`, which clients set to thousands, would leave most of the cache empty.
        """
        minimum = expected = output_tokens = num_prompts = 0
        for prompt_len, max_tokens in prompts:
            output = max(1, min(max_tokens, expected_output))
            minimum = max(minimum, self.pages_for(prompt_len + 1))
            expected += self.pages_for(prompt_len + output) + (num_choices - 1) * (self.pages_for(output) + 1)
            output_tokens += num_choices * output
            num_prompts += 1
        return KVNeed(minimum, expected, output_tokens, num_prompts)

    def refusal(self, need: KVNeed) -> ApiError | None:
        """Why a request can never run here, whoever else leaves; None if it can. 413, not retryable."""
        if need.minimum <= self.num_pages:
            return None
        required, budget = self.megabytes(need.minimum), self.megabytes(self.num_pages)
        return ApiError(
            "request_too_large",
            f"The prompt needs a KV cache of {need.minimum * self.page_size} tokens ({required} MiB), and this "
            f"model's has {self.num_tokens} ({budget} MiB). Please reduce its length.",
            code="prompt_too_long_for_vram",
            extras={"required_mb": required, "budget_mb": budget},
        )


class OutputEstimate:
    """How many tokens an answer of a model is expected to have at most: the mean of those seen and four deviations.

    The estimator is that of TCP's retransmission timer (Jacobson 1988): two running averages, of the value and of its
    distance from the mean.
    """

    def __init__(self, *, ceiling: int) -> None:
        self._ceiling = ceiling
        self._mean = _FIRST_MEAN
        self._deviation = _FIRST_DEVIATION

    def observe(self, num_tokens: int) -> None:
        """An answer has ended with so many tokens."""
        error = num_tokens - self._mean
        self._mean += _MEAN_GAIN * error
        self._deviation += _DEVIATION_GAIN * (abs(error) - self._deviation)

    @property
    def num_tokens(self) -> int:
        """At least 1, at most the ceiling."""
        return max(1, min(self._ceiling, round(self._mean + _NUM_DEVIATIONS * self._deviation)))
