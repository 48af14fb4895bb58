"""A two-layer attention model over the paged cache, small enough to reason about, and an engine around it."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from neuron.engine.attention.interface import StepBatch, StepContext
from neuron.engine.device_stream import Stream
from neuron.engine.kv_cache.kv_cache import KVLayout, PagedKV
from neuron.engine.scheduler.step_limits import StepLimits
from neuron.engine.step.engine import Engine
from neuron.engine.step.runner import Launching, ModelRunner
from neuron.protocol import Generate, Logprobs, SamplingParams, SequenceFailed
from torch import Tensor

VOCAB = 101
PAGE = 4
NUM_LAYERS, NUM_HEADS, HEAD_DIM = 2, 2, 8
HIDDEN = NUM_HEADS * HEAD_DIM
CPU = torch.device("cpu")


class ToyAttention:
    """One sequence after the other, in the plainest way."""

    def prepare(self, batch: StepBatch) -> None:
        assert sum(batch.query_lens_host) == batch.num_tokens
        assert all(length == 1 for length in batch.query_lens_host[: batch.num_decodes])

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, kv_layer: Tensor, batch: StepBatch, *, scale: float, sliding_window=None
    ) -> Tensor:
        page, offset = batch.slot_mapping // PAGE, batch.slot_mapping % PAGE
        kv_layer[page, 0, offset] = k
        kv_layer[page, 1, offset] = v
        out = torch.empty_like(q)
        for index, context in enumerate(batch.context_lens.tolist()):
            begin, end = batch.query_start[index], batch.query_start[index + 1]
            pages = batch.page_tables[index, : math.ceil(context / PAGE)].long()
            keys = kv_layer[pages, 0].flatten(0, 1)[:context]
            values = kv_layer[pages, 1].flatten(0, 1)[:context]
            positions = batch.positions[begin:end]
            mask = torch.arange(context)[None, :] <= positions[:, None]
            scores = torch.einsum("qhd,khd->hqk", q[begin:end], keys) * scale
            weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
            out[begin:end] = torch.einsum("hqk,khd->qhd", weights, values)
        return out


class ToyModel:
    """Random weights in float64-initialised float32; `on_forward` lets a test raise or corrupt."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def weight(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator) / math.sqrt(shape[-1])

        self.embedding = torch.randn(VOCAB, HIDDEN, generator=generator)
        self.qkv = [weight(3 * HIDDEN, HIDDEN) for _ in range(NUM_LAYERS)]
        self.out = [weight(HIDDEN, HIDDEN) for _ in range(NUM_LAYERS)]
        self.head = weight(VOCAB, HIDDEN) * 4
        self.frequencies = 1.0 / 100.0 ** (torch.arange(HIDDEN) / HIDDEN)
        self.on_forward = lambda batch: None
        self.on_logits = lambda logits: logits

    def forward(self, ctx: StepContext) -> Tensor:
        batch = ctx.batch
        self.on_forward(batch)
        hidden = self.embedding[batch.token_ids]
        hidden = hidden + torch.sin(batch.positions[:, None] * self.frequencies)
        for index in range(NUM_LAYERS):
            q, k, v = (
                F.linear(F.rms_norm(hidden, (HIDDEN,)), self.qkv[index]).view(-1, 3, NUM_HEADS, HEAD_DIM).unbind(1)
            )
            mixed = ctx.attention.forward(
                q, k, v, ctx.kv.layer(index), batch, scale=HEAD_DIM**-0.5, sliding_window=None
            )
            hidden = hidden + torch.tanh(F.linear(mixed.flatten(1), self.out[index]))
        return hidden

    def compute_logits(self, hidden: Tensor) -> Tensor:
        return self.on_logits(F.linear(F.rms_norm(hidden, (HIDDEN,)), self.head))


def toy_engine(
    model: ToyModel | None = None,
    *,
    num_pages: int = 65,
    max_step_tokens: int = 32,
    max_running: int = 8,
    max_model_len: int = 200,
    tokenizer_json: str | None = None,
    prefix_cache: bool = True,
    epoch: int = 0,
    overlaps: bool = False,
    stream: Stream | None = None,
) -> Engine:
    layout = KVLayout.uniform(NUM_LAYERS, NUM_HEADS, HEAD_DIM, PAGE, torch.float32)
    runner = ModelRunner(
        model or ToyModel(),
        PagedKV(layout, num_pages, CPU),
        ToyAttention(),
        vocab_size=VOCAB,
        limits=StepLimits(max_step_tokens, max_running, max_model_len),
        launching=Launching(stream, overlaps),
    )
    return Engine(
        runner,
        tokenizer_json=tokenizer_json,
        prefix_cache=prefix_cache,
        epoch=epoch,
    )


GREEDY = SamplingParams(temperature=0.0)


def request(request_id: int, prompt: Iterable[int], max_tokens: int = 8, **fields) -> Generate:
    fields.setdefault("sampling", GREEDY)
    return Generate(request_id=request_id, prompt_ids=list(prompt), max_tokens=max_tokens, **fields)


class Answers:
    """Collects what an engine reports, and asserts that it reports in order."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.logprobs: dict[int, list[Logprobs]] = {}
        self.finish: dict[int, str] = {}
        self.cached: dict[int, int] = {}
        self.prompt_logprobs: dict[int, list[Logprobs]] = {}
        self.failures: dict[int, SequenceFailed] = {}

    def take(self, output) -> None:
        for update in output.updates:
            assert update.request_id not in self.finish and update.request_id not in self.failures
            self.tokens.setdefault(update.request_id, []).extend(update.token_ids)
            if update.logprobs is not None:
                self.logprobs.setdefault(update.request_id, []).extend(update.logprobs)
            if update.cached_tokens is not None:
                assert update.request_id not in self.cached
                self.cached[update.request_id] = update.cached_tokens
            if update.prompt_logprobs is not None:
                self.prompt_logprobs[update.request_id] = update.prompt_logprobs
            if update.finish is not None:
                self.finish[update.request_id] = update.finish
        for failure in output.failures:
            assert failure.request_id not in self.finish and failure.request_id not in self.failures
            self.failures[failure.request_id] = failure


def run(engine: Engine, *requests: Generate, check: bool = True) -> Answers:
    """Serve the requests to their end."""
    answers = Answers()
    for item in requests:
        engine.add(item)
    while engine.has_work:
        output = engine.step()
        assert output is not None
        answers.take(output)
        if check:
            assert engine.check() == []
    return answers


def answer_alone(prompt: Iterable[int], max_tokens: int = 8, **fields) -> list[int]:
    """The answer of a fresh engine that serves nothing else."""
    return run(toy_engine(), request(0, prompt, max_tokens, **fields)).tokens[0]
