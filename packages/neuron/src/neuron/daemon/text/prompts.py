"""Prompts and choices: what a request becomes before the engine sees it. Plain data, cheap to import.

The text workers make them (`model.py`), the daemon holds them.
"""

from __future__ import annotations

from typing import Literal

import msgspec
from cortex_core.conversation import Request, ToolDefinition

from neuron.protocol import Generate, GrammarSpec, SamplingParams

ReasoningState = Literal["none", "possible", "open"]


class Prompt(msgspec.Struct, frozen=True):
    """One prompt, ready for prefill.

    text: what was tokenised; for a prompt given as ids, their text. is_chat: reasoning and tool-call markers in the
    output mean something (a raw completion's output is text and nothing else). reasoning: `open` when the prompt
    ends inside a reasoning block, `possible` when the model may open one itself, `none` otherwise.
    """

    token_ids: list[int]
    text: str
    is_chat: bool = True
    reasoning: ReasoningState = "none"

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def starts_in_reasoning(self) -> bool:
        return self.reasoning == "open"


class Choice(msgspec.Struct, frozen=True):
    """One choice, fully resolved; `generate` makes the engine's frame of it."""

    choice: int
    prompt: Prompt
    sampling: SamplingParams
    max_tokens: int
    stop_token_ids: tuple[int, ...]
    grammar: GrammarSpec | None = None
    prompt_logprobs: bool = False
    cache_salt: str = ""
    priority: int = 0

    def generate(self, request_id: int, output_ids: tuple[int, ...] = ()) -> Generate:
        """The frame that starts this choice, or resumes it after `output_ids`."""
        return Generate(
            request_id=request_id,
            prompt_ids=self.prompt.token_ids,
            sampling=self.sampling,
            max_tokens=self.max_tokens,
            stop_token_ids=self.stop_token_ids,
            grammar=self.grammar,
            output_ids=output_ids,
            prompt_logprobs=self.prompt_logprobs,
            cache_salt=self.cache_salt,
            priority=self.priority,
        )


def offered_tools(request: Request) -> tuple[ToolDefinition, ...]:
    """The tools the model is told of: none under `tool_choice: none`, else those that `allowed` leaves."""
    choice = request.tool_choice
    if choice.mode == "none":
        return ()
    if choice.allowed is not None:
        allowed = frozenset(choice.allowed)  # up to a thousand, asked for by each choice of an answer
        return tuple(tool for tool in request.tools if tool.name in allowed)
    return request.tools
