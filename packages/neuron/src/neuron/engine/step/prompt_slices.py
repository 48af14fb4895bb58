"""Rows of a step that log-probabilities of prompts need, in parts of bounded size."""

from __future__ import annotations

from dataclasses import dataclass

from neuron.engine.scheduler.scheduler import Chunk

# Prompt log-probabilities need logits of every prompt token; they are made for this many tokens at a time.
_LOGITS_SLICE = 64


@dataclass(frozen=True, slots=True)
class PromptSlice:
    """Rows of a step whose logits prompt log-probabilities need. chunk: its index. first_token: what row 0 predicts."""

    chunk: int
    first_row: int
    num_rows: int
    first_token: int


def prompt_slices(chunks: list[Chunk]) -> list[PromptSlice]:
    """Of a step with these chunks, in their order; none where nobody asks for log-probabilities of a prompt."""
    slices: list[PromptSlice] = []
    begin = 0
    for index, chunk in enumerate(chunks):
        sequence = chunk.sequence
        if sequence.wants_prompt_logprobs:
            # Row i of the chunk predicts token start+i+1, of which only prompt tokens count.
            num_rows = min(chunk.num_tokens, sequence.num_prompt - 1 - chunk.start)
            slices += [
                PromptSlice(index, begin + row, min(_LOGITS_SLICE, num_rows - row), chunk.start + row + 1)
                for row in range(0, num_rows, _LOGITS_SLICE)
            ]
        begin += chunk.num_tokens
    return slices
