"""Steps of every shape that makes a kernel's variant, run once at load: nothing is compiled while requests wait.

What a Triton kernel is compiled for are its constants: head size, window, tile shapes, whether contexts are cut, which
of sampling's parts are wanted, and the length of the list of query blocks, rounded up to a power of two.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from neuron.engine.sampling.sampling_rows import SamplingRows
from neuron.engine.scheduler.scheduler import Chunk, StepPlan
from neuron.engine.scheduler.sequence import Sequence
from neuron.engine.scheduler.token_bias import TokenBias
from neuron.protocol import Generate, SamplingParams

if TYPE_CHECKING:
    from neuron.engine.step.runner import ModelRunner

# Products with few rows of input have kernels of their own, for one number of rows each.
_FEW_ROWS = 16
# A chunk behind a context of this length is cut along it, whatever the tile shapes.
_LONG_PREFIX = 2048


def every_variant(runner: ModelRunner, *, max_step_tokens: int, max_running: int, max_model_len: int) -> None:
    """Run steps of each kind on page 0, which all ranks of a group do alike. Raises what the device raises."""
    with runner.untold():
        for shapes in _shapes(max_step_tokens, max_running, max_model_len):
            runner.execute(_plan(shapes, runner.kv.page_size))
        for rows in _sampling_rows(runner.vocab_size):
            runner.sample_zeros(rows)
        runner.zero_pages([0])


def _shapes(max_step_tokens: int, max_running: int, max_model_len: int) -> Iterator[list[tuple[int, int]]]:
    """Steps as lists of (first position, number of tokens)."""
    powers = [1 << bit for bit in range(max_running.bit_length())]
    for number in sorted({*range(1, min(_FEW_ROWS, max_running) + 1), *powers, max_running}):
        yield [(1, 1)] * number
    for number in powers:
        if 2 * number <= max_step_tokens:
            yield [(0, 2)] * number
    prefix = min(_LONG_PREFIX, max_model_len - 2) // 16 * 16
    if prefix > 0:
        for number in powers:
            if 2 * number <= max_step_tokens:
                yield [(prefix, 2)] * number
    if max_running > 1 and max_step_tokens > 3:
        yield [(1, 1), (0, 2)]


def _plan(shapes: list[tuple[int, int]], page_size: int) -> StepPlan:
    chunks = []
    for number, (start, num_tokens) in enumerate(shapes):
        request = Generate(number, [0] * (start + num_tokens), SamplingParams(temperature=0.0), 1)
        sequence = Sequence(request, number)
        sequence.pages.extend([0] * (-(-(start + num_tokens) // page_size)))
        chunks.append(Chunk(sequence, start, num_tokens, 1))
    num_decodes = sum(chunk.num_tokens == 1 for chunk in chunks)
    return StepPlan(0, chunks, num_decodes, sum(chunk.num_tokens for chunk in chunks))


def _sampling_rows(vocab_size: int) -> Iterator[SamplingRows]:
    """Every part that sampling may have, alone and with the others."""
    truncated = SamplingParams(temperature=0.7, top_k=20, top_p=0.9, min_p=0.01, presence_penalty=1.0, logprobs=1)
    for number in (1, 2):
        for has_penalties in (False, True):
            for has_masks in (False, True):
                rows = SamplingRows(number, is_plain=False, params=[truncated] * number, positions=[0] * number)
                if has_penalties:
                    rows.biases = [(row, TokenBias(truncated, [0], [0])) for row in range(number)]
                if has_masks:
                    rows.mask_rows = list(range(number))
                    rows.masks = np.full((number, -(-vocab_size // 32)), -1, dtype=np.int32)
                yield rows
