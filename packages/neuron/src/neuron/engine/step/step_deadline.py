"""Deadline of the next step, after which the group counts as stuck: a cost model learnt from the steps themselves."""

from __future__ import annotations

# A step may take this many times what the model expects of the longest one: contexts grow from chunk to chunk, a
# kernel is compiled for a shape that was not seen before, a host is busy with something else.
_MARGIN = 8.0
# Never less than this, however fast steps are: the longest pause of a healthy process (a page fault storm, a paused
# virtual machine's neighbour) is of this order and costs nobody his engine.
_FLOOR_S = 5.0
# Part of the distance to a lower figure that each step goes; a higher one is believed at once.
_FORGETTING = 0.05
# What a short chunk takes says little about the cost of a token.
_TELLING_TOKENS = 64


class StepDeadline:
    """Seconds of a step as `fixed + per_token * prefill tokens`, both kept at their recent peaks.

    step_seconds, seconds_per_token: of a step without prefill and of a token of it, as warming up has shown them.
    max_prefill_tokens: what a step may have of them.
    """

    def __init__(self, *, seconds_per_token: float, max_prefill_tokens: int, step_seconds: float = 0.0) -> None:
        self._per_token = seconds_per_token
        self._fixed = step_seconds
        self.max_prefill_tokens = max_prefill_tokens

    def learn(self, prefill_tokens: int, seconds: float) -> None:
        """A step with so many prefill tokens, besides its decodes, took so long."""
        if prefill_tokens >= min(_TELLING_TOKENS, self.max_prefill_tokens):
            self._per_token = _towards(self._per_token, max(seconds - self._fixed, 0.0) / prefill_tokens)
        else:
            self._fixed = _towards(self._fixed, seconds)

    @property
    def seconds(self) -> float:
        """The bound for any next step."""
        return _FLOOR_S + _MARGIN * (self._fixed + self._per_token * self.max_prefill_tokens)


def _towards(peak: float, seen: float) -> float:
    return seen if seen >= peak else peak + _FORGETTING * (seen - peak)
