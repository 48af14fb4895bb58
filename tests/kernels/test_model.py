"""A whole model on the kernels' path against the same model on the torch path: what a GPU runs, step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from neuron.engine.attention import attention
from neuron.engine.attention.attention_cpu import GatherAttention
from neuron.engine.attention.attention_triton import TritonAttention
from neuron.engine.gemm import activation
from neuron.engine.gemm.gemm import InvariantProduct
from neuron.engine.kv_cache.kv_cache import KVLayout, PagedKV
from neuron.engine.layers import norm
from neuron.engine.layers.embedding import LMHead
from neuron.engine.layers.linear import LinearLayer
from neuron.engine.models.decoder import CausalLM
from neuron.engine.models.registry import build_model
from neuron.engine.scheduler.step_limits import StepLimits
from neuron.engine.step.engine import Engine
from neuron.engine.step.runner import ModelRunner
from neuron.engine.weights.dummy import load_dummy_weights
from neuron.protocol import Generate, SamplingParams

from tests.kernels.harness import COMMON, FAMILIES, fused_in_interpreter
from tests.parity.paged_model import PagedModel, PagedSequence

PROMPTS = [[(index * 7 + position * 3) % 199 for position in range(length)] for index, length in enumerate((1, 20, 9))]


def generate(model: CausalLM, backend: attention.AttentionBackend, device: torch.device) -> tuple[list[Any], list[Any]]:
    """Greedy tokens and logprobs of each prompt, in chunks of at most 16 tokens beside running decodes."""
    config = model.config
    layout = KVLayout.uniform(config.num_layers, model.local.num_kv_heads, config.head_dim, 16, torch.float32)
    kv = PagedKV(layout, 32, device)
    limits = StepLimits(max_step_tokens=16, max_running=8, max_model_len=128)
    engine = Engine(ModelRunner(model, kv, backend, vocab_size=config.vocab_size, limits=limits))
    for index, prompt in enumerate(PROMPTS):
        engine.add(Generate(index, prompt, SamplingParams(temperature=0.0, logprobs=0), 3))
    tokens: list[list[int]] = [[] for _ in PROMPTS]
    logprobs: list[list[float]] = [[] for _ in PROMPTS]
    while engine.has_work:
        output = engine.step()
        assert output is not None
        assert not output.failures
        for update in output.updates:
            tokens[update.request_id] += update.token_ids
            logprobs[update.request_id] += [entry.logprob for entry in update.logprobs or []]
    return tokens, logprobs


@pytest.mark.parametrize("family", FAMILIES)
def test_the_kernels_path_generates_what_the_torch_path_does(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    model = build_model(COMMON | FAMILIES[family], device=device, dtype=torch.float32)
    load_dummy_weights(model, seed=1)
    for module in (norm, activation, attention):
        monkeypatch.setattr(module, "fused_kernel", lambda *_: None)
    tokens, logprobs = generate(model, GatherAttention(), device)
    for module in (norm, activation, attention):
        monkeypatch.setattr(module, "fused_kernel", fused_in_interpreter)
    actual_tokens, actual_logprobs = generate(model, TritonAttention(), device)
    assert actual_tokens == tokens
    for actual, expected in zip(actual_logprobs, logprobs, strict=True):
        torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), rtol=0, atol=2e-5)


@pytest.mark.usefixtures("place_free_dot")
@pytest.mark.parametrize("window", [None, 8])
def test_the_deterministic_path_gives_a_token_the_same_bits_in_any_step(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, window: int | None
) -> None:
    """Alone, in chunks, behind a cached prefix, decoded beside others: what `deterministic` promises on a GPU."""
    if device.type != "cpu":
        pytest.skip("the batches of this test are made on the CPU")
    family = FAMILIES["qwen3"] if window is None else FAMILIES["mistral"] | {"sliding_window": window}
    model = build_model(COMMON | family | {"num_hidden_layers": 1}, device=device, dtype=torch.float32)
    load_dummy_weights(model, seed=1)
    for module in model.modules():
        if isinstance(module, LinearLayer | LMHead):
            module.product = InvariantProduct()
    for module in (norm, activation, attention):
        monkeypatch.setattr(module, "fused_kernel", fused_in_interpreter)
    runner = PagedModel(model, attention=TritonAttention(deterministic=True))
    prompt = PROMPTS[1]
    cached, alone = runner.prefill(prompt)
    assert torch.equal(runner.prefill(prompt, chunk=7)[1], alone)
    assert torch.equal(runner.step([(runner.fork(cached, 12), prompt[12:])])[0], alone[12:])
    decoded, _ = runner.prefill(prompt[:18])
    other, _ = runner.prefill(PROMPTS[2])
    step = [(other, [3]), (decoded, [prompt[18]]), (PagedSequence(), prompt[:11])]
    _, at_18, beginning = runner.step(step, num_decodes=2)
    assert torch.equal(at_18, alone[18:19])
    assert torch.equal(beginning, alone[:11])
