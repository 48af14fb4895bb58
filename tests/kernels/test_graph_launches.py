"""What a CUDA graph would record: the launches of the kernels in a decode step, with everything Python gave them."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from neuron.engine.attention import attention
from neuron.engine.attention.attention_triton import TritonAttention
from neuron.engine.gemm import activation
from neuron.engine.kernels.sampling import sampling
from neuron.engine.kv_cache.kv_cache import KVLayout, PagedKV
from neuron.engine.layers import norm
from neuron.engine.models.registry import build_model
from neuron.engine.scheduler.scheduler import Chunk, StepPlan
from neuron.engine.scheduler.sequence import Sequence
from neuron.engine.scheduler.step_limits import StepLimits
from neuron.engine.step.engine import Engine
from neuron.engine.step.runner import Launching, ModelRunner
from neuron.engine.weights.dummy import load_dummy_weights
from neuron.protocol import Generate, SamplingParams
from torch import Tensor

from tests.kernels.harness import COMMON, FAMILIES, fused_in_interpreter
from tests.neuron.engine.graph_device import FakeGraphDevice

PAGE, NUM_PAGES, VOCAB = 16, 40, COMMON["vocab_size"]
LIMITS = {"max_step_tokens": 32, "max_running": 4, "max_model_len": 256}

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="looks at launches through the interpreter")


class Launches:
    """Every launch since the last `take`, with what is the same whenever a graph is replayed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from triton.runtime.interpreter import InterpretedFunction

        self._seen: list[Any] = []
        self.fixed: dict[int, str] = {}  # addresses that must not move
        run = InterpretedFunction.run

        def watched(function: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            described = [self._describe(item) for item in (*arguments, *options.values())]
            self._seen.append((function.fn.__name__, grid, described))
            return run(function, *arguments, grid=grid, warmup=warmup, **options)

        monkeypatch.setattr(InterpretedFunction, "run", watched)

    def _describe(self, item: Any) -> Any:
        if isinstance(item, Tensor):
            return tuple(item.shape), item.stride(), item.dtype, self.fixed.get(item.data_ptr(), "inside")
        return item

    def take(self) -> list[Any]:
        seen, self._seen = self._seen, []
        return seen


def make_runner(family: str) -> tuple[ModelRunner, PagedKV]:
    cpu = torch.device("cpu")
    model = build_model(COMMON | FAMILIES[family], device=cpu, dtype=torch.float32)
    load_dummy_weights(model, seed=1)
    model.reserve_positions(LIMITS["max_model_len"])
    shape = model.config
    layout = KVLayout.uniform(shape.num_layers, model.local.num_kv_heads, shape.head_dim, PAGE, torch.float32)
    kv = PagedKV(layout, NUM_PAGES, cpu)
    runner = ModelRunner(
        model,
        kv,
        TritonAttention(),
        vocab_size=VOCAB,
        limits=StepLimits(**LIMITS),
        launching=Launching(overlaps=True, graphs=FakeGraphDevice()),
    )
    runner._sampling_kernel = sampling.sample
    return runner, kv


def decodes(rng: random.Random, lengths: list[int], samplings: list[SamplingParams]) -> StepPlan:
    chunks = []
    for row, (length, params) in enumerate(zip(lengths, samplings, strict=True)):
        sequence = Sequence(Generate(row, [rng.randrange(VOCAB) for _ in range(length)], params, 99), row)
        sequence.pages.extend(rng.sample(range(1, NUM_PAGES), -(-length // PAGE)))
        chunks.append(Chunk(sequence, length - 1, 1, 1))
    return StepPlan(1, chunks, len(chunks), len(chunks))


@pytest.fixture
def kernels_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (norm, activation, attention):
        monkeypatch.setattr(module, "fused_kernel", fused_in_interpreter)


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_of_one_key_launch_the_same_kernels_with_the_same_arguments(
    monkeypatch: pytest.MonkeyPatch, kernels_everywhere: None, family: str
) -> None:
    runner, kv = make_runner(family)
    launches = Launches(monkeypatch)
    graphs, builder = runner.graphs, runner._builder
    assert graphs is not None
    key = next(key for key in graphs._queue if key.num_rows == 4 and key.ends_with == "tokens")
    assert graphs.record(key)
    inputs = builder.graph_batch(key.num_rows, key.max_context_len)
    named = {name: getattr(inputs, name) for name in inputs.__slots__}
    named |= {f"layer {index}": kv.layer(index) for index in range(2)}
    named |= {f"parameter {index}": item for index, item in enumerate(runner._graph_inputs.parameters(4))}
    launches.fixed = {value.data_ptr(): name for name, value in named.items() if isinstance(value, Tensor)}

    greedy, drawn = SamplingParams(temperature=0.0), SamplingParams(temperature=0.9, top_p=0.8, top_k=9, seed=3)
    rng = random.Random(1)
    steps = [([1, 250, 17], [greedy] * 3), ([33, 16, 15, 90], [drawn, greedy, drawn, drawn]), ([2, 2], [drawn, greedy])]
    launches.take()
    seen = []
    for lengths, samplings in steps:
        plan = decodes(rng, lengths, samplings)
        if len(lengths) == 2:
            with pytest.MonkeyPatch.context() as patch:  # the graph of two rows is not there yet
                patch.setattr(graphs, "find", lambda *_: key)
                runner.execute(plan)
        else:
            runner.execute(plan)
        seen.append(launches.take())
    assert seen[0] == seen[1] == seen[2]
    assert {name for name, _, _ in seen[0]} >= {"_plan_kernel", "_attention_kernel", "_merge_kernel", "_rotary_kernel"}
    assert any("scan" in name for name, _, _ in seen[0]), "sampling is inside"
    described = {
        item[3] for _, _, arguments in seen[0] for item in arguments if isinstance(item, tuple) and len(item) == 4
    }
    assert {"page_tables", "context_lens", "query_start", "positions", "slot_mapping", "layer 1"} <= described
    # Without a graph the host's numbers follow the step, which is what a graph must not depend on.
    without = []
    for lengths in ([5, 6, 7], [5, 200, 7]):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(graphs, "find", lambda *_: None)
            runner.execute(decodes(rng, lengths, [greedy] * 3))
        without.append(launches.take())
    assert without[0] != without[1]


def test_a_model_on_the_kernels_gives_the_same_tokens_from_graphs(kernels_everywhere: None) -> None:
    answers = []
    for has_graphs in (False, True):
        runner, _ = make_runner("qwen3")
        if not has_graphs:
            runner.graphs = None
        engine = Engine(runner)
        while engine.has_idle_work:
            engine.work_while_idle()
        for number, length in enumerate((3, 18, 7)):
            params = SamplingParams(temperature=0.0 if number else 0.8, seed=number)
            engine.add(Generate(number, [(number * 7 + place) % VOCAB for place in range(length)], params, 4))
        tokens: list[list[int]] = [[] for _ in range(3)]
        while engine.has_work:
            output = engine.step()
            for update in output.updates if output is not None else []:
                tokens[update.request_id] += update.token_ids
        answers.append(tokens)
        assert engine.stats().graph_steps > 0 or not has_graphs
    assert answers[0] == answers[1]
