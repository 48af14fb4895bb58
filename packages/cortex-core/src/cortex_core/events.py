"""The internal event stream: what the engine's tokens become and every dialect projects.

Order for one choice: (ReasoningDelta | TextDelta | ToolCallStart ToolCallArguments* ToolCallEnd)*, then one Finish.
After the Finish of every choice exactly one Usage ends the stream. A Failure may end it at any point instead.
Choices may interleave.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from cortex_core.errors import ApiError

FinishReason = Literal["stop", "stop_sequence", "length", "tool_calls", "content_filter"]


class TopLogprob(msgspec.Struct, frozen=True, gc=False):
    """One candidate: its text (a lone byte that is no text shows as U+FFFD), natural-log probability and bytes."""

    token: str
    logprob: float
    bytes: tuple[int, ...] | None = None


class TokenLogprob(msgspec.Struct, frozen=True, gc=False):
    """The sampled token, and under `top` its most likely rivals; fields as in `TopLogprob`."""

    token: str
    logprob: float
    bytes: tuple[int, ...] | None = None
    top: tuple[TopLogprob, ...] = ()


class ReasoningDelta(msgspec.Struct, frozen=True, tag="reasoning"):
    """Text of the model's reasoning, before or between its answer."""

    choice: int
    text: str


class TextDelta(msgspec.Struct, frozen=True, tag="text"):
    """`text` may be empty when only logprobs are to be carried (a token that completes no character yet)."""

    choice: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


class ToolCallStart(msgspec.Struct, frozen=True, tag="tool_call_start"):
    """`index` counts the calls of this choice from 0; `id` is a dialect-neutral unique hex string (no prefix)."""

    choice: int
    index: int
    id: str
    name: str


class ToolCallArguments(msgspec.Struct, frozen=True, tag="tool_call_arguments"):
    """A fragment of the call's JSON arguments; the fragments of one call concatenate to one JSON object."""

    choice: int
    index: int
    fragment: str


class ToolCallEnd(msgspec.Struct, frozen=True, tag="tool_call_end"):
    """The call is complete: no more fragments follow."""

    choice: int
    index: int


class Finish(msgspec.Struct, frozen=True, tag="finish"):
    """`stop_sequence` is the matched string when reason is `stop_sequence`, None where another server does not say."""

    choice: int
    reason: FinishReason
    stop_sequence: str | None = None


class Usage(msgspec.Struct, frozen=True, tag="usage"):
    """Token counts of the whole request, all choices summed.

    prompt_tokens includes cached_tokens; completion_tokens includes reasoning_tokens. A prompt shared by n
    choices is counted once.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    reasoning_tokens: int = 0


class Failure(msgspec.Struct, frozen=True):
    """The stream ends here with an error. Not serialisable: it holds the exception."""

    error: ApiError


Event = ReasoningDelta | TextDelta | ToolCallStart | ToolCallArguments | ToolCallEnd | Finish | Usage | Failure
