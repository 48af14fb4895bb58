"""Step plans of synthetic sequences: what the scheduler would plan in the middle of such a load."""

from __future__ import annotations

import random
from typing import Any

import torch
from neuron.engine.attention.interface import StepBatch
from neuron.engine.scheduler.scheduler import Chunk, StepPlan
from neuron.engine.scheduler.sequence import Sequence
from neuron.engine.step.batch import BatchBuilder
from neuron.protocol import Generate, SamplingParams

PAGE_SIZE = 16
GREEDY = SamplingParams(temperature=0.0)


def pages_for(num_sequences: int, context_len: int) -> int:
    """Pages of the pool, page 0 included."""
    return num_sequences * -(-context_len // PAGE_SIZE) + 1


def step_plan(num_sequences: int, *, context_len: int, query_len: int, vocab_size: int = 1000) -> StepPlan:
    """Sequences of `context_len` tokens after the step, whose last `query_len` are computed in it.

    Their pages are a random permutation of the pool, as after hours of service.
    """
    rng = random.Random(context_len * 1000 + num_sequences)
    per_sequence = -(-context_len // PAGE_SIZE)
    pages = list(range(1, pages_for(num_sequences, context_len)))
    rng.shuffle(pages)
    chunks = []
    for index in range(num_sequences):
        tokens = [rng.randrange(vocab_size) for _ in range(context_len)]
        sequence = Sequence(Generate(index, tokens, GREEDY, 1), index)
        sequence.pages.extend(pages[index * per_sequence : (index + 1) * per_sequence])
        chunks.append(Chunk(sequence, context_len - query_len, query_len, True))
    num_decodes = num_sequences if query_len == 1 else 0
    return StepPlan(0, chunks, num_decodes, num_sequences * query_len)


def step_batch(plan: StepPlan, device: torch.device) -> StepBatch:
    """The batch of a plan in buffers of its own."""
    longest = max(chunk.start + chunk.num_tokens for chunk in plan.chunks)
    limits: dict[str, Any] = {
        "max_tokens": plan.num_tokens,
        "max_sequences": len(plan.chunks),
        "max_pages": -(-longest // PAGE_SIZE),
    }
    return BatchBuilder(page_size=PAGE_SIZE, device=device, **limits).build(plan)
