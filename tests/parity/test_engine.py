"""Greedy answers of the whole engine, requests running together, equal transformers' answers to each alone."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from neuron.engine.loading.loading import load_engine
from neuron.protocol import EngineConfig, Generate, SamplingParams

from tests.parity.checkpoints import VARIANTS, VOCAB, Oracle, Variant, save_checkpoint

NUM_NEW = 12


def prompts() -> list[list[int]]:
    """Lengths from one token to several chunks; two that share a prefix of whole pages, one that comes twice."""
    generator = random.Random(5)

    def tokens(length: int) -> list[int]:
        return [generator.randrange(VOCAB) for _ in range(length)]

    shared = tokens(24)
    twice = tokens(40)
    return [tokens(1), tokens(7), shared + tokens(5), shared + tokens(14), twice, tokens(90), list(twice), tokens(16)]


@pytest.mark.parametrize(
    "variant",
    [
        variant
        for variant in VARIANTS
        if variant.name in ("qwen3-tied", "qwen2-yarn", "llama3-rope-gqa", "mistral-window")
    ],
    ids=lambda variant: variant.name,
)
def test_greedy_answers_of_requests_that_run_together(variant: Variant, tmp_path: Path) -> None:
    path = save_checkpoint(variant, tmp_path)
    oracle = Oracle(path)
    config = EngineConfig(
        model_id="tiny",
        path=str(path),
        kv_cache_tokens=1024,
        page_size=4,
        max_step_tokens=32,
        max_running=5,
        num_threads=1,
    )
    engine, _ = load_engine(config)
    try:
        outputs: dict[int, list[int]] = {}
        for request_id, prompt in enumerate(prompts()):
            outputs[request_id] = []
            engine.add(Generate(request_id, prompt, SamplingParams(temperature=0.0), NUM_NEW))
        while not engine.is_idle:
            output = engine.step()
            assert output is not None and not output.failures
            for update in output.updates:
                outputs[update.request_id] += update.token_ids
        assert engine.stats().prefix_hit_tokens >= 24
    finally:
        engine.close()
    for request_id, prompt in enumerate(prompts()):
        assert outputs[request_id] == oracle.generate(prompt, NUM_NEW), f"prompt {request_id}"
