"""Executes step plans on the device: batch, forward pass, logits, sampling. One code path for CPU and CUDA."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from neuron.engine.attention.interface import StepBatch, StepContext
from neuron.engine.device_stream import Fence, Stream, stream_of, to_device
from neuron.engine.errors import DeviceError, describe, is_device_fault
from neuron.engine.kernels.kernel_dispatch import fused_kernel
from neuron.engine.parallel.group import ParallelGroup
from neuron.engine.parallel.messages import GraphKey, PackedBatch
from neuron.engine.sampling.sampler import (
    DeviceLogprobs,
    PendingKernelSamples,
    PendingSamples,
    Sampled,
    Sampler,
    report_of,
)
from neuron.engine.sampling.sampling_rows import SamplingRows, depends_on_last_token, wants_only_a_token
from neuron.engine.scheduler.scheduler import Chunk, StepPlan
from neuron.engine.scheduler.sequence import Sequence
from neuron.engine.scheduler.step_limits import StepLimits
from neuron.engine.step.batch import BatchBuilder
from neuron.engine.step.causal_model import CausalModel
from neuron.engine.step.compile_watch import CompileWatch
from neuron.engine.step.cuda_graphs import GraphDevice, StepGraphs
from neuron.engine.step.graph_inputs import GraphInputs
from neuron.engine.step.prompt_slices import PromptSlice, prompt_slices
from neuron.protocol import Generate, Logprobs, SamplingParams

if TYPE_CHECKING:
    from neuron.engine.attention.interface import AttentionBackend
    from neuron.engine.kv_cache.kv_cache import PagedKV
    from neuron.engine.step.leader import StepLeader
    from neuron.engine.step.step_memory import StepMemory


@dataclass(slots=True)
class ChunkResult:
    """What became of one chunk. sampled: `chunk.num_sampled` tokens, or one that carries the error of the chunk."""

    chunk: Chunk
    sampled: list[Sampled] = field(default_factory=list)
    prompt_logprobs: list[Logprobs] | None = None


@dataclass(slots=True)
class InFlightStep:
    """A step that the device has.

    sequences, positions: of the rows that are sampled, and where in its sequence's output each token comes, None if at
    the end of what the host has. is_sampled: sampling is submitted too; else that waits for tokens of the step before.
    graph: the CUDA graph that runs it; rows: how it is to sample. fence: when all is done. started: clock of launch.
    """

    plan: StepPlan
    sequences: list[Sequence]
    positions: list[int] | None
    fence: Fence = field(init=False)
    is_sampled: bool = False
    logits: Tensor | None = None
    samples: PendingSamples | None = None
    graph: GraphKey | None = None
    rows: SamplingRows | None = None
    prompt_logprobs: list[tuple[int, DeviceLogprobs]] = field(default_factory=list)
    started: float = 0.0

    @property
    def num_shared(self) -> int:
        """Rows whose tokens the other ranks get: all that they have made logits for."""
        return len(self.sequences) if self.graph is None else self.graph.num_rows


@dataclass(frozen=True, slots=True)
class Launching:
    """How steps get to the device. stream: None is the device's ordinary one. overlaps: steps may be launched on top of
    each other, so each leaves its tokens on the device for the next. graphs: records decode steps, None where they are
    launched one kernel at a time."""

    stream: Stream | None = None
    overlaps: bool = False
    graphs: GraphDevice | None = None


@dataclass(frozen=True, slots=True)
class StepRanks:
    """A runner's place among several ranks, which have one each. Rank 0's has a `leader`, which tells the others of
    each step before it computes its own part; theirs are driven by `follow`. group: carries tokens to the other ranks.
    memory: what a step takes; None where nobody asks."""

    group: ParallelGroup | None = None
    leader: StepLeader | None = None
    memory: StepMemory | None = None


class ModelRunner:
    """Runs one model over one cache on one device. Used by a single thread.

    deterministic: what is sampled of a row depends on it alone; model and attention have modes of their own for that.
    """

    def __init__(
        self,
        model: CausalModel,
        kv: PagedKV,
        attention: AttentionBackend,
        *,
        vocab_size: int,
        limits: StepLimits,
        deterministic: bool = False,
        launching: Launching | None = None,
        ranks: StepRanks | None = None,
    ) -> None:
        launching, ranks = launching or Launching(), ranks or StepRanks()
        device, group, graphs = kv.device, ranks.group, launching.graphs
        self._model = model
        self._leader = ranks.leader
        self._memory = ranks.memory
        self.kv = kv
        self._attention = attention
        self._device = device
        self.vocab_size = vocab_size
        self.limits = limits
        self._stream = launching.stream or stream_of(device)
        self.overlaps = launching.overlaps
        self._group = group if group is not None and group.world_size > 1 else None
        self._samples = group is None or group.rank == 0
        self._sampling_kernel = fused_kernel("sampling.sampling", "sample", device)
        self._builder = BatchBuilder(
            max_tokens=limits.max_step_tokens,
            max_sequences=limits.max_running,
            max_pages=-(-limits.max_model_len // kv.page_size),
            page_size=kv.page_size,
            device=device,
            stream=self._stream,
        )
        self._sampler = Sampler(vocab_size, device, row_by_row=deterministic)
        # The tokens of the last step, by row: where the next one's inputs come from.
        self._carried = torch.zeros(limits.max_step_tokens, dtype=torch.int64, device=device)
        self.compiles = CompileWatch()
        self._graph_logits: Tensor | None = None
        self._graph_inputs = GraphInputs(limits.max_running, device=device, stream=self._stream)
        self.graphs: StepGraphs | None = None
        if graphs is not None:
            self.graphs = StepGraphs(
                graphs,
                max_rows=limits.max_running,
                max_context_len=limits.max_model_len,
                run=self._run_graph_step,
                warm_up=self._warm_up_graph_step,
            )
        # What warming up has shown of a step without prefill, and of a token of it; then the engine learns by itself.
        self.step_seconds = 0.0
        self.prefill_seconds_per_token = 0.0

    def execute(self, plan: StepPlan) -> list[ChunkResult]:
        """Run a plan; one result per chunk, in order. May be repeated: it writes the same cache slots again.

        Raises whatever the device raises; the engine decides what is lost. With several ranks, a failure while the
        others may be in a collective of the step is a `DeviceError`, as is the loss of a rank; a step that does not
        fit into the memory of them all is refused before that, as `StepTooLarge`.
        """
        return self.collect(self.launch(plan))

    def launch(self, plan: StepPlan) -> InFlightStep:
        """Hand a step to the device. Its results are for `collect`; a step that was not collected may be below it.

        It is sampled too, unless that depends on tokens which the host does not have yet: then `sample` is called when
        they are booked. Raises as `execute` does, and then nothing is in flight.
        """
        leader = self._leader
        counts = [chunk.num_sampled for chunk in plan.chunks]
        if counts.count(1) == len(counts):
            sequences = [chunk.sequence for chunk in plan.chunks]
        else:
            sequences = [chunk.sequence for chunk in plan.chunks for _ in range(chunk.num_sampled)]
        positions: list[int] | None = None
        waits = False
        if plan.is_chained or max(counts, default=0) > 1:
            positions = [
                chunk.sequence.num_output + chunk.sequence.num_pending + index
                for chunk in plan.chunks
                for index in range(chunk.num_sampled)
            ]
            waits = any(sequence.num_pending and depends_on_last_token(sequence) for sequence in sequences)
        key = None if self.graphs is None else self._find_graph(plan, sequences, self.graphs)
        batch = self._builder.build(plan, graph_rows=0 if key is None else key.num_rows)
        slices = prompt_slices(plan.chunks)
        if leader is not None:
            rows = [(part.first_row, part.num_rows) for part in slices]
            leader.launch(plan.step, self._builder.pack(batch), rows, self.max_tokens_now, graph=key)
        in_flight = InFlightStep(plan, sequences, positions, graph=key)

        def compute() -> None:
            with torch.inference_mode():
                if key is not None:
                    self._replay(in_flight, key)
                    return
                hidden = self._forward(batch, is_chained=plan.is_chained)
                if sequences:
                    in_flight.logits = self._sampling_logits(hidden, batch)
                for part in slices:
                    in_flight.prompt_logprobs.append((part.chunk, self._prompt_logprobs(hidden, plan, part)))

        try:
            if key is not None and key.ends_with == "tokens":
                rows_of = SamplingRows.of(sequences, self.vocab_size, positions)
                self._graph_inputs.stage(rows_of, key.num_rows)
                in_flight.rows = rows_of
            self._stream.submit(compute)
        except Exception as exc:
            if leader is None:
                raise
            raise DeviceError("rank_fault", f"step {plan.step} failed on rank 0: {describe(exc)}") from exc
        if leader is not None and key is None:  # a replay shows nothing of what a step that is not recorded takes
            leader.completed(batch.num_tokens, len(sequences))
        if not sequences or (key is not None and key.ends_with == "tokens"):
            in_flight.is_sampled = True
            in_flight.fence = self._stream.record()
        elif waits:
            in_flight.fence = self._stream.record()
        else:
            self.sample(in_flight)
        return in_flight

    def sample(self, in_flight: InFlightStep) -> None:
        """Sample a launched step, from what the host knows now.

        What fails here concerns this rank alone, and may be tried again: the others get tokens in any case.
        """
        in_flight.is_sampled = True
        try:
            rows = SamplingRows.of(in_flight.sequences, self.vocab_size, in_flight.positions)

            def draw() -> None:
                logits, in_flight.logits = in_flight.logits, None
                assert logits is not None
                with torch.inference_mode():
                    in_flight.samples = self._sampler.draw(logits, rows, are_kept=in_flight.graph is None)
                    if self.overlaps:
                        self._carried[: rows.num_rows].copy_(in_flight.samples.tokens)

            self._stream.submit(draw)
        finally:
            self._share_tokens(in_flight.num_shared)
        in_flight.fence = self._stream.record()

    def collect(self, in_flight: InFlightStep) -> list[ChunkResult]:
        """Wait for a launched step; one result per chunk. Raises what the device reports of it, and as `execute`."""
        in_flight.fence.wait()
        sampled = [] if in_flight.samples is None else in_flight.samples.read()
        results: list[ChunkResult] = []
        row = 0
        for chunk in in_flight.plan.chunks:
            end = row + chunk.num_sampled
            results.append(ChunkResult(chunk, sampled[row:end]))
            row = end
        for index, logprobs in in_flight.prompt_logprobs:
            known = results[index].prompt_logprobs or []
            results[index].prompt_logprobs = known + logprobs.read()
        return results

    def abandon(self, in_flight: InFlightStep) -> None:
        """Wait until the device is done with a launched step whose results nobody wants, whatever they are."""
        if not in_flight.is_sampled:
            in_flight.is_sampled = True
            self._share_tokens(in_flight.num_shared)
            in_flight.fence = self._stream.record()
        try:
            in_flight.fence.wait()
        except Exception as exc:
            if is_device_fault(exc):
                raise

    def _forward(self, batch: StepBatch, *, is_chained: bool) -> Tensor:
        if is_chained:
            ids = batch.token_ids
            torch.where(ids < 0, self._carried[(-1 - ids).clamp_(min=0)], ids, out=ids)
        self._attention.prepare(batch)
        return self._model.forward(StepContext(batch, self.kv, self._attention))

    def _sampling_logits(self, hidden: Tensor, batch: StepBatch) -> Tensor:
        wanted = hidden if batch.logits_indices.shape[0] == batch.num_tokens else hidden[batch.logits_indices]
        return self._model.compute_logits(wanted)

    # ------------------------------------------------------------------ decode steps as CUDA graphs

    def _find_graph(self, plan: StepPlan, sequences: list[Sequence], graphs: StepGraphs) -> GraphKey | None:
        if plan.num_decodes < len(plan.chunks) or len(sequences) != plan.num_decodes:
            return None
        longest = max(chunk.start for chunk in plan.chunks) + 1
        is_whole = all(wants_only_a_token(sequence) for sequence in sequences)
        return graphs.find(plan.num_decodes, longest, "tokens" if is_whole else "logits")

    def _replay(self, in_flight: InFlightStep, key: GraphKey) -> None:
        assert self.graphs is not None
        self.graphs.replay(key)
        number = len(in_flight.sequences)
        if key.ends_with == "tokens":
            assert in_flight.rows is not None
            report = self._graph_inputs.report[:number]
            in_flight.samples = PendingKernelSamples(
                self._carried[:number], report, in_flight.rows, logits=None, raw=None
            )
        else:
            assert self._graph_logits is not None
            in_flight.logits = self._graph_logits[:number]

    def _warm_up_graph_step(self, key: GraphKey) -> None:
        """One run of a step that sees nothing and writes to page 0."""
        self._builder.graph_batch(key.num_rows, key.max_context_len)  # makes the tables that `build` then fills
        self._builder.build(StepPlan(0, [], 0, 0), graph_rows=key.num_rows)
        self._graph_inputs.stage(SamplingRows(key.num_rows, is_plain=True), key.num_rows)
        try:
            self._stream.submit(lambda: self._run_graph_step(key))
            self._stream.record().wait()
        except Exception as exc:
            if self._group is None:
                raise
            # The other ranks may be in a collective of this run, where nothing but the end of this one frees them.
            raise DeviceError("rank_fault", f"warming up {key} failed on this rank: {describe(exc)}") from exc

    def _run_graph_step(self, key: GraphKey) -> None:
        """What a graph of this key records: nothing in it may depend on anything but the key."""
        rows = slice(0, key.num_rows)
        with torch.inference_mode():
            batch = self._builder.graph_batch(key.num_rows, key.max_context_len)
            logits = self._sampling_logits(self._forward(batch, is_chained=True), batch)
            if key.ends_with == "tokens":
                if self._samples and self._sampling_kernel is not None:
                    chosen = self._sampling_kernel(logits, *self._graph_inputs.parameters(key.num_rows))
                    self._carried[rows].copy_(chosen.tokens)
                    self._graph_inputs.report[rows].copy_(report_of(chosen))
                if self.overlaps and self._group is not None:
                    self._group.broadcast(self._carried[rows])
            elif self._samples:
                self._keep_logits(logits)
            self._attention.prepare(batch)  # forget what was planned in the graph's memory

    def _keep_logits(self, logits: Tensor) -> None:
        if self._graph_logits is None:
            with torch.inference_mode(False):
                shape = (self._graph_inputs.report.shape[0], self.vocab_size)
                self._graph_logits = torch.empty(shape, dtype=torch.float32, device=self._device)
        self._graph_logits[: logits.shape[0]].copy_(logits)

    def record_graph(self, key: GraphKey) -> bool:
        """This rank's part of `capture_graph`. What is compiled for it is no defect: steps go on without it so far."""
        if self.graphs is None:
            return False
        with self.compiles.expected():
            return self.graphs.record(key)

    def capture_graph(self, key: GraphKey) -> bool:
        """Record one graph, on every rank; no step may be under way. False if it is not to be used."""
        assert self.graphs is not None
        if self._leader is not None:
            self._leader.capture(key)
        is_recorded = self.record_graph(key)
        if self._leader is not None and not self._leader.all_captured(is_recorded):
            self.graphs.forget(key)
            return False
        return is_recorded

    def _prompt_logprobs(self, hidden: Tensor, plan: StepPlan, part: PromptSlice) -> DeviceLogprobs:
        sequence = plan.chunks[part.chunk].sequence
        tokens = sequence.tokens[part.first_token : part.first_token + part.num_rows]
        logits = self._model.compute_logits(hidden[part.first_row : part.first_row + part.num_rows])
        index = to_device(torch.tensor(tokens, dtype=torch.int64), self._device)
        return DeviceLogprobs(logits, index, [max(sequence.sampling.logprobs, 0)] * part.num_rows)

    def _share_tokens(self, num_rows: int) -> None:
        """Give the tokens of a step to the other ranks, which take their next inputs from them."""
        if self._group is None or not self.overlaps or not num_rows:
            return
        group, carried = self._group, self._carried[:num_rows]

        def broadcast() -> None:
            with torch.inference_mode():
                group.broadcast(carried)

        try:
            self._stream.submit(broadcast)
        except Exception as exc:
            raise DeviceError("rank_fault", f"tokens do not reach the other ranks: {describe(exc)}") from exc

    # ------------------------------------------------------------------ as another rank than 0

    def unpack(self, packed: PackedBatch, graph: GraphKey | None = None) -> StepBatch:
        """The batch that rank 0 has built; valid until the next call."""
        return self._builder.unpack(packed, is_graph=graph is not None)

    def follow(self, batch: StepBatch, logits_slices: list[tuple[int, int]], graph: GraphKey | None = None) -> None:
        """Compute this rank's part of a step: the same collectives in the same order as rank 0, and no sampling."""
        if graph is not None:
            if self.graphs is None or graph not in self.graphs.captured:
                raise DeviceError("rank_fault", f"rank 0 replays {graph}, which this rank has not recorded")
            self.graphs.replay(graph)
            if graph.ends_with == "logits":
                self._share_tokens(batch.logits_indices.shape[0])
            return
        with torch.inference_mode():
            hidden = self._forward(batch, is_chained=self.overlaps)
            if batch.logits_indices.shape[0]:
                self._sampling_logits(hidden, batch)
            for first, size in logits_slices:
                self._model.compute_logits(hidden[first : first + size])
        self._share_tokens(batch.logits_indices.shape[0])

    def max_tokens_now(self, num_tokens: int, num_rows: int) -> int:
        """The largest step of at most `num_tokens` tokens, with logits of `num_rows`, that free memory here holds."""
        return num_tokens if self._memory is None else self._memory.max_tokens(num_tokens, max(num_rows, 1))

    # ------------------------------------------------------------------ around steps

    @contextmanager
    def untold(self) -> Iterator[None]:
        """Steps within are done by all ranks of a group at the same time: none needs to be told of them."""
        leader, self._leader = self._leader, None
        try:
            yield
        finally:
            self._leader = leader

    def warm_up(self, num_tokens: int, num_rows: int = 1) -> None:
        """Run a prefill of `num_tokens` and a decode on page 0, and sample `num_rows` rows.

        So no request pays for what is made on first use, and the allocator has seen steps of this size.
        """
        sampling = SamplingParams(top_p=0.5)
        request = Generate(request_id=0, prompt_ids=[0] * (num_tokens + 1), sampling=sampling, max_tokens=1)
        sequence = Sequence(request, 0)
        sequence.pages.extend([0] * (num_tokens // self.kv.page_size + 1))
        prefill = StepPlan(0, [Chunk(sequence, 0, num_tokens, 1)], 0, num_tokens)
        decode = StepPlan(0, [Chunk(sequence, num_tokens, 1, 1)], 1, 1)
        with self.untold():
            self.execute(prefill)
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
                logits = torch.zeros(num_rows, self.vocab_size, device=self._device)
                self._sampler.sample(logits, [sequence] * num_rows)
            self.zero_pages([0])
        if self._leader is not None:
            self._leader.completed(num_tokens, 1)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def sample_zeros(self, rows: SamplingRows) -> None:
        """Sample from logits that are all zero, for what is made on first use."""
        with torch.inference_mode():
            draw = self._sampler.draw(torch.zeros(rows.num_rows, self.vocab_size, device=self._device), rows)
        self._stream.record().wait()
        draw.read()

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
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # what runs may use what is given back
        if self.graphs is not None:
            self.graphs.drop()
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Give up the graphs, which use the group's communicator, and let the other ranks go."""
        if self.graphs is not None:
            self.graphs.close()
        if self._leader is not None:
            self._leader.close()
