"""Stands in for a device that records graphs: keeps the work and does it again, and knows what it was asked for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from neuron.engine.kv_cache.kv_cache import KVLayout, PagedKV
from neuron.engine.sampling.sampler import Sampler
from neuron.engine.sampling.sampling_rows import SamplingRows
from neuron.engine.scheduler.step_limits import StepLimits
from neuron.engine.step.engine import Engine
from neuron.engine.step.runner import Launching, ModelRunner
from neuron.protocol import SamplingParams
from torch import Tensor

from tests.neuron.engine.lazy_stream import LazyStream
from tests.neuron.engine.toy import CPU, HEAD_DIM, NUM_HEADS, NUM_LAYERS, PAGE, VOCAB, ToyAttention, ToyModel


class RecordedGraph:
    def __init__(self, device: FakeGraphDevice, number: int, work: Callable[[], None]) -> None:
        self._device = device
        self.number = number
        self._work: Callable[[], None] | None = work

    def replay(self) -> None:
        assert self._work is not None, "replayed after it was given up"
        self._work()

    def reset(self) -> None:
        assert self._work is not None, "given up twice"
        self._work = None
        self._device.events.append(f"reset {self.number}")


class FakeGraphDevice:
    """events: what happened, in order. refuses: numbers of recordings (from 1) that find no memory. fault: what every
    recording raises."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.refuses: set[int] = set()
        self.fault: Exception | None = None
        self.num_pools = 0
        self._has_pool = False
        self._number = 0

    def record(self, work: Callable[[], None]) -> RecordedGraph:
        self._number += 1
        if self.fault is not None:
            raise self.fault
        if self._number in self.refuses:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if not self._has_pool:
            self._has_pool = True
            self.num_pools += 1
        self.events.append(f"record {self._number}")
        return RecordedGraph(self, self._number, work)

    def release_pool(self) -> None:
        self._has_pool = False
        self.events.append("release pool")


class Chosen:
    def __init__(self, tokens: Tensor, finite: Tensor) -> None:
        self.tokens = tokens
        self.finite = finite


def choose(
    logits: Tensor, temperatures: Tensor, top_ks: Tensor, top_ps: Tensor, min_ps: Tensor, keys: Tensor
) -> Chosen:
    """What the sampling kernel does, in torch: everything from tensors, nothing from the host."""
    sampler = Sampler(VOCAB, CPU)
    tokens = logits.argmax(dim=-1)
    finite = torch.isfinite(logits).all(dim=-1)
    for row, temperature in enumerate(temperatures.tolist()):
        if temperature > 0.0:
            params = SamplingParams(temperature, float(top_ps[row]), int(top_ks[row]), float(min_ps[row]))
            rows = SamplingRows(1, is_plain=False, params=[params], positions=[0])
            # The key of (seed, position) was made by the host.
            one = logits[row : row + 1]
            sharpness = torch.tensor([[1.0 / temperature]])
            if params.top_k or params.top_p < 1.0 or params.min_p > 0.0:
                tokens[row] = sampler._draw_truncated(one.clone(), sharpness, keys[row : row + 1], rows.params)[0]
            else:
                tokens[row] = sampler._draw_whole(one, sharpness, keys[row : row + 1])[0]
    return Chosen(tokens, finite)


def graph_engine(
    model: ToyModel | None = None,
    *,
    num_pages: int = 65,
    max_step_tokens: int = 32,
    max_running: int = 8,
    max_model_len: int = 200,
    overlaps: bool = True,
    lags: bool = True,
) -> tuple[Engine, FakeGraphDevice]:
    """An engine around the toy model that runs decodes as graphs, on a device that lags."""
    device = FakeGraphDevice()
    runner = ModelRunner(
        model or ToyModel(),
        PagedKV(KVLayout.uniform(NUM_LAYERS, NUM_HEADS, HEAD_DIM, PAGE, torch.float32), num_pages, CPU),
        ToyAttention(),
        vocab_size=VOCAB,
        limits=StepLimits(max_step_tokens, max_running, max_model_len),
        launching=Launching(LazyStream() if lags else None, overlaps, device),
    )
    runner._sampling_kernel = choose
    return Engine(runner), device
