"""Executes step plans on the device: batch, forward pass, logits, sampling. One code path for CPU and CUDA."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from neuron.engine.batch import BatchBuilder, StepBatch, StepContext
from neuron.engine.sampler import Sampled, Sampler, token_logprobs
from neuron.engine.scheduler import Chunk, StepPlan
from neuron.engine.sequence import Sequence
from neuron.protocol import Generate, Logprobs, SamplingParams

if TYPE_CHECKING:
    from neuron.engine.kv_cache import PagedKV
    from neuron.layers.attention import AttentionBackend

# Prompt log-probabilities need logits of every prompt token; they are made for this many tokens at a time.
_LOGITS_SLICE = 64


class CausalModel(Protocol):
    """What the runner needs of a model; `neuron.models` implements it."""

    def forward(self, ctx: StepContext) -> Tensor:
        """Hidden states [T, H] of the step's tokens; writes their keys and values into the cache."""
        ...

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """[R, H] -> [R, V] float32."""
        ...


@dataclass(slots=True)
class ChunkResult:
    """What became of one chunk. `sampled` is None for a chunk that does not reach its sequence's last token."""

    chunk: Chunk
    sampled: Sampled | None = None
    prompt_logprobs: list[Logprobs] | None = None


class ModelRunner:
    """Runs one model over one cache on one device. Used by a single thread."""

    def __init__(
        self,
        model: CausalModel,
        kv: PagedKV,
        attention: AttentionBackend,
        *,
        vocab_size: int,
        max_step_tokens: int,
        max_running: int,
        max_model_len: int,
        device: torch.device,
    ) -> None:
        self._model = model
        self.kv = kv
        self._attention = attention
        self._device = device
        self._vocab_size = vocab_size
        self._builder = BatchBuilder(
            max_tokens=max_step_tokens,
            max_sequences=max_running,
            max_pages=-(-max_model_len // kv.page_size),
            page_size=kv.page_size,
            device=device,
        )
        self._sampler = Sampler(vocab_size, device)

    def execute(self, plan: StepPlan) -> list[ChunkResult]:
        """Run a plan; one result per chunk, in order. May be repeated: it writes the same cache slots again.

        Raises whatever the device raises; the engine decides what is lost.
        """
        with torch.inference_mode():
            batch = self._builder.build(plan)
            self._attention.prepare(batch)
            hidden = self._model.forward(StepContext(batch, self.kv, self._attention))
            results = [ChunkResult(chunk) for chunk in plan.chunks]
            sampling = [result for result in results if result.chunk.samples]
            if sampling:
                wanted = hidden if len(sampling) == batch.num_tokens else hidden[batch.logits_indices]
                logits = self._model.compute_logits(wanted)
                sampled = self._sampler.sample(logits, [result.chunk.sequence for result in sampling])
                for result, outcome in zip(sampling, sampled, strict=True):
                    result.sampled = outcome
            self._add_prompt_logprobs(hidden, batch, results)
        return results

    def _add_prompt_logprobs(self, hidden: Tensor, batch: StepBatch, results: list[ChunkResult]) -> None:
        begin = 0
        for result, query_len in zip(results, batch.query_lens_host, strict=True):
            chunk = result.chunk
            sequence = chunk.sequence
            if sequence.wants_prompt_logprobs:
                # Row i of the chunk predicts token start+i+1, of which only prompt tokens count.
                num_rows = min(query_len, sequence.num_prompt - 1 - chunk.start)
                result.prompt_logprobs = []
                for row in range(0, num_rows, _LOGITS_SLICE):
                    size = min(_LOGITS_SLICE, num_rows - row)
                    logits = self._model.compute_logits(hidden[begin + row : begin + row + size])
                    first = chunk.start + row + 1
                    tokens = sequence.tokens[first : first + size]
                    counts = [max(sequence.sampling.logprobs, 0)] * size
                    result.prompt_logprobs += token_logprobs(logits, tokens, counts)
            begin += query_len

    def warm_up(self, num_tokens: int, num_rows: int = 1) -> None:
        """Run a prefill of `num_tokens` and a decode on page 0, and sample `num_rows` rows.

        So no request pays for what is made on first use, and the allocator has seen steps of this size.
        """
        sampling = SamplingParams(top_p=0.5)
        request = Generate(request_id=0, prompt_ids=[0] * (num_tokens + 1), sampling=sampling, max_tokens=1)
        sequence = Sequence(request, 0)
        sequence.pages.extend([0] * (num_tokens // self.kv.page_size + 1))
        self.execute(StepPlan(0, [Chunk(sequence, 0, num_tokens, True)], 0, num_tokens))
        self.execute(StepPlan(0, [Chunk(sequence, num_tokens, 1, True)], 1, 1))
        with torch.inference_mode():
            self._sampler.sample(torch.zeros(num_rows, self._vocab_size, device=self._device), [sequence] * num_rows)
        self.zero_pages([0])
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def zero_pages(self, pages: list[int]) -> None:
        """Make pages that held untrusted values harmless."""
        with torch.inference_mode():
            self.kv.zero(pages)

    def free_memory(self) -> None:
        """After an out-of-memory error: give back what the failed step and the allocator still hold."""
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
