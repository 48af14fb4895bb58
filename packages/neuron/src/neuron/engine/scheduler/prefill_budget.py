"""Prefill budget: how many prompt tokens a step may compute, and who gets them. Pure: times are given, no clock.

A step cannot be interrupted: decodes, newcomers and cancellations wait for its end. So while somebody waits a step has
a time to keep, and the number of prompt tokens follows the speed that was measured; while nobody does, it is as large
as pays. Within a step, the prompt that came first has at least half of the tokens, so that it is never starved; the
other half goes to the shortest of the rest, so that a short request beside a long one has its first token in the next
step.
"""

from __future__ import annotations

from collections.abc import Sequence

WAITED_FOR_S = 0.5
"""The longest that a step may be made by prefill while others wait for its end."""
ALONE_S = 4.0
"""The same while nobody does: a newcomer, or a cancellation, may come."""
SHORTEST_S = 0.2
"""A pause that whoever reads a stream hardly notices: faster decodes do not make chunks any shorter. Short chunks cost
throughput: those who came together decode at different times, each step with fewer of them."""
DECODE_SHARE = 0.9
"""Of the time of a step of decodes alone: so much may prefill add at any time, and no gap is twice as long as the
others. It may add more where many sequences wait for their prompts and few for their next token."""
DECODES_PER_PROMPT = 4
"""As long as no more decode for each prompt that waits, a step may take all of its time."""
_UNIT = 16
_LEARNING = 0.5
# What a short chunk takes says little about the cost of a token of a long one.
_TELLING_TOKENS = 16


class PrefillBudget:
    """Tokens of prefill for the next step, from the speed of the last ones.

    step_seconds, seconds_per_token: of a step of decodes, and of a prompt's token, as warming up has shown them.
    max_tokens: what a step may have of them in any case; whoever runs out of memory lowers it. keeps_decodes_even:
    where many decode and few prompts come, chunks are so short that decodes come at even intervals, as on a CPU, where
    a token of a prompt costs nearly as much as one of a decode; a device's decodes are all launch and memory, and
    chunks that short would waste it.
    """

    def __init__(
        self,
        *,
        max_tokens: int,
        step_seconds: float = 0.0,
        seconds_per_token: float = 0.0,
        keeps_decodes_even: bool = False,
    ) -> None:
        self.max_tokens = max_tokens
        self._per_token = seconds_per_token
        self._decode_s = step_seconds
        self._keeps_decodes_even = keeps_decodes_even

    def learn(self, prefill_tokens: int, num_decodes: int, seconds: float) -> None:
        """A step with so many prefill tokens and decodes took so long."""
        if not prefill_tokens:
            if num_decodes:
                self._decode_s = _towards(self._decode_s, seconds)
        elif prefill_tokens >= min(_TELLING_TOKENS, self.max_tokens):
            decodes_s = min(self._decode_s, seconds / 2) if num_decodes else 0.0
            self._per_token = _towards(self._per_token, (seconds - decodes_s) / prefill_tokens)

    def tokens(self, num_decodes: int, num_prompts: int) -> int:
        """For a step with so many decodes, while so many prompts are computed or wait for it."""
        if not num_decodes:
            return self._in(WAITED_FOR_S if num_prompts > 1 else ALONE_S)
        if not self._keeps_decodes_even:
            return self._in(WAITED_FOR_S)
        by_heads = WAITED_FOR_S * DECODES_PER_PROMPT * num_prompts / num_decodes
        return self._in(min(max(DECODE_SHARE * self._decode_s, by_heads, SHORTEST_S), WAITED_FOR_S))

    @property
    def most(self) -> int:
        """What any next step may have."""
        return self._in(ALONE_S)

    def _in(self, seconds: float) -> int:
        """In few sizes (powers of two and quarters between), so that a prompt is mostly cut alike: where it is cut
        decides the last bits of scores."""
        if self._per_token * self.max_tokens <= seconds:
            return self.max_tokens
        tokens = _UNIT
        while 2 * tokens * self._per_token <= seconds:
            tokens *= 2
        quarter = tokens // 4
        while (tokens + quarter) * self._per_token <= seconds:
            tokens += quarter
        return min(tokens, self.max_tokens)


def _towards(known: float, seen: float) -> float:
    return seen if not known else known + _LEARNING * (seen - known)


def shares(budget: int, lengths: Sequence[int]) -> list[int]:
    """Tokens for each prompt, given what each still needs, in order of arrival.

    The first has what it needs up to half of the budget, at least; then the shortest of the others come, each with all
    that is left of the budget or all that it needs; what they leave is the first one's, too.
    """
    given = [0] * len(lengths)
    if not lengths:
        return given
    needed_by_others = sum(lengths[1:])
    given[0] = min(lengths[0], max(budget - needed_by_others, -(-budget // 2)))
    left = budget - given[0]
    for index in sorted(range(1, len(lengths)), key=lambda index: lengths[index]):
        given[index] = min(lengths[index], left)
        left -= given[index]
    return given
