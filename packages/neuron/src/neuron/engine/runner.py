"""Executes step plans on the device: batch, forward pass, logits, sampling. One code path for CPU and CUDA."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from neuron.engine.batch import BatchBuilder, PackedBatch, StepBatch, StepContext
from neuron.engine.errors import DeviceError, describe
from neuron.engine.sampler import Sampled, Sampler, token_logprobs
from neuron.engine.scheduler import Chunk, StepPlan
from neuron.engine.sequence import Sequence
from neuron.protocol import Generate, Logprobs, SamplingParams

if TYPE_CHECKING:
    from neuron.engine.kv_cache import PagedKV
    from neuron.engine.leader import StepLeader
    from neuron.engine.step_memory import StepMemory
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
    """Runs one model over one cache on one device. Used by a single thread.

    With several ranks each has a runner. Rank 0's has a `leader`, which tells the others of each step before it
    computes its own part; theirs are driven by `follow`. `memory`: what a step takes; None where nobody asks.
    deterministic: what is sampled of a row depends on it alone; model and attention have modes of their own for that.
    """

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
        leader: StepLeader | None = None,
        memory: StepMemory | None = None,
        deterministic: bool = False,
    ) -> None:
        self._model = model
        self._leader = leader
        self._memory = memory
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
        self._sampler = Sampler(vocab_size, device, row_by_row=deterministic)
        # What warming up has shown of a step without prefill, and of a token of it; then the engine learns by itself.
        self.step_seconds = 0.0
        self.prefill_seconds_per_token = 0.0

    def execute(self, plan: StepPlan) -> list[ChunkResult]:
        """Run a plan; one result per chunk, in order. May be repeated: it writes the same cache slots again.

        Raises whatever the device raises; the engine decides what is lost. With several ranks, a failure while the
        others may be in a collective of the step is a `DeviceError`, as is the loss of a rank; a step that does not
        fit into the memory of them all is refused before that, as `StepTooLarge`.
        """
        leader = self._leader
        results = [ChunkResult(chunk) for chunk in plan.chunks]
        with torch.inference_mode():
            batch = self._builder.build(plan)
            slices = _prompt_slices(results)
            if leader is not None:
                rows = [(first, size) for _, first, size in slices]
                leader.launch(plan.step, self._builder.pack(batch), rows, self.max_tokens_now)
            try:
                hidden = self._forward(batch)
                logits = self._sampling_logits(hidden, batch) if batch.logits_indices.shape[0] else None
                self._add_prompt_logprobs(hidden, slices)
            except Exception as exc:
                if leader is None:
                    raise
                raise DeviceError("rank_fault", f"step {plan.step} failed on rank 0: {describe(exc)}") from exc
            if leader is not None:
                leader.completed(batch.num_tokens, batch.logits_indices.shape[0])
            if logits is not None:
                # No collective follows: what fails from here on concerns this rank alone, and may be tried again.
                sampling = [result for result in results if result.chunk.samples]
                sampled = self._sampler.sample(logits, [result.chunk.sequence for result in sampling])
                for result, outcome in zip(sampling, sampled, strict=True):
                    result.sampled = outcome
        return results

    def _forward(self, batch: StepBatch) -> Tensor:
        self._attention.prepare(batch)
        return self._model.forward(StepContext(batch, self.kv, self._attention))

    def _sampling_logits(self, hidden: Tensor, batch: StepBatch) -> Tensor:
        wanted = hidden if batch.logits_indices.shape[0] == batch.num_tokens else hidden[batch.logits_indices]
        return self._model.compute_logits(wanted)

    def _add_prompt_logprobs(self, hidden: Tensor, slices: list[tuple[ChunkResult, int, int]]) -> None:
        for result, begin, size in slices:
            sequence = result.chunk.sequence
            known = result.prompt_logprobs
            assert known is not None
            first = result.chunk.start + len(known) + 1
            counts = [max(sequence.sampling.logprobs, 0)] * size
            logits = self._model.compute_logits(hidden[begin : begin + size])
            known += token_logprobs(logits, sequence.tokens[first : first + size], counts)

    # ------------------------------------------------------------------ as another rank than 0

    def unpack(self, packed: PackedBatch) -> StepBatch:
        """The batch that rank 0 has built; valid until the next call."""
        return self._builder.unpack(packed)

    def follow(self, batch: StepBatch, logits_slices: list[tuple[int, int]]) -> None:
        """Compute this rank's part of a step: the same collectives in the same order as rank 0, and no sampling."""
        with torch.inference_mode():
            hidden = self._forward(batch)
            if batch.logits_indices.shape[0]:
                self._sampling_logits(hidden, batch)
            for first, size in logits_slices:
                self._model.compute_logits(hidden[first : first + size])

    def max_tokens_now(self, num_tokens: int, num_rows: int) -> int:
        """The largest step of at most `num_tokens` tokens, with logits of `num_rows`, that free memory here holds."""
        return num_tokens if self._memory is None else self._memory.max_tokens(num_tokens, max(num_rows, 1))

    # ------------------------------------------------------------------ around steps

    def warm_up(self, num_tokens: int, num_rows: int = 1) -> None:
        """Run a prefill of `num_tokens` and a decode on page 0, and sample `num_rows` rows.

        So no request pays for what is made on first use, and the allocator has seen steps of this size.
        """
        sampling = SamplingParams(top_p=0.5)
        request = Generate(request_id=0, prompt_ids=[0] * (num_tokens + 1), sampling=sampling, max_tokens=1)
        sequence = Sequence(request, 0)
        sequence.pages.extend([0] * (num_tokens // self.kv.page_size + 1))
        # All ranks warm up with the same plans at the same time: none needs to be told.
        leader, self._leader = self._leader, None
        prefill = StepPlan(0, [Chunk(sequence, 0, num_tokens, True)], 0, num_tokens)
        self.execute(prefill)
        decode = StepPlan(0, [Chunk(sequence, num_tokens, 1, True)], 1, 1)
        self.execute(decode)
        # Once more, when nothing is made for the first time: for the clock.
        began = time.perf_counter()
        self.execute(decode)
        decoded = time.perf_counter()
        self.execute(prefill)
        prefill_seconds = time.perf_counter() - decoded
        self.step_seconds = decoded - began
        # A short prefill is mostly what every step costs; what it is not, its tokens cost.
        share = max(prefill_seconds - self.step_seconds, 0.1 * prefill_seconds)
        self.prefill_seconds_per_token = share / num_tokens
        with torch.inference_mode():
            self._sampler.sample(torch.zeros(num_rows, self._vocab_size, device=self._device), [sequence] * num_rows)
        self.zero_pages([0])
        self._leader = leader
        if leader is not None:
            leader.completed(num_tokens, 1)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def zero_pages(self, pages: list[int]) -> None:
        """Make pages that held untrusted values harmless."""
        if self._leader is not None:
            self._leader.zero_pages(pages)
        with torch.inference_mode():
            self.kv.zero(pages)

    def free_memory(self) -> None:
        """After an out-of-memory error: give back what the failed step and the allocator still hold."""
        if self._leader is not None:
            self._leader.free_memory()
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Let the other ranks go."""
        if self._leader is not None:
            self._leader.close()


def _prompt_slices(results: list[ChunkResult]) -> list[tuple[ChunkResult, int, int]]:
    """(result, first row of the step, number of rows) of the logits that prompt log-probabilities need."""
    slices: list[tuple[ChunkResult, int, int]] = []
    begin = 0
    for result in results:
        chunk = result.chunk
        if chunk.sequence.wants_prompt_logprobs:
            # Row i of the chunk predicts token start+i+1, of which only prompt tokens count.
            num_rows = min(chunk.num_tokens, chunk.sequence.num_prompt - 1 - chunk.start)
            result.prompt_logprobs = []
            slices += [
                (result, begin + row, min(_LOGITS_SLICE, num_rows - row)) for row in range(0, num_rows, _LOGITS_SLICE)
            ]
        begin += chunk.num_tokens
    return slices
